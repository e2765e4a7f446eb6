"""Penalties and limits that are applied to the weights of a model during training."""
