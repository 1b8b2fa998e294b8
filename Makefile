# Everything runs in .venv, which `make install` makes. PYTHON picks the interpreter.
FITS := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
CALL ?= 1
OUT ?= gpu-check/$(CALL)
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
FFCV_NEEDS := g++ libopencv-imgproc-dev libturbojpeg0-dev pkg-config

help:              ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

install: .venv/installed  ## make .venv and install fastbd into it

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(FITS)' || { echo "fastbd needs Python 3.11 or 3.12; name one: make PYTHON=/path/to/python3.12"; exit 2; }
	@echo "installing into .venv (PyTorch and DALI are large: a few minutes)"
	$(PYTHON) -m venv .venv
	$(PIP) --editable ".[dev]"
	@touch $@

# FFCV's build asks for all of OpenCV (700 MB); the two files in $$dir show it the two parts that it uses. What it imports
# goes first, and not by its own list: that has opencv-python, which needs the libraries of a screen.
ffcv: install      ## add FFCV for --decode ffcv, and the system libraries it is built with (Debian, Ubuntu)
	@command -v apt-get >/dev/null || { echo "make ffcv needs apt-get; elsewhere install OpenCV 4, TurboJPEG, both with headers, and pkg-config, then: $(BIN)/pip install -c constraints.txt -e '.[ffcv]'"; exit 2; }
	@dpkg --status $(FFCV_NEEDS) >/dev/null 2>&1 || { echo "installing $(FFCV_NEEDS)" && \
		$(SUDO) apt-get update -qq && $(SUDO) apt-get install -qq --yes --no-install-recommends $(FFCV_NEEDS); } || \
		{ echo "make ffcv could not install its system libraries: let the administrator install $(FFCV_NEEDS)"; exit 2; }
	$(PIP) numba opencv-python-headless tqdm
	@dir=$$(mktemp -d) && trap 'rm -r "$$dir"' EXIT && mkdir $$dir/opencv2 && \
		printf '#include <opencv2/%s.hpp>\n' core imgproc >$$dir/opencv2/opencv.hpp && \
		printf '%s\n' 'Name: opencv4' 'Description: core and imgproc' 'Version: 4' \
			'Cflags: -I$${pcfiledir} -I/usr/include/opencv4' 'Libs: -lopencv_imgproc -lopencv_core' >$$dir/opencv4.pc && \
		PKG_CONFIG_PATH=$$dir $(PIP) --no-deps ffcv
	@$(BIN)/python -c "import ffcv" && echo "FFCV is installed: --decode ffcv uses it"

writers:           ## make .venv-writers with img2dataset and webdataset, for the tests that read what they write
	@test -n "$(PYTHON)" || { echo "make writers needs Python 3.11 or 3.12; name one: make writers PYTHON=/path/to/python3.12"; exit 2; }
	@test -x .venv-writers/bin/img2dataset || { $(PYTHON) -m venv .venv-writers && \
		.venv-writers/bin/pip install --quiet --disable-pip-version-check --requirement tests/data/sources/writers.txt; }

demo: install      ## the study in small on the built-in demo set
	$(BIN)/python -m fastbd demo

study: install     ## the demo study: two pre-trainings, four ways of cleaning, several rates, a report
	$(BIN)/python -m fastbd sweep --study demo

test: install      ## run all tests
	$(BIN)/python -m pytest

bench: install     ## measure, and add the rows to bench/results
	$(BIN)/python -m bench

gpu-check:         ## CALL=1 the step, CALL=2 the rest: test and measure on a GPU without network; logs and rows go to OUT=
	@test -n "$(PYTHON)" || { echo "gpu-check needs Python 3.11 or 3.12; name one: make gpu-check PYTHON=/path/to/python3.12"; exit 2; }
	@"$(PYTHON)" -m bench.gpu_check "$(CALL)" "$(OUT)"

lint: install      ## check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:             ## remove .venv and caches; runs/ and data/ stay
	rm -rf .venv .venv-writers .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help install ffcv writers demo study test bench gpu-check lint clean
.DEFAULT_GOAL := help
