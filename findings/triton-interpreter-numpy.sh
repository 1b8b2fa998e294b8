#!/bin/sh
# Triton 3.6.0's interpreter (TRITON_INTERPRET=1) cannot run a loop whose bound is known at run time with NumPy 2.4:
# it makes a Python number of an array of one axis, int(array([4])), which NumPy deprecated in 1.25 and refuses from
# 2.4.0 on. With NumPy 2.3.5 the same kernel gives 0 + 1 + 2 + 3 = 6; Triton 3.7.1 gives it with both.
#
# Output seen, on Python 3.11:
#   triton 3.6.0 numpy 2.3.5: 6
#   triton 3.6.0 numpy 2.4.6: InterpreterError: TypeError('only 0-dimensional arrays can be converted to Python scalars')
#   triton 3.7.1 numpy 2.4.6: 6
#
# Needs a network, or a mirror of PyPI, and 4 GB of disk for a while. Exits 1 if any of the three is another.
#     PYTHON=python3.11 sh findings/triton-interpreter-numpy.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/kernel.py" <<'KERNEL'
import os

os.environ["TRITON_INTERPRET"] = "1"
import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def total(count, numbers, out):
    found = 0
    for k in range(0, tl.load(count)):
        found += tl.load(numbers + k)
    tl.store(out, found)


out = torch.zeros(1, dtype=torch.int64)
try:
    total[(1,)](torch.tensor([4]), torch.arange(5), out)
    said = out.item()
except Exception as error:
    said = f"{type(error).__name__}: {error}"
print(f"triton {triton.__version__} numpy {numpy.__version__}: {said}")
KERNEL
"${PYTHON:-python3}" -m venv "$folder/venv"
pip="$folder/venv/bin/pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0
for versions in "3.6.0 2.3.5" "3.6.0 2.4.6" "3.7.1 2.4.6"; do
    set -- $versions
    $pip --no-deps --force-reinstall "triton==$1" "numpy==$2"
    "$folder/venv/bin/python" -W ignore "$folder/kernel.py"
done | tee "$folder/seen"
refusal="InterpreterError: TypeError('only 0-dimensional arrays can be converted to Python scalars')"
cat >"$folder/expected" <<EXPECTED
triton 3.6.0 numpy 2.3.5: 6
triton 3.6.0 numpy 2.4.6: $refusal
triton 3.7.1 numpy 2.4.6: 6
EXPECTED
cmp -s "$folder/seen" "$folder/expected" || { echo "this has changed" >&2; exit 1; }
