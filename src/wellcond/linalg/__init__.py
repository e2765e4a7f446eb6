"""Numerics of single matrices in float64: spectra, certificates, nearest matrices.

This package does not know models, parameters or training.
"""
