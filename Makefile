# Every target makes what it needs in .venv; nothing has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# one thread a process: tests run side by side, and idle threads of two would wait for each other
ONE := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: demo reproduce test slow torture fuzz check bench clean

demo: $(VENV)/.ready
	$(BIN)/python -m recipes.past recipes/mini/past.yaml

reproduce: $(VENV)/.ready
	$(BIN)/python -m recipes.mini.reproduce

# a file's tests in one process: what they share is made once
test: $(VENV)/.ready
	$(ONE) $(BIN)/python -m pytest -n $$($(BIN)/python -c "import os; print(min(8, os.cpu_count() + 1))") --dist loadscope

slow: $(VENV)/.ready .venv-mergekit build/senders
	$(PIP) "transformers[serving]"
	DS_BUILD_OPS=0 $(PIP) deepspeed
	$(PIP) --editable ".[ray]"
	$(ONE) $(BIN)/python -m pytest -m "not gpu"

torture: $(VENV)/.ready
	$(ONE) $(BIN)/python tests/campaigns/torture.py --points 10000 --processes 2

fuzz: $(VENV)/.ready
	$(PIP) atheris
	$(ONE) $(BIN)/python tests/campaigns/fuzz.py --cases 7000

.venv-mergekit:
	benchmarks/mergekit_setup.sh

build/senders:
	benchmarks/senders_setup.sh

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_rooms.py tests/test_docs.py
	$(BIN)/python docs/rooms.py --lines

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/density.py

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing skillvec and its packages, TRL among them, into $(VENV) (minutes, once)"
	$(PIP) --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs
