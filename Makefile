# Two commands matter: `make demo` and `make test`. Both create .venv and install pinned versions into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint docker/constraints.txt
# models come from packages and folders here; nothing asks a hub
export HF_HUB_OFFLINE := 1

.PHONY: help demo test lint format bench bench-encoder config-reference clean

help:  ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml docker/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "vecmill needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[cpu,demo,s3,dev]'
	touch $@

demo: $(INSTALLED)  ## index the docstrings of the Python standard library and search them
	$(BIN)/vecmill demo

test: $(INSTALLED)  ## the test suite
	$(BIN)/python -m pytest

lint: $(INSTALLED)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## format and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## measure what the README states; minutes
	$(BIN)/python tests/benchmarks/spine.py

bench-encoder: $(INSTALLED)  ## measure the encoder against other engines; 20 minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint docker/constraints.txt --editable '.[bench]'
	$(BIN)/python tests/benchmarks/encoder.py

config-reference: $(INSTALLED)  ## write configs/cluster.yaml again from the models
	$(BIN)/python tests/config_reference.py

clean:  ## remove the environment and the demo
	rm -rf $(VENV) vecmill-demo
