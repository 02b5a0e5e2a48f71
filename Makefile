# Every target makes the environment it needs. Needs git, make and Python 3.11 or newer: `make PYTHON=python3.12 …`.

PYTHON ?= python3
ARGS ?=
UPGRADE ?=

export UV_PYTHON_DOWNLOADS = never
# Once per environment, instead of at the start of every process that a test runs, where Python may not write caches.
export UV_COMPILE_BYTECODE = 1

BIN := .venv/bin
LOCKS := requirements/uv.txt requirements/dev.txt
CHECKED := src $(wildcard examples typing_tests) scripts tests/support
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--custom-compile-command 'make lock' $(UPGRADE)

.PHONY: help demo example test lint format bench matrix check lock clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10

demo: .venv/ready  ## run dbscope demo; ARGS='--unprotected' goes to it
	@$(BIN)/dbscope demo $(ARGS)

example: .venv/ready  ## run examples/bank.py; ARGS='--async' goes to it
	@$(BIN)/python examples/bank.py $(ARGS)

test: .venv/ready  ## run the suite; ARGS='-k scope' picks tests
	$(BIN)/python -m pytest -n logical $(ARGS)

lint: .venv/ready  ## ruff, its formatter, and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy $(CHECKED)

format: .venv/ready  ## let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/ready  ## measure; ARGS go to the benchmarks
	@$(BIN)/python -m benchmarks $(ARGS)

matrix: .venv/ready  ## the suite on the oldest SQLAlchemy, without extras, and on every other Python found
	@$(BIN)/python scripts/matrix.py

check: lint test matrix  ## all of it, as CI does

# The order matters: each set is held to the versions of the one before. UPGRADE=--upgrade takes new versions.
lock: .venv/uv  ## recompile requirements/*.txt; UPGRADE=--upgrade moves to new versions
	cd requirements && for set in uv sqlalchemy-oldest sqlalchemy-newest arq; do \
		../$(COMPILE) --no-deps $$set.in --output-file $$set.txt || exit 1; done
	cd requirements && ../$(COMPILE) dev.in --output-file dev.txt
	cd requirements && ../$(COMPILE) --constraints dev.txt minimal.in --output-file minimal.txt

clean:  ## remove the environments and caches
	rm -rf .venv* .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/uv: requirements/uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'dbscope needs Python 3.11 or newer: say `make PYTHON=python3.12`, for example.'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@touch $@

.venv/ready: .venv/uv $(LOCKS) pyproject.toml
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes $(LOCKS)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
