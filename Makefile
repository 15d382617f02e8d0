# Every target sets up what it needs on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two threads on two shared cores are slower than one for models of this size.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
WORKERS ?= 2

.PHONY: demo test test-all test-oldest lint format clean

demo: $(STAMP)
	$(BIN)/finesteer demo --out out/demo

test: lint
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow" tests

test-all: lint
	$(BIN)/python -m pytest -q -n $(WORKERS) tests

# The oldest versions that pyproject.toml claims.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q -c constraints-oldest.txt -e ".[dev]"
	.venv-oldest/bin/python -m pytest -q -n $(WORKERS) -m "not slow" tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-oldest out .pytest_cache .mypy_cache .ruff_cache
