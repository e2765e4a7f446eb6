"""Penalties and limits applied to the weights of a model while it trains."""
