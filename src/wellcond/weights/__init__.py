"""Which matrices a model or a file holds, their names, and a reason for each other tensor."""
