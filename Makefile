# Two commands on a machine that has python3 (3.11 or newer), make and git:
#   make train    make .venv, install jaxpar, train a small language model on the standard library's sources
#   make test     install what the tests need and run them all
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin

.PHONY: train test quick lint clean

train: $(VENV)/.installed
	$(BIN)/jaxpar train

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

quick: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[test]"
	$(BIN)/python -m pytest -m quick

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The version is asked first: pip's own message for an old Python names every release that it cannot use.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxpar needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1); try 'make PYTHON=python3.12 $(MAKECMDGOALS)'"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[test,reference]"
	@touch $@

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
