"""Weights as linear maps, with the operations that rules, limits and measurements need."""
