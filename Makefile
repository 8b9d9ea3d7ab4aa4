# make quickstart: set up and run the experiment on the sample papers. make test: set up, lint, types, tests.
PYTHON ?= python3
# What pip is given to install PyTorch, options for another build (CPU, CUDA) included.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: help quickstart test clean
help:  ## list the targets
	@grep -E '^[a-z.]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv: .venv/.installed  ## the virtual environment with everything installed
.venv/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

quickstart: .venv  ## install, train and evaluate on the sample papers (minutes on two CPU cores)
	$(BIN)/python main.py

test: .venv  ## install, lint, types, the test suite
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .
	$(BIN)/pytest -n 2

clean:  ## remove the environment and all runs
	rm -rf .venv runs
