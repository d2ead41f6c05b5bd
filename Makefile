# make quickstart | test | test-slow | bench | lint        (see README.md and CONTRIBUTING.md)
#
# PYTHON       interpreter for the virtual environment             (default: python3)
# TORCH_INDEX  address of an index of CPU builds of torch, for machines without a GPU; if it does not answer, make stops
SHELL := /bin/bash
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
# A worker of tests for each of two cores; ranks of one test wait for one another, and the other worker fills the gaps.
PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: quickstart test test-slow bench lint venv clean

quickstart: venv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m dwt_ds.quickstart

test: venv
	$(PYTEST) -m "not slow"

test-slow: venv
	$(PYTEST) -m slow

bench: venv
	$(BIN)/python benchmarks/training_speed.py

lint: venv
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

venv: $(VENV)/.installed

# A torch from a CPU index carries a "+cpu" version; where pip finds none, the plain one is taken, which brings
# gigabytes of CUDA packages along, and its own Triton.
$(VENV)/.installed: setup.py kernels/setup.py constraints.txt constraints-cpu.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q --upgrade "setuptools>=70" wheel ninja
ifneq ($(HAS_GPU),)
	$(BIN)/python -m pip install "torch==$(TORCH)"
else ifneq ($(TORCH_INDEX),)
	$(BIN)/python -m pip install -q --index-url $(TORCH_INDEX) "torch==$(TORCH)+cpu"
else
	$(BIN)/python -m pip install -q "torch==$(TORCH)+cpu" 2>/dev/null || $(BIN)/python -m pip install "torch==$(TORCH)"
endif
	cpu=; [[ $$($(BIN)/python -c 'from importlib import metadata; print(metadata.version("torch"))') != *+cpu ]] \
	    || cpu="-c constraints-cpu.txt"; \
	$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt $$cpu -e ./kernels -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info kernels/build kernels/*.egg-info
