PYTHON ?= python3.11
# `make test TORCH=2.6.0` uses that version of torch instead of the one in constraints.txt, in a
# separate environment.
TORCH ?=
VENV ?= .venv$(if $(TORCH),-torch-$(TORCH))
BIN = $(VENV)/bin
# A separate environment for libraries of other formats, some of which conflict with others.
FORMATS = .venv-formats
# Runs pytest in several processes with one thread each. `worksteal` fits the order of conftest.py,
# which puts long tests first.
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
PYTEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

# For small matrices, more threads than cores make LAPACK up to 100 times slower.
export OMP_NUM_THREADS ?= 2
check unit test-all formats: export OMP_NUM_THREADS = 1
# The tests start many processes. Without cached bytecode, each would compile torch for seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo report check test unit test-all formats lint docs table install release-check clean

install: $(VENV)/installed

# Installs wellcond and its experiments for the demo; `installed` adds the development packages.
$(VENV)/ready: pyproject.toml experiments/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --upgrade pip  # a new pip resolves faster
	sed '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/)' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile --constraint $(VENV)/constraints.txt \
	    --editable . --editable ./experiments
	touch $@

$(VENV)/installed: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-compile --constraint $(VENV)/constraints.txt \
	    --editable '.[dev]'
	touch $@

# A short version of the paper's denoising experiment on the embedded digits. `wellcond reproduce
# denoise` runs the complete protocol.
demo: $(VENV)/ready
	$(BIN)/python -m wellcond_experiments.demo

# Writes the tables and figures of the README and docs from the committed results.
report: install
	for file in $$(grep -l '"experiment"' results/*.json); do \
	    $(BIN)/wellcond reproduce $$(basename $$file .json) --report || exit 1; \
	done

# The types fit only the pinned version of torch, so other versions are not checked.
lint: install
ifeq ($(TORCH),)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
endif

# Runs the fast tests during development; takes about a minute.
check: lint
	$(PYTEST) -m 'not slow and not distributed and not frameworks' tests src

# Runs the tests that every change must pass: tests of each kind, and all pages that run in seconds.
test: lint unit

unit: install
	$(PYTEST) -m 'not slow' tests src

# Runs everything: long fuzzing, long training runs, experiments, and libraries of other formats.
test-all: lint formats
	$(PYTEST)

# Writes files with the libraries that quantise weights, and compares all entries with theirs.
formats: $(FORMATS)/installed
	$(FORMATS)/bin/python -m pytest -m libraries tests/recipes tests/files

$(FORMATS)/installed: tests/recipes/requirements.txt tests/recipes/packers.txt
	$(PYTHON) -m venv $(FORMATS)
	$(FORMATS)/bin/python -m pip install --quiet --upgrade pip
	$(FORMATS)/bin/python -m pip install --quiet -r tests/recipes/requirements.txt
	$(FORMATS)/bin/python -m pip install --quiet --no-deps -r tests/recipes/packers.txt
	$(FORMATS)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# Writes the table of folders in CONTRIBUTING.md from the table in tests/test_import.py.
table: install
	$(BIN)/python tests/test_import.py

# Builds the site in build/site; every warning is an error. `test` checks the output of programs.
docs: $(VENV)/docs-installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet \
	    --doctree-dir build/doctrees docs build/site
	@echo "The site is build/site/index.html."

$(VENV)/docs-installed: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[docs]'
	touch $@

# Builds and checks the release files, and tests the wheel outside the repository.
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
