# Every target makes what it needs; .venv is made from pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FIGURES ?= figures
SUITE ?= quick
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup figures test test-slow lint fmt check clean

help:  ## print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(VENV)/ready  ## make the virtual environment

figures: $(VENV)/ready  ## measure the quick suite on this machine and draw its figures
	$(BIN)/glabench run $(SUITE) --out $(FIGURES)/results $(ARGS)
	$(BIN)/glabench report $(FIGURES)/results --out $(FIGURES)

test: $(VENV)/ready  ## run the tests (no GPU needed)
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-slow: $(VENV)/ready  ## run the long tests as well
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

lint: $(VENV)/ready  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: $(VENV)/ready  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test  ## what every commit passes

clean:  ## remove what the targets made
	rm -rf $(VENV) $(FIGURES) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
