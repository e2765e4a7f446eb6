"""A weight as a linear map: what rules, limits and measurements in training ask of it."""
