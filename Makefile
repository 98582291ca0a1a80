# make demo    train a GPT on real text over 8 simulated devices     (make demo ARGS=--resume continues it)
# make test    check every claim
# make check   ruff, pyright, import-linter
# The first use installs what it needs into .venv; nothing but Python 3.11 or later, pip and make is assumed.

PYTHON ?= python3
ARGS ?=

# The demo and the tests simulate their devices on the CPU. JAX_PLATFORMS= (empty) lets JAX choose.
export JAX_PLATFORMS ?= cpu
export TPU_SKIP_MDS_QUERY ?= 1

BIN := .venv/bin
comma := ,
TPU := $(if $(filter Linux,$(shell uname -s)),$(comma)tpu)  # its compiler exists for Linux; other systems skip its tests
DEV := dev$(strip $(TPU))

.DEFAULT_GOAL := help
.PHONY: help demo test check notebooks matrix chaos benchmarks clean

help:
	@sed -n '1,4s/^# //p' Makefile

demo: .venv/installed
	$(BIN)/python -m models.gpt $(ARGS)

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 $(ARGS)

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --cache-dir .cache/import_linter

# Executes every chapter and keeps its outputs.
notebooks: .venv/installed-dev
	$(BIN)/python notebooks/run.py

# Every strategy on every model and mesh, some 2,700 cases of some 8 CPU-seconds: three hours on two cores, for a night.
# In parts: ARGS=tests/contract/test_pipelines.py, or by model: ARGS="-k gpt". `make test` runs a covering array of it.
matrix: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 -m matrix $(ARGS)

# Runs of two processes killed 50 times each, and one that shrinks to three processes and grows again; every figure is
# printed. An hour on two busy cores; JAXPAR_KILLS=10 for fewer.
chaos: .venv/installed-dev
	$(BIN)/python -m pytest -m chaos -s $(ARGS) tests/chaos

benchmarks: .venv/installed-dev
	@for file in $(wildcard tests/benchmarks/*.py); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf .venv .cache build dist

.venv/installed: pyproject.toml | .venv/bin/python
	@echo "Installing jaxpar into .venv (a minute or two) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	@echo "Installing jaxpar and its tools into .venv (a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(DEV)]'
	@touch $@ .venv/installed

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "jaxpar needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1)."; \
		echo "Name another one: make demo PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
