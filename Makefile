# Every target makes what it needs in .venv; nothing has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test slow check bench clean

demo: $(VENV)/.train
	$(BIN)/python -m recipes.mini.demo

test: $(VENV)/.core
	$(BIN)/python -m pytest -n auto --maxprocesses 8

slow: $(VENV)/.train .venv-mergekit
	$(BIN)/python -m pytest -m "slow or not slow"

.venv-mergekit:
	benchmarks/mergekit_setup.sh

check: $(VENV)/.core
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_layers.py tests/test_docs.py

bench: $(VENV)/.core
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/density.py

$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing skillvec and its packages into $(VENV) (minutes, once)"
	$(PIP) --editable ".[dev]"
	@touch $@

$(VENV)/.train: $(VENV)/.core
	@echo "installing the training packages (TRL) into $(VENV)"
	$(PIP) --editable ".[dev,train]"
	@touch $@

clean:
	rm -rf $(VENV) runs
