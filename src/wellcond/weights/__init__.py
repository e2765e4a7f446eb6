"""The matrices in a model or a file, their names, and a reason for each other tensor."""
