"""Measure and regularise the condition number of the weight matrices of neural networks."""

__version__ = "0.1.0"
