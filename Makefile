# make setup   creates .venv and installs everything that the other targets need
# make demo    trains one model per tokenizer on the standard library and compares them; ten minutes
# make test    runs the tests; make test-slow runs the long ones
# make soak    kills a small run 40 times, compares the results, prints the table of docs/reliability.md
# make test-tpu    compiles kernels and steps with the TPU compiler; needs no TPU
# make test-beam   tests `tokenize` on Apache Beam, in .venv-beam
# make lint    checks format, lint, types and contracts; make format applies automatic fixes
#
# Settings, on the command line or in the environment:
#   PYTHON=python3.12      the interpreter for .venv, 3.11 or newer
#   JAX_PLATFORMS=cuda     the device to run on (after make gpu)
#   WORKERS=4              number of test processes
#   JAX_COMPILATION_CACHE_DIR=DIR   for compiled programs, instead of ~/.cache/tessera/jax

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# The first interpreter that runs and is new enough.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& echo $$python && break; done)
VENV ?= .venv
WORKERS ?= 2
JAX_PLATFORMS ?= cpu
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.1
export JAX_PLATFORMS JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# Compiled programs are kept per user, since clones come and go, and by the versions that made them,
# so that old ones can be deleted. They are not kept where that folder cannot be written.
PROGRAMS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/tessera/jax
VERSIONS := import importlib.metadata as m; print(*(m.version(x) for x in ("jax", "jaxlib")), sep="-")
ifndef JAX_COMPILATION_CACHE_DIR
KEEP = programs="$(PROGRAMS)/$$($(BIN)/python -c '$(VERSIONS)')" && \
	mkdir -p "$$programs" 2>/dev/null && [ -w "$$programs" ] && \
	export JAX_COMPILATION_CACHE_DIR="$$programs";
else
export JAX_COMPILATION_CACHE_DIR
endif
RUN = $(KEEP) $(BIN)/python -m
PYTEST = $(RUN) pytest -n $(WORKERS) --dist loadfile

.PHONY: setup demo test test-slow soak test-tpu test-beam beam lint format torch gpu tpu clean

setup: $(VENV)/.package $(VENV)/.test

# Runtime dependencies. The stamp file is touched last, so an interrupted installation starts again.
$(VENV)/.package: pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo 'error: no Python 3.11 or newer found: make $(MAKECMDGOALS) PYTHON=/path/to/python' >&2; exit 1; }
	@echo 'Installing into $(VENV), a minute or two'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	@touch $@

# Dependencies of the tests and linters.
$(VENV)/.test: $(VENV)/.package
	$(INSTALL) --editable '.[test]'
	@touch $@

demo: $(VENV)/.package
	$(RUN) experiments.run equal_info --scale demo --out out/demo

# Tests of one file run in one process, so that shared models are compiled and trained once.
test: $(VENV)/.test
	$(PYTEST) -m 'not slow and not tpu'

test-slow: $(VENV)/.test
	$(PYTEST) -m 'slow and not tpu'

# Eight kills make one run; CI does one run, this target five. About ten minutes.
soak: $(VENV)/.test
	$(RUN) tests.kill_harness --kills 40

# The TPU compiler (libtpu) is a separate library; its compiled programs are never run here.
$(VENV)/.tpu: $(VENV)/.test
	$(INSTALL) --editable '.[tpu]'
	@touch $@

test-tpu: $(VENV)/.tpu
	$(RUN) pytest -m tpu

# Apache Beam conflicts with our pinned versions of four packages, so it gets its own environment,
# where pip chooses versions of those four that Beam accepts.
BEAM := .venv-beam
REFUSED := pillow|protobuf|pyarrow|python-dateutil

$(BEAM)/.beam: pyproject.toml constraints.txt
	@echo 'Installing into $(BEAM), a minute or two'
	$(PYTHON) -m venv $(BEAM)
	grep -vE '^($(REFUSED))==' constraints.txt > $(BEAM)/constraints.txt
	$(BEAM)/bin/python -m pip install --quiet --constraint $(BEAM)/constraints.txt --editable '.[beam,test]'
	@touch $@

beam: $(BEAM)/.beam

test-beam: $(BEAM)/.beam
	$(BEAM)/bin/python -m pytest tests/experiments/test_tokenize.py -k beam

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(RUN) pytest tests/test_contracts.py tests/test_contracts_docs.py tests/test_rooms.py

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Optional: a few benchmarks also time PyTorch where it is installed.
torch: $(VENV)/.package
	$(INSTALL) torch==2.13.0

# Optional: JAX for an NVIDIA GPU (CUDA=12 for an older driver), or for a TPU VM.
CUDA ?= 13
gpu: $(VENV)/.package
	$(INSTALL) --editable '.[cuda$(CUDA)]'

tpu: $(VENV)/.package
	$(INSTALL) --editable '.[tpu]'

clean:
	rm -rf $(VENV) $(BEAM) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	@[ ! -d "$(PROGRAMS)" ] || echo 'Kept, for other clones: compiled programs in $(PROGRAMS)'
