# `make demo`, `make test`, `make bench`: each sets up what it needs, once.
# PYTHON picks the interpreter that makes the virtual environment (3.11 or newer); VENV its place.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo hard test bench install clean

demo: install
	$(BIN)/searchr1 train configs/demo.yaml

hard: install
	$(BIN)/searchr1 train configs/hard.yaml

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q

bench: install
	$(BIN)/python bench/throughput.py

install: $(INSTALLED)

# Made anew when what is installed changes; sources need nothing, the install is editable.
$(INSTALLED): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
