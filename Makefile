PYTHON ?= python3.11
# `make test TORCH=2.6.0`: with that torch instead of the one of constraints.txt, in an environment
# of its own.
TORCH ?=
VENV ?= .venv$(if $(TORCH),-torch-$(TORCH))
BIN = $(VENV)/bin
# An environment of its own for libraries of other formats, of which some exclude each other.
FORMATS = .venv-formats
# Processes of pytest, with one thread each. `worksteal`, because conftest.py puts long tests first.
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
PYTEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

# Small matrices on few cores: more threads than cores make LAPACK up to 100 times slower.
export OMP_NUM_THREADS ?= 2
check unit test-all formats: export OMP_NUM_THREADS = 1
# The tests start many processes, and without cached bytecode each compiles torch for seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo report check test unit test-all formats lint docs table install release-check clean

install: $(VENV)/installed

# wellcond and its experiments, which the demo needs; and then what development needs beside them.
$(VENV)/ready: pyproject.toml experiments/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --upgrade pip  # a new one resolves faster
	sed '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/)' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile --constraint $(VENV)/constraints.txt \
	    --editable . --editable ./experiments
	touch $@

$(VENV)/installed: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-compile --constraint $(VENV)/constraints.txt \
	    --editable '.[dev]'
	touch $@

# The paper's denoising experiment on the embedded digits, in short; `wellcond reproduce denoise` is
# the whole protocol.
demo: $(VENV)/ready
	$(BIN)/python -m wellcond_experiments.demo

# The tables and pictures of README and docs, from the results that are committed.
report: install
	for file in $$(grep -l '"experiment"' results/*.json); do \
	    $(BIN)/wellcond reproduce $$(basename $$file .json) --report || exit 1; \
	done

# The types are those of the pinned torch; on another one there is nothing to look for.
lint: install
ifeq ($(TORCH),)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
endif

# What to run while working: a minute or so.
check: lint
	$(PYTEST) -m 'not slow and not distributed and not frameworks' tests src

# What every change has to pass: tests of each kind, and all pages that run in seconds.
test: lint unit

unit: install
	$(PYTEST) -m 'not slow' tests src

# Everything: fuzzing at length, long trainings, the experiments, the libraries of other formats.
test-all: lint formats
	$(PYTEST)

# Lets the libraries that quantise weights write files, and compares all entries with theirs.
formats: $(FORMATS)/installed
	$(FORMATS)/bin/python -m pytest -m libraries tests/recipes tests/files

$(FORMATS)/installed: tests/recipes/requirements.txt tests/recipes/packers.txt
	$(PYTHON) -m venv $(FORMATS)
	$(FORMATS)/bin/python -m pip install --quiet --upgrade pip
	$(FORMATS)/bin/python -m pip install --quiet -r tests/recipes/requirements.txt
	$(FORMATS)/bin/python -m pip install --quiet --no-deps -r tests/recipes/packers.txt
	$(FORMATS)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# The table of folders in CONTRIBUTING.md, from the one in tests/test_import.py.
table: install
	$(BIN)/python tests/test_import.py

# The site, in build/site; every warning is an error. What its programs print is tested by `test`.
docs: $(VENV)/docs-installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet \
	    --doctree-dir build/doctrees docs build/site
	@echo "The site is build/site/index.html."

$(VENV)/docs-installed: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[docs]'
	touch $@

# What is uploaded: built, checked, and tried where nothing else of this repository is.
release-check: install
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[release]'
	rm -rf dist build/release
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt dist/*.whl
	cd build/release && bin/python -I $(CURDIR)/.ci/installed.py
	du -h dist/*

clean:
	rm -rf .venv .venv-torch-* $(FORMATS) runs build dist .pytest_cache .mypy_cache .ruff_cache
