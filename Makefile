# `make demo`, `make test`, `make bench`: each sets up what it needs, once.
# PYTHON picks the interpreter that makes the virtual environment (3.11 or newer); VENV its place.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo hard test bench stress install clean

demo: install
	$(BIN)/searchr1 train configs/demo.yaml

hard: install
	$(BIN)/searchr1 train configs/hard.yaml

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q

bench: install
	$(BIN)/python bench/throughput.py

# The batcher under ThreadSanitizer, then AddressSanitizer: so many submits, cancels and expiries each.
OPERATIONS ?= 10000000
STRESS := tests/csrc/stress.cpp $(addprefix csrc/,batcher.cpp core.cpp cache.cpp channel.cpp)
stress:
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -fsanitize=thread -pthread -Icsrc $(STRESS) -o build/stress-thread
	$(CXX) -std=c++17 -O1 -g -fsanitize=address,undefined -pthread -Icsrc $(STRESS) -o build/stress-address
	build/stress-thread $(OPERATIONS)
	build/stress-address $(OPERATIONS)

install: $(INSTALLED)

# Made anew when what is installed changes: the C++ is compiled, Python sources need nothing, the install is editable.
$(INSTALLED): setup.py pyproject.toml $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
