# Everything runs in .venv, which the first call makes; later calls reuse it until pyproject.toml
# or constraints.txt changes. Needs make and a python3 (3.10 or newer, with venv and pip).

PYTHON ?= python3
PYTEST_ARGS ?= -n 2

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint types notebooks docs survey bench demo-model

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

demo: $(VENV)/.installed  ## install the package and run its demonstration
	$(BIN)/hookedlm demo

test: $(VENV)/.installed-dev  ## run the tests (PYTEST_ARGS="-n 2" by default)
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev  ## mypy
	$(BIN)/mypy

notebooks: $(VENV)/.installed-dev  ## execute every notebook, without a network
	$(BIN)/python scripts/run_notebooks.py

docs: $(VENV)/.installed-dev  ## regenerate docs/api_coverage.md
	$(BIN)/python scripts/api_coverage.py --markdown

survey: $(VENV)/.installed-dev  ## measure every type in transformers and write docs/families.md
	$(BIN)/python scripts/survey.py

bench: $(VENV)/.installed-dev  ## measure every task beside other libraries and write docs/benchmarks.md
	$(BIN)/python benchmarks/environments.py
	$(BIN)/python benchmarks/compare.py --goals --markdown docs/benchmarks.md

demo-model: $(VENV)/.installed-dev  ## train the model in hookedlm/demo again
	$(BIN)/python scripts/train_demo.py --out hookedlm/demo

# pip, not python, is what shows that making the environment ran to its end.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit("hookedlm needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e ".[plots]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e ".[dev]"
	@touch $(VENV)/.installed $@
