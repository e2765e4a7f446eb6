"""Weights of models and files measured, compared with a baseline, and repaired."""
