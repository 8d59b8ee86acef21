# The two commands of the README are `make demo` and `make test`; both build .venv by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PAGES := $(wildcard man/*.[1-8])

.PHONY: help demo test lint types man bench clean

help:
	@echo 'make demo          a web server that only dials out, reachable through a tunnel; Ctrl-C ends it'
	@echo 'make demo ONCE=1   the same, fetches the page once and exits'
	@echo 'make test          the test suite'
	@echo 'make lint types man   what CI checks besides'
	@echo 'make bench         our speed beside the peers found on PATH'
	@echo 'make clean         remove what the others made'

demo: $(STAMP)
	@$(BIN)/python demo/demo.py $(if $(ONCE),--once)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)
	$(BIN)/mypy

# What is left out is about other pages, which this machine may not have installed, and says nothing of ours.
man:
	! mandoc -T lint -W style $(PAGES) 2>&1 | grep -v -e 'referenced manual not found' -e 'outdated mandoc.db'

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo '$(PYTHON) is too old or missing: Python 3.11 or newer is needed (make PYTHON=python3.12 ...)' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null \
	    || { rm -rf $(VENV); echo 'could not make $(VENV): on Debian and Ubuntu run: apt install python3-venv' >&2; exit 1; }
	@echo 'installing tunneld and its dependencies into $(VENV) ...'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
