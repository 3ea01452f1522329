# Each goal sets up what it needs by itself; a second call installs nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types pocket clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch==2.13.0"
	$(BIN)/pip install --quiet --editable ".[eval,dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m eval demo --out runs/demo

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy --strict vlm_patch eval

pocket: $(READY)
	$(BIN)/python -m eval.pocket.train

clean:
	rm -rf $(VENV) runs
