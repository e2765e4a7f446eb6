"""Which matrices a model or a file holds, under which names, and why the rest is none."""
