#!/bin/sh
# An exception of any kind that is raised while `import torch` loads NumPy is dropped, Ctrl-C's KeyboardInterrupt too:
# torch takes it for NumPy not being installed, says at most a UserWarning, and the program goes on as if nobody had
# pressed a key. torch loads NumPy from C++ where nothing has loaded it before, so that programs whose first import is
# torch are affected for the 0.1 to 1 s that this takes.
#
# Output seen, torch 2.13.0 (CPU), NumPy 2.4.2, CPython 3.11, Linux:
#   torch first: import torch went on after the KeyboardInterrupt
#   numpy first: KeyboardInterrupt
#
# Exits 1 if these lines are others. Installs torch and NumPy (CPU builds do) into a temporary folder.
#     PYTHON=python3.11 sh findings/torch_ctrl_c_while_numpy_loads.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.2
cat >"$folder/press.py" <<'PRESS'
import signal
import sys
import warnings
from importlib.abc import MetaPathFinder

warnings.simplefilter("ignore")


class Press(MetaPathFinder):
    """Press Ctrl-C once, when NumPy begins to load."""

    def find_spec(self, name, *_):
        if name == "numpy._core":
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)


sys.meta_path.insert(0, Press())
try:
    if sys.argv[1] == "numpy":
        import numpy
    import torch
except KeyboardInterrupt:
    print(sys.argv[1], "first: KeyboardInterrupt")
    sys.exit()
print(sys.argv[1], "first: import torch went on after the KeyboardInterrupt")
PRESS
for first in torch numpy; do "$folder/venv/bin/python" "$folder/press.py" "$first"; done | tee "$folder/seen"
cat >"$folder/expected" <<'EXPECTED'
torch first: import torch went on after the KeyboardInterrupt
numpy first: KeyboardInterrupt
EXPECTED
cmp -s "$folder/seen" "$folder/expected" || { echo "this has changed" >&2; exit 1; }
