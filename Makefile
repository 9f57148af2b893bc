# make demo      a shipped checkpoint predicts and, where the simulators are, acts; MODEL=spatialvla or divla for others
# make train-demo  train, save, reload and try a tiny model on the embedded demonstrations; MODEL=tinyvla or divla likewise
# make test      the default test suite (CPU, offline)
# make test-sim  the tests in simulators; they render by EGL (Debian: libegl1, libgl1-mesa-dri)
# make test-browser  the tests of the Space in a headless Chromium (Debian: chromium, chromium-driver)
# make check     lint, format, types, architecture; changes nothing
# make format    put every file into the house format
#
# Each target first makes the virtual environment .venv if it is missing or out of date.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PYTEST_ARGS ?= -n 3 --dist worksteal
SIM_ARGS ?= -m "sim and not slow"
BROWSER_ARGS ?= -m "browser and not slow"

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RLDS := $(VENV)/.installed-rlds
SIM := $(VENV)/.installed-sim

.PHONY: demo train-demo test test-sim test-browser check format install
.DEFAULT_GOAL := test

install: $(INSTALLED)

# torch goes first: asked for by name at its tested version, pip takes a local or CPU build where it is offered one
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,serve,space,dev]"
	touch $@

# TensorFlow, 1.5 GB, which the tests alone need
$(RLDS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[rlds]"
	touch $@

$(SIM): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[sim]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/python scripts/demo.py $(if $(MODEL),--model $(MODEL))

train-demo: $(INSTALLED)
	$(BIN)/python scripts/train_demo.py $(if $(MODEL),--model $(MODEL))

test: $(INSTALLED) $(RLDS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-sim: $(INSTALLED) $(SIM)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIM_ARGS)

test-browser: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(BROWSER_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
