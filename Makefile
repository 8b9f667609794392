# Every target does its own set-up in .venv on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help venv quickstart test test-fast test-slow test-vllm check docs lock release-check audit format bench bench-gpu profile clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(STAMP)  ## make the virtual environment

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dualign needs Python 3.11 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

quickstart: $(STAMP)  ## align a 135M model by DAR and read its answers before and after
	$(BIN)/python -m dualign.assets
	$(BIN)/dualign train quickstart run.dir=runs/quickstart-$$(date +%Y%m%d-%H%M%S)

test: $(STAMP)  ## run the test suite
	$(BIN)/python -m dualign.assets
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not vllm" --durations 8

FAST := tests/algos tests/test_batch.py tests/test_no_signal.py tests/test_optim.py tests/test_loss_curve.py \
	tests/test_engine.py tests/test_python.py tests/test_docs.py

test-fast: $(STAMP)  ## the mathematics and the loop on tiny models, in under a minute
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(FAST)

test-slow: $(STAMP)  ## every small recipe for two steps on the embedded model
	$(BIN)/python -m dualign.assets
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed

$(VLLM_STAMP): src/dualign/rollout/vllm/setup.py | $(STAMP)
	$(BIN)/dualign vllm-setup --into $(VLLM)
	touch $(VLLM_STAMP)

test-vllm: $(STAMP) $(VLLM_STAMP)  ## whole runs against a real vLLM server, in an environment of its own
	HF_HUB_OFFLINE=1 DUALIGN_VLLM=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest -m "vllm $(ONLY)" --durations 8 tests/vllm

check: $(STAMP)  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)  ## build the documentation's site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "site/index.html opens in a browser; search needs: $(PYTHON) -m http.server -d site"

lock: $(STAMP)  ## pin what is installed now, for the two commands: constraints.txt
	(sed '/^#/!d' constraints.txt; $(BIN)/pip freeze --exclude-editable --exclude pip | sed 's/+cpu//') > constraints.new
	mv constraints.new constraints.txt

release-check: $(STAMP)  ## build, check and install the wheel in an empty environment, and train there
	PYTHON=$(abspath $(BIN)/python) bash .ci/release

audit: $(STAMP)  ## known faults of the installed packages (needs the network)
	$(BIN)/pip-audit --skip-editable --progress-spinner off

format: $(STAMP)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## dualign against TRL on this machine (installs trl)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m dualign.assets
	$(BIN)/python benchmarks/against_trl.py

bench-gpu: $(STAMP)  ## the update phase and decoding on one CUDA device, and TRL on it (some ten minutes)
	$(BIN)/pip install --quiet -e '.[bench]'
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/gpu.py --shapes 0.5b --shard full
	$(BIN)/python benchmarks/against_trl.py --only dualign-grpo trl-grpo --prompts 64 --tokens 128 --repeats 3

profile: $(STAMP)  ## where the time of one online batch goes
	$(BIN)/python -m dualign.assets
	$(BIN)/python benchmarks/profile_batch.py

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) $(VLLM) .pytest_cache .mypy_cache .ruff_cache build
