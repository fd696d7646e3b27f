# Everything a bare machine with git, make and Python 3.11+ needs; `make help` lists it.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SITE   ?= site
# Threads that wait do not spin: they share the cores with each other and with the programs they test.
QUIET  := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-slow test-hostile test-gpu faults check lint types golden docs bench clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/base.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "crnet needs Python 3.11 or newer; say make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[plot]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/base.stamp
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/docs.stamp: $(VENV)/base.stamp
	$(PIP) -e '.[docs]'
	touch $@

demo: $(VENV)/base.stamp  ## train CR-Net beside full rank, a few minutes on two cores
	$(BIN)/crnet demo $(DEMO)

test: $(VENV)/dev.stamp  ## the tests, under six minutes on two cores
	$(QUIET) $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not hostile and not gpu' $(PYTEST)

test-slow: $(VENV)/dev.stamp  ## the tests that take longer
	$(QUIET) $(BIN)/python -m pytest -n 2 --dist worksteal -m 'slow and not gpu' $(PYTEST)

test-hostile: $(VENV)/dev.stamp  ## what a hostile user does to the command line, a quarter of an hour
	$(QUIET) $(BIN)/python -m pytest -n 2 --dist worksteal -m hostile $(PYTEST)

test-gpu: $(VENV)/dev.stamp  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests/gpu $(PYTEST)

faults: $(VENV)/dev.stamp  ## plant faults one by one; the tests must notice each
	$(BIN)/python tests/planted_faults.py $(FAULTS)

lint: $(VENV)/dev.stamp  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp  ## pyright on src
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint types test  ## what continuous integration runs

golden: $(VENV)/dev.stamp  ## write the golden losses anew, after a change of computation that is meant
	$(BIN)/python tests/golden.py

docs: $(VENV)/docs.stamp  ## the pages as a site, in ./site
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . $(SITE)

bench: $(VENV)/dev.stamp  ## time of a step and of the blocks, beside transformers and the plain formula
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/peers.py $(BENCH)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/block_time.py $(BENCH)

clean:  ## remove the virtual environment, the site and the caches of the tools
	rm -rf $(VENV) $(SITE) .pytest_cache .ruff_cache .hypothesis
