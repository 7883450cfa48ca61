# Everything from nothing: each target builds .venv first if it is missing or older than what it was built from.
# Prerequisites: make and Python >= 3.10 (`make test PYTHON=python3.12` chooses one).
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint docs clean

help:
	@echo "make quickstart   train a search model on the documentation of your Python packages and ask it questions"
	@echo "make test         run the tests"
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

quickstart: $(INSTALLED)
	$(BIN)/minibert quickstart

# A process for each core, up to four; the tests of one file stay together, since they share what the first of them makes.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# The editable install is invisible to the type checker; a link gives it the package under its own name.
lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p .venv/types && ln -sfn ../.. .venv/types/minibert
	MYPYPATH=.venv/types $(BIN)/mypy --no-namespace-packages --exclude '/(benchmarks|docs|tests)/' -p minibert

docs: $(INSTALLED)
	$(BIN)/sphinx-build -q -W --keep-going docs build/docs

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
