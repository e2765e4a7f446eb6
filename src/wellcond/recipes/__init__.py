"""Builds effective weights from stored parts: codes and scales, directions and norms, masks."""
