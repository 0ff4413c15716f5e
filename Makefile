# `make quickstart` and `make test` work on a fresh machine: they make .venv first. PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip install -c constraints.txt

export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: venv quickstart test test-slow lint format type check clean

venv: $(INSTALLED)

# torch goes first, alone and with its exact version, so that the build which an index or wheel folder offers is kept.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Needs Python 3.11 or later: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e '.[dev]'
	touch $@

# SFT, reward model, PPO and evaluation on the embedded task
quickstart: venv
	bash recipes/quickstart/run.sh

# The default suite: everything but the tests marked slow, with the examples in docstrings; a thread for each worker
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-slow: venv
	$(BIN)/python -m pytest -m slow

lint: venv
	$(BIN)/ruff check .

format: venv
	$(BIN)/ruff format .

type: venv
	$(BIN)/mypy

# What must pass before a commit, beside the tests
check: lint type
	$(BIN)/ruff format --check .

# Caches and build leftovers; outputs/ and .venv/ stay
clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find rlhf_recipes recipes tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
