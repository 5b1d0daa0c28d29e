# Two commands from nothing: `make demo` and `make test`. Both need Python 3.11, 3.12 or 3.13, a C++ compiler and a
# network on their first run, and nothing else.

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# The first that starts and is of a supported version: a name on the path may be a launcher of something missing.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	$$name -c '$(SUPPORTED)' 2>/dev/null && echo $$name && break; done)
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=
# Two processes: what one waits for, a server or a Ray that starts, is the other's time. tests/conftest.py says who
# shares a process. `ARGS="-n 0"` tests in one.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Threads that wait give way: two processes and what they start have more threads than there are cores.
test test-all quick: export OMP_WAIT_POLICY := passive
# Ray's workers are polite (nice 15), and what waits for them is the longest of the tests.
test test-all quick: export RAY_worker_niceness := 0

BENCHMARKS := $(filter-out s3_server,$(notdir $(basename $(wildcard benchmarks/*.py))))

.DEFAULT_GOAL := help
.PHONY: help demo quick test test-all check serve studio bench gpu clean

help:
	@echo "make demo      the main job on Fashion-MNIST: images to scored samples and a report"
	@echo "make quick     tests of models and recipes, within 90 seconds"
	@echo "make test      the tests (make test-all adds the slow ones)"
	@echo "make check     ruff and mypy"
	@echo "make serve     Prefect server and worker, MLflow UI, on loopback"
	@echo "make studio    data, reconstructions, samples and runs on one local page"
	@echo "make gpu       what one GPU reaches (benchmarks/gpu.md); ARGS=--smoke tries it on a CPU"
	@echo "make bench     the benchmarks, one JSON line each"
	@echo "make clean     forget local artifacts, runs and servers' databases"

demo: $(VENV)/.ready
	$(BIN)/latentforge run sfd-full --recipe demo $(ARGS)

quick: $(VENV)/.ready
	$(PYTEST) tests/models tests/configs $(ARGS)

test: $(VENV)/.ready check
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.studio check
	$(PYTEST) -m "slow or not slow" $(ARGS)

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

serve: $(VENV)/.ready
	$(BIN)/latentforge serve $(ARGS)

studio: $(VENV)/.studio
	$(BIN)/latentforge studio $(ARGS)

gpu: $(VENV)/.ready
	$(BIN)/python -m benchmarks.gpu $(ARGS)

bench: $(VENV)/.ready
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit 1; done

clean:
	rm -rf .latentforge

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' || { echo "latentforge needs Python 3.11, 3.12 or 3.13, found \
		$$($(or $(PYTHON),python3) --version 2>&1). Say where it is: make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	touch $@

# The page's library is an extra: constrained by the lock, so that it changes nothing of what is there.
$(VENV)/.studio: $(VENV)/.ready requirements-studio.lock
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -r requirements-studio.lock \
		-c requirements.lock
	touch $@
