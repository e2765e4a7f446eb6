PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin

# Small matrices on few cores: more threads than cores make LAPACK up to 100 times slower.
export OMP_NUM_THREADS ?= 2

.PHONY: demo test lint install clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The main job: the paper's denoising experiment on the embedded digits; pictures in runs/denoise.
demo: install
	$(BIN)/wellcond reproduce denoise --data digits --overwrite

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --numprocesses 2

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache
