# Every target sets up what it needs: Python 3.11 or newer with pip, make and bash are enough.
#   make demo     the whole method on the bundled data        make test    the tests
#   make check    format, lint, types, import layers          make slow    the tests that take minutes
# A CUDA build of torch:  make install TORCH=torch==2.13.0 CPU=   (see README, Install)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH ?= torch==2.13.0
# The suffix of PyTorch's builds without CUDA; empty on a machine with an NVIDIA driver.
CPU ?= $(shell command -v nvidia-smi >/dev/null || echo +cpu)
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
MODEL ?= embedded:SmolLM2-135M-Instruct
DEMO_FLAGS ?=
PYTEST_FLAGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
PIP := $(VENV)/bin/python -m pip install --quiet

.PHONY: help install models demo test slow check format clean

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.installed

# Quick when the weights are in the user's cache already.
models: install
	$(VENV)/bin/critrm models get $(MODEL)

demo: models
	$(VENV)/bin/critrm demo $(DEMO_FLAGS)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(PYTEST_FLAGS)

# A real OpenAI-compatible server is one of the things that are tested slowly.
slow: models
	@$(PIP) -c constraints.txt 'transformers[serving]'
	$(VENV)/bin/python -m pytest -m slow $(PYTEST_FLAGS)

check: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# Some distributions ship Python without ensurepip; their own pip can then fill the environment.
$(VENV)/.created:
	@echo "Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) \
	  || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip; }
	@touch $@

# Without a GPU the build without CUDA is some GB smaller. It comes from the package index where that has it, then from
# PyTorch's own, and where neither answers (or on macOS, which has one build only) the plain build works as well.
$(VENV)/.torch: $(VENV)/.created constraints.txt
	@echo "Installing $(TORCH)$(CPU)"
	@if [[ -z "$(CPU)" ]]; then $(PIP) -c constraints.txt "$(TORCH)"; \
	else $(PIP) -c constraints.txt "$(TORCH)$(CPU)" 2>/dev/null \
	  || $(PIP) -c constraints.txt "$(TORCH)$(CPU)" --extra-index-url "$(CPU_INDEX)" --timeout 15 --retries 1 2>/dev/null \
	  || $(PIP) -c constraints.txt "$(TORCH)"; fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "Installing critrm and its tools (a minute or two the first time)"
	@$(PIP) -c constraints.txt -e '.[data,train,embedded,eval,report,serve,ray,qlora,dev]'
	@touch $@
