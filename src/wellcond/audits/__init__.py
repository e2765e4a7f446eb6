"""Measures the weights of models and files, compares them with a baseline, and repairs them."""
