# fullarc: `make demo` takes raw text to an agent; `make check` is for every change, `make test` for every merge.

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.fullarc-setup
BASE_PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
TORCH_CPU := https://download.pytorch.org/whl/cpu

# One thread per process: the arc runs trainer, engine and sandboxes side by side, and results stay bit-identical.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup sandbox compiler demo check lint test bench
.DEFAULT_GOAL := setup

setup: $(STAMP)

# The CPU build of torch first, where its index can be reached (on Linux PyPI's own wheel brings 3 GB of CUDA);
# an offline mirror serves whatever torch it has.
$(STAMP): requirements.lock pyproject.toml
	@test -n "$(BASE_PYTHON)" || { echo "fullarc needs Python 3.11 or newer with venv: type 'apt-get install python3 python3-venv'."; exit 1; }
	@test -x $(PY) || $(BASE_PYTHON) -m venv $(VENV)
	@if ! $(PY) -c 'import torch' 2>/dev/null && \
		$(PY) -c 'import urllib.request as u; u.urlopen("$(TORCH_CPU)/torch/", timeout=10)' 2>/dev/null; then \
		$(PY) -m pip install -qq --no-deps --index-url $(TORCH_CPU) "$$(grep '^torch==' requirements.lock)"; fi
	$(PY) -m pip install -qq -r requirements.lock
	$(PY) -m pip install -qq --no-deps --no-build-isolation -e .
	@$(MAKE) --no-print-directory sandbox || true
	@$(MAKE) --no-print-directory compiler || true
	@touch $(STAMP)

# Untrusted code runs in bubblewrap.
sandbox:
	@command -v bwrap >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		{ apt-get install -y -qq bubblewrap >/dev/null 2>&1 || { apt-get update -qq >/dev/null 2>&1; apt-get install -y -qq bubblewrap >/dev/null 2>&1; }; }; } || \
		{ echo "bubblewrap is missing: type 'sudo apt-get install bubblewrap'."; exit 1; }

# The engine compiles its kernels on first use; without a compiler it computes in torch, several times slower.
compiler:
	@command -v cc >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		{ apt-get install -y -qq gcc libc6-dev >/dev/null 2>&1 || { apt-get update -qq >/dev/null 2>&1; apt-get install -y -qq gcc libc6-dev >/dev/null 2>&1; }; }; } || \
		{ echo "A C compiler is missing: type 'sudo apt-get install gcc'."; exit 1; }

demo: setup sandbox
	$(VENV)/bin/fullarc run recipes/laptop.toml

lint: setup
	$(VENV)/bin/ruff format --check src tests
	$(VENV)/bin/ruff check src tests
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

check: lint sandbox
	$(PY) -m pytest -m "not slow and not alone" -n 2 --dist worksteal < /dev/null
	$(PY) -m pytest -m "not slow and alone" < /dev/null

test: lint sandbox
	$(PY) -m pytest < /dev/null

bench: setup sandbox
	$(VENV)/bin/fullarc bench
