# Two commands from nothing: `make demo` and `make test`. Both need Python 3.11, a C++ compiler and a network
# on their first run, and nothing else.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=

BENCHMARKS := $(filter-out s3_server,$(notdir $(basename $(wildcard benchmarks/*.py))))

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check serve bench clean

help:
	@echo "make demo      the main job on Fashion-MNIST: images to scored samples and a report"
	@echo "make test      the tests (make test-all adds the slow ones)"
	@echo "make check     ruff and mypy"
	@echo "make serve     Prefect server and worker, MLflow UI, on loopback"
	@echo "make bench     the benchmarks, one JSON line each"
	@echo "make clean     forget local artifacts, runs and servers' databases"

demo: $(VENV)/.ready
	$(BIN)/python -m flows run sfd-full --recipe demo $(ARGS)

test: $(VENV)/.ready check
	$(BIN)/python -m pytest $(ARGS)

test-all: $(VENV)/.ready check
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

serve: $(VENV)/.ready
	$(BIN)/python -m flows serve $(ARGS)

bench: $(VENV)/.ready
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit 1; done

clean:
	rm -rf .latentforge

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "latentforge needs Python 3.11; found $$($(PYTHON) --version). Set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	touch $@
