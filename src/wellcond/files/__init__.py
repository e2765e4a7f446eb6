"""Reads the tensors of a file, with one reader per format, and copies files with new values."""
