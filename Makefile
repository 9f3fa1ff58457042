# One word each. Every target makes the environment first where it is missing or pyproject.toml has changed.
# A torch that is there already is kept only if it is $(TORCH); after that nothing resolves torch again.

PYTHON ?= python3
TORCH ?= 2.13.0
SEEDS ?= 2000
HOURS ?= 1
JOBS ?= 2
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.made-with-torch-$(TORCH)

.DEFAULT_GOAL := help
.PHONY: help setup check test sim bench proto demo soak test-gpu clean

help:  ## what each target does
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-9s %s\n", $$1, $$2}'

setup: $(STAMP)  ## the environment (.venv): torch, the package, the tools

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: Python 3.11 or newer is needed, but $(PYTHON) is '$$($(PYTHON) --version 2>&1)';" \
	    "name a newer one, as in: make PYTHON=python3.11 setup" >&2; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install 'torch==$(TORCH)'
	$(RUN) -m pip install -e '.[dev]'
	@rm -f $(VENV)/.made-with-torch-*
	@touch $@

check: $(STAMP)  ## ruff, mypy --strict and the house rules
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m pytest -q -m 'not slow' tests/house

test: $(STAMP)  ## every test that needs no accelerator, JOBS=2 files at a time (ARGS='-k name' narrows it)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m 'not gpu' -n $(JOBS) --dist loadfile $(ARGS)

test-gpu: $(STAMP)  ## the tests that need an accelerator
	$(RUN) -m pytest -m gpu $(ARGS) || { code=$$?; test $$code -eq 5 && echo 'make: no test is marked gpu yet'; }

sim: $(STAMP)  ## the simulator: SEEDS=2000 random clusters, or the one of SEED=...
	OMP_NUM_THREADS=1 $(RUN) -m tests.sim $(if $(SEED),--seed $(SEED),--seeds $(SEEDS)) $(ARGS)

bench: $(STAMP)  ## time to recover, the cost per step, the speed of the erasure code
	OMP_NUM_THREADS=1 $(RUN) -m benchmarks.recovery $(ARGS)
	OMP_NUM_THREADS=1 $(RUN) -m benchmarks.overhead $(ARGS)
	OMP_NUM_THREADS=1 $(RUN) -m benchmarks.codec $(ARGS)

soak: $(STAMP)  ## faults at random for HOURS=1
	OMP_NUM_THREADS=1 $(RUN) -m benchmarks.soak --hours $(HOURS) $(ARGS)

demo: $(STAMP)  ## a job that loses a worker and goes on
	OMP_NUM_THREADS=1 $(RUN) -m examples.demo $(ARGS)

proto: $(STAMP)  ## elastic/v1 from proto/elastic/v1
	$(RUN) proto/generate.py

clean:  ## build products and caches (the environment stays)
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
