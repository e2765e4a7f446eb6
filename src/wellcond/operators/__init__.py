"""A weight as a linear map: what every penalty and every measurement in training asks of it."""
