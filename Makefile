# Every target sets up what it needs: a fresh machine with python3 (3.11 or newer) and its venv
# module is enough. `make` alone lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ORACLES := $(VENV)/oracles

# Most of a GPU test is building kernels; what measures the device's memory runs by itself.
MANY := -n auto --dist worksteal

MODEL := examples/pico
PROMPT := def read_lines(path):

.DEFAULT_GOAL := help
.PHONY: help demo test slow sweep gpu bench lint types format clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.* ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(INSTALLED) ## compile and run a real model, show what the passes did, compare with transformers
	$(BIN)/ingot run $(MODEL) --prompt '$(PROMPT)'
	$(BIN)/ingot inspect $(MODEL) --passes
	$(BIN)/ingot verify $(MODEL)

test: $(INSTALLED) $(ORACLES) ## the tests that need no GPU and no patience
	$(BIN)/pytest -n 2 --dist worksteal -m 'not gpu and not slow'

slow: $(INSTALLED) ## what takes long: a sample of the sweeps, peak memory, the demo from the shell
	$(BIN)/pytest -n 2 -m 'slow and not gpu and not sweep'

sweep: $(INSTALLED) ## every model type of transformers, right or refused as the table says (an hour)
	$(BIN)/pytest -n 2 -m 'sweep and not gpu'

gpu: $(INSTALLED) ## the tests that need a GPU, and the kernel tests on it
	$(BIN)/pytest -m gpu tests/runtime/test_gpu_runtime.py
	OMP_NUM_THREADS=1 $(BIN)/pytest $(MANY) -m gpu --ignore tests/runtime/test_gpu_runtime.py
	OMP_NUM_THREADS=1 $(BIN)/pytest $(MANY) --device -m 'not gpu and not slow' \
		tests/codegen/test_*_kernels.py tests/codegen/test_kernel_coverage.py

bench: $(INSTALLED) ## full-size models on the GPU of this machine: compile, load and decode (60 GB of disk)
	$(BIN)/python examples/bench/full_size.py

lint: $(INSTALLED) ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED) ## pyright: strict, as pyproject.toml says
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED) ## mend what ruff can mend
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

clean: ## remove the virtual environment, caches and build output
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What tests compare with but nothing may import beside it: transformers would.
$(ORACLES): constraints.txt | $(INSTALLED)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target $@ torchao
	touch $@

# The constraints also keep pip from replacing the build of torch that a machine offers by a newer one.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
