#!/bin/sh
# A program that compiles nothing loads all of torch.compile when it makes its first optimizer, or first calls an
# operator of torch.library.custom_op: 0.9 to 3 s of CPU and some 100 MB for each process, sympy among them. Both are
# decorated by torch._disable_dynamo, which imports torch._dynamo in order to keep the function from being compiled. An
# operator that is registered by torch.library.define and impl does not load it.
#
# Output seen, torch 2.13.0 (CPU), NumPy 2.4.2, CPython 3.11, Linux; whether torch._dynamo and sympy are loaded after:
#   import torch, an eager product: False False
#   an operator of define and impl: False False
#   an operator of custom_op: True True
#   torch.optim.SGD: True True
#
# Exits 1 if these lines are others. Installs torch and NumPy (CPU builds do) into a temporary folder.
#     PYTHON=python3.11 sh findings/torch_eager_loads_compiler.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.2
cat >"$folder/load.py" <<'LOAD'
import sys

import torch
from torch import Tensor

ones = torch.ones(2, 2)


def twice(x: Tensor) -> Tensor:
    return 2 * x


match sys.argv[1]:
    case "import torch, an eager product":
        ones @ ones
    case "an operator of define and impl":
        torch.library.define("finding::twice", "(Tensor x) -> Tensor")
        torch.library.impl("finding::twice", "default", twice)
        torch.ops.finding.twice(ones)
    case "an operator of custom_op":
        torch.library.custom_op("finding::twice", mutates_args=())(twice)(ones)
    case "torch.optim.SGD":
        torch.optim.SGD([torch.nn.Parameter(ones)], lr=0.1)
print(f"{sys.argv[1]}:", "torch._dynamo" in sys.modules, "sympy" in sys.modules)
LOAD
for what in "import torch, an eager product" "an operator of define and impl" "an operator of custom_op" "torch.optim.SGD"; do
    "$folder/venv/bin/python" "$folder/load.py" "$what"
done | tee "$folder/seen"
cat >"$folder/expected" <<'EXPECTED'
import torch, an eager product: False False
an operator of define and impl: False False
an operator of custom_op: True True
torch.optim.SGD: True True
EXPECTED
cmp -s "$folder/seen" "$folder/expected" || { echo "this has changed" >&2; exit 1; }
