# The two commands of the README are `make demo` and `make test`; both build .venv by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PAGES := $(wildcard man/*.[1-8])

.PHONY: help docs demo test test-debian machine lint types man bench packages wheel test-compiled bench-compiled clean

help:
	@echo 'make demo          a web server that only dials out, reachable through a tunnel; Ctrl-C ends it'
	@echo 'make demo ONCE=1   the same, fetches the page once and exits'
	@echo 'make test          the test suite, a quarter of an hour on two cores'
	@echo "make test ARGS='tests/cli -x'   some of it, with arguments for pytest"
	@echo 'make test-debian   both commands in bare Debian 12, 13 and testing; needs root, debootstrap and half an hour'
	@echo "make test-debian SUITES=testing ARGS=tests/ssh   one of them, some of the tests"
	@echo 'make lint types man   what CI checks besides'
	@echo 'make machine       the units under a real systemd, in an emulated machine; needs root and half an hour'
	@echo "make machine ARGS=ssh | ARGS='--from drain' | ARGS=--list   some of its steps, those from one on, which there are"
	@echo 'make bench         our speed beside the peers found on PATH'
	@echo 'make wheel         dist/tunneld-...whl with a compiled data plane: the same files, faster'
	@echo 'make packages      what a release has: wheels, Debian packages, the agent as one file, a container image; each is'
	@echo '                   tried in a bare system. Needs root, debootstrap, buildah and 20 minutes'
	@echo "make packages TARGETS='wheel agent'   some of it, not tried"
	@echo 'make test-compiled bench-compiled   the tests of that, and the benchmark with both'
	@echo 'make docs          build/docs: the reference of the Python library'
	@echo 'make clean         remove what the others made'

demo: $(STAMP)
	@$(BIN)/python demo/demo.py $(if $(ONCE),--once)

test: $(STAMP)
	@$(if $(ARGS),:,echo 'running the test suite: a quarter of an hour on two cores; tests of programs that are not installed are skipped')
	$(BIN)/python -m pytest $(ARGS)

test-debian:
	tests/debian/run $(SUITES) $(if $(ARGS),-- $(ARGS))

machine: $(STAMP)
	tests/machine/boot $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)
	$(BIN)/mypy

# What is left out is about other pages, which this machine may not have installed, and says nothing of ours.
man:
	! mandoc -T lint -W style $(PAGES) 2>&1 | grep -v -e 'referenced manual not found' -e 'outdated mandoc.db'

docs: $(STAMP)
	@$(BIN)/python -c 'import pdoc' 2>/dev/null || { echo 'installing pdoc into $(VENV) ...'; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'; }
	$(BIN)/python -m pdoc --no-show-source --output-directory build/docs tunneld '!tunneld.'
	@echo 'build/docs/tunneld.html'

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

packages:
	packaging/build $(TARGETS)
	$(if $(TARGETS),,packaging/check)

# Compiled from the same files, see setup.py. What it is to be tested with is found beside the checkout, not in it: there
# Python would find the files and not what was made of them.
COMPILED := .compiled
COMPILED_PYTHON := PYTHONSAFEPATH=1 PYTHONPATH='$(CURDIR)/$(COMPILED)/beside' $(COMPILED)/bin/python
COMPILED_TESTS := $(addprefix tests/,wire engine mux backends sites tunnel directory agent)

wheel: $(STAMP)
	@command -v $(CC) >/dev/null || { echo 'no C compiler: on Debian and Ubuntu run: apt install gcc python3-dev' >&2; exit 1; }
	@$(BIN)/python -c 'import os.path, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
	    || { echo 'no headers of Python: on Debian and Ubuntu run: apt install python3-dev' >&2; exit 1; }
	@rm -rf build dist
	@echo 'compiling the data plane, about two minutes ...'
	@TUNNELD_COMPILE=1 $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	    --wheel-dir dist .
	@ls dist/*.whl

$(COMPILED)/.installed: pyproject.toml setup.py $(shell find tunneld -name '*.py')
	@$(MAKE) --no-print-directory wheel
	@rm -rf $(COMPILED) && $(BIN)/python -m venv $(COMPILED)
	@$(COMPILED)/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls dist/*.whl)[acme,dns,dev]"
	@mkdir $(COMPILED)/beside
	@for part in tests benchmarks; do ln -s ../../$$part $(COMPILED)/beside/$$part; done
	@touch $@

test-compiled: $(COMPILED)/.installed
	$(COMPILED_PYTHON) -m pytest -o pythonpath= -p no:cacheprovider $(or $(ARGS),$(COMPILED_TESTS))

bench-compiled: $(COMPILED)/.installed
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) $(COMPILED) dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Without Debian's python3-venv, Python makes an environment that has no pip.
$(STAMP): pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	    || { echo '$(PYTHON) is too old or missing: Python 3.11 or newer is needed (make PYTHON=python3.12 ...)' >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	    || { rm -rf $(VENV); echo 'could not make $(VENV): on Debian and Ubuntu run: apt install python3-venv' >&2; exit 1; }
	@echo 'installing tunneld and its dependencies into $(VENV), a minute or less ...'
	@$(BIN)/python -u -m pip install --disable-pip-version-check --progress-bar off --editable '.[acme,dns,dev]' >$(VENV)/install.log 2>&1 & \
	    pip=$$!; seconds=0; trap 'kill $$pip; exit 130' INT TERM; while kill -0 $$pip 2>/dev/null; do \
	        sleep 1; seconds=$$((seconds + 1)); \
	        [ $$((seconds % 5)) != 0 ] || echo "  $$seconds s: $$(tail -n 1 $(VENV)/install.log | cut -c 1-90)"; \
	    done; \
	    wait $$pip || { cat $(VENV)/install.log >&2; \
	        echo 'could not install: see above; a package index must be reachable (PIP_INDEX_URL, https_proxy)' >&2; exit 1; }
	@touch $@
