#!/bin/sh
# torch.save of torch 2.13.0, given a file that is open, turns the OSError of a full disk into a RuntimeError: `except
# OSError` around it catches nothing, and the message speaks of positions. The OSError is to be had from __context__,
# with its errno. The file's own write, in the same place, raises the OSError itself.
#
# A limit to the size of the process's files (RLIMIT_FSIZE, whose errno is EFBIG) stands for the full disk.
# Output seen, on Python 3.11:
#   torch 2.13.0: torch.save RuntimeError of OSError EFBIG, write OSError EFBIG
#
# Needs a network, or a mirror of PyPI. Exits 1 if the line is another.
#     PYTHON=python3.11 sh findings/torch_save_full_disk.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/full.py" <<'FULL'
import errno
import resource
import signal
import sys

import torch

state = {"weight": torch.ones(100_000)}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def told(action):
    with open(sys.argv[1] + "/state.pt", "wb", buffering=0) as file:
        try:
            action(file)
        except Exception as error:
            inner = error
            while inner is not None and not isinstance(inner, OSError):
                inner = inner.__context__
            code = errno.errorcode[inner.errno] if inner else "none"
            return f"{type(error).__name__}{'' if inner is error else ' of OSError'} {code}"
    return "no error"


def fill(file):
    for _ in range(9):
        file.write(bytes(50_000))


print(f"torch {torch.__version__.partition('+')[0]}: torch.save {told(lambda file: torch.save(state, file))}, write {told(fill)}")
FULL
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore "$folder/full.py" "$folder" | tee "$folder/seen"
cat >"$folder/expected" <<'EXPECTED'
torch 2.13.0: torch.save RuntimeError of OSError EFBIG, write OSError EFBIG
EXPECTED
cmp -s "$folder/seen" "$folder/expected" || { echo "this has changed" >&2; exit 1; }
