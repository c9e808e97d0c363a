# `make help` lists the targets. All that a machine needs is make and Python 3.10 or newer, with its venv module.
PYTHON ?= python3
VENV ?= .venv
# More options for pip, for instance another index that holds CPU-only wheels of PyTorch.
PIP_FLAGS ?=
# Processes that share the tests, each with one thread of PyTorch, and the checking of types.
JOBS ?= 2
# What `make gpu` does: all, or some of facts correct sanitize kernels throughput training profile.
STAGES ?=
# More options for pytest, for instance PYTEST_FLAGS="-k toeplitz".
PYTEST_FLAGS ?=

BIN := $(VENV)/bin
# pip compiles in one process, which takes a minute; compileall takes as many as there are cores.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_FLAGS) -c constraints.txt
# A file of tests stays in one process, which then makes what they share once; tests/conftest.py says in which order.
PYTEST := $(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadscope --no-loadscope-reorder --durations=10 $(PYTEST_FLAGS)
SOURCES := sw_transplant tests examples benchmarks
# Tests start many processes that import the package: it is compiled once, also where that is switched off.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all lint pytest docs gpu clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Convert a trained network and show that it still gives the same answers
	$(BIN)/python examples/demo.py

test: lint pytest ## Lint, type check and test: minutes

test-all: lint ## The same with the tests that take long: more than an hour
	SW_EXHAUSTIVE=1 $(PYTEST)

lint: $(VENV)/.test ## Check style, formatting and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy --num-workers=$(JOBS)

pytest: $(VENV)/.test ## Test without lint and types
	$(PYTEST)

docs: $(VENV)/.docs ## Build the site of the documentation into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

gpu: ## On a machine with a GPU: tests, sanitizer, benchmarks, profile; STAGES="facts correct" for some of it
	@nvidia-smi -L >/dev/null 2>&1 || { echo "make gpu: there is no NVIDIA GPU here (nvidia-smi -L finds none)." >&2; exit 2; }
	@$(MAKE) --no-print-directory $(VENV)/.cuda
	$(BIN)/python benchmarks/gpu_day.py $(STAGES)

clean: ## Remove the environment, builds and caches
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find $(SOURCES) -type d -name __pycache__ -prune -exec rm -rf {} +

# An empty file per extra says that it is installed; newer requirements install it again.
$(VENV)/.demo $(VENV)/.docs $(VENV)/.test $(VENV)/.cuda: $(VENV)/.%: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "Installing sw-transplant[$*] into $(VENV); PyTorch is large, the first time takes some minutes ..."
	$(INSTALL) -e '.[$*]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # some packages have files for other Pythons
	@touch $@

$(VENV)/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "There is no '$(PYTHON)' here. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$$($(PYTHON) --version 2>&1) is too old: 3.10 or newer is needed. Name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) lacks the modules venv and ensurepip. Install them (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
