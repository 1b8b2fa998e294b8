# Everything runs in .venv, which `make install` makes. PYTHON picks the interpreter (3.11 or 3.12).
PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
BIN := .venv/bin

help:              ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

install: .venv/installed  ## make .venv and install fastbd into it

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit("fastbd needs Python 3.11 or 3.12; this is %d.%d. Try: make PYTHON=python3.12" % v)'
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

lint: install      ## check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:             ## remove .venv and caches; runs/ and data/ stay
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help install demo test bench lint clean
.DEFAULT_GOAL := help
