"""One dense matrix in float64: its spectrum, its certificate, its nearest relatives.

Nothing here knows of models, parameters or training.
"""
