# Everything from nothing: each target builds .venv first if it is missing or older than what it was built from.
# Prerequisites: make and Python >= 3.10 (`make test PYTHON=python3.12` chooses one).
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TYPES := .venv/types

.DEFAULT_GOAL := help
.PHONY: help quickstart dev check test test-slow lint docs clean

help:
	@echo "make quickstart   train a search model on the documentation of your Python packages and ask it questions"
	@echo "make dev          set up .venv for editors and type checkers, and say what to tell them"
	@echo "make check        run the quick tests of the model, the recipes and the package: a minute"
	@echo "make test         run the tests, in five minutes on two cores"
	@echo "make test-slow    run the slow tests: kills, whole trainings, compilers, browsers"
	@echo "make lint         check style and types"
	@echo "make docs         build the documentation into build/docs; dead links fail"
	@echo "make clean        remove .venv and the caches"

# torch goes first: with it in place, nothing else chooses another build of it.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "MiniBERT needs Python 3.10 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The checkout may have any name, and editors do not follow the editable install: the link gives them the package under its own name.
$(TYPES)/minibert: $(INSTALLED)
	@mkdir -p $(TYPES) && ln -sfn ../.. $@

quickstart: $(INSTALLED)
	$(BIN)/minibert quickstart

dev: $(TYPES)/minibert
	@echo "Interpreter:         .venv/bin/python"
	@echo "Pyright and Pylance: nothing to set, pyrightconfig.json names the paths"
	@echo "mypy:                MYPYPATH=$(TYPES), as make lint sets it"
	@echo "Other editors:       add $(TYPES) and tests to the paths where modules are looked for"

# Tests of files that every change may break; no network, and no test marked slow.
CHECKED := configuration kernels packing modeling parity tokenization recipe packaging encode
check: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow' $(CHECKED:%=tests/test_%.py)

# A process for each core, up to four; the tests of one file stay together, since they share what the first of them makes.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m 'not slow'

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m slow

lint: $(TYPES)/minibert
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPYPATH=$(TYPES) $(BIN)/mypy --no-namespace-packages --exclude '/(benchmarks|docs|tests)/' -p minibert

docs: $(INSTALLED)
	$(BIN)/sphinx-build -q -W --keep-going docs build/docs

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
