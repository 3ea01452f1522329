# Each goal sets up what it needs by itself; a second call installs nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest
# the oldest that pyproject.toml admits
OLDEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)

.PHONY: demo test test-oldest lint types pocket clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch==2.13.0"
	$(BIN)/pip install --quiet --editable ".[eval,dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m eval demo --out runs/demo

test: $(READY)
	$(BIN)/python -m pytest

$(OLDEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet "torch==2.13.0"
	$(OLDEST)/bin/pip install --quiet --editable ".[eval,dev]" \
	  "transformers==$(OLDEST_TRANSFORMERS)"
	touch $(OLDEST)/.ready

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy --strict vlm_patch eval

pocket: $(READY)
	$(BIN)/python -m eval.pocket.train

clean:
	rm -rf $(VENV) $(OLDEST) runs
