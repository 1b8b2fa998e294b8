# Everything runs in .venv, which `make install` makes. PYTHON picks the interpreter.
FITS := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
OUT ?= gpu-check

help:              ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

install: .venv/installed  ## make .venv and install fastbd into it

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(FITS)' || { echo "fastbd needs Python 3.11 or 3.12; name one: make PYTHON=/path/to/python3.12"; exit 2; }
	@echo "installing into .venv (PyTorch and DALI are large: a few minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: install      ## the study in small on the built-in demo set
	$(BIN)/python -m fastbd demo

test: install      ## run all tests
	$(BIN)/python -m pytest

bench: install     ## measure, and add the rows to bench/results
	$(BIN)/python -m bench

gpu-check:         ## test and measure on a machine with a GPU and no network; logs and rows go to OUT=
	@test -n "$(PYTHON)" || { echo "gpu-check needs Python 3.11 or 3.12; name one: make gpu-check PYTHON=/path/to/python3.12"; exit 2; }
	@$(PYTHON) -m bench.gpu_check $(OUT)

lint: install      ## check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:             ## remove .venv and caches; runs/ and data/ stay
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help install demo test bench gpu-check lint clean
.DEFAULT_GOAL := help
