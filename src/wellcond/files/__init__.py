"""Bytes in, tensors out: one reader for each format, and copies with some tensors replaced."""
