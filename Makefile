# Each target makes .venv and installs what it needs when that is missing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test test-gpu slow mutants gpu lint types clean

quickstart: $(STAMP)
	$(BIN)/distill run recipes/digits/dmd2.yaml --out runs/quickstart \
		$$(if [ -e runs/quickstart ]; then echo --resume; fi)

# One thread for each of two workers: small networks gain nothing from sharing cores.
# All tests run on the CPU; where there is a GPU, those of the engine run there as well.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
		then $(MAKE) test-gpu; fi

# The tests that follow the device, and those that need a GPU: see tests/conftest.py.
test-gpu: $(STAMP)
	FEWSTEP_TEST_DEVICE=cuda $(BIN)/python -m pytest

# Writes each test's result and minutes to docs/slow-tests.md.
slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --write-slow

# Plant faults one at a time, and write down which the tests catch: minutes on one core.
mutants: $(STAMP)
	$(BIN)/python benchmarks/mutants.py --json docs/results/mutants.json --markdown docs/mutants.md

# Measure training steps on this machine's GPU: at most six minutes, no downloads.
gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/tables.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
