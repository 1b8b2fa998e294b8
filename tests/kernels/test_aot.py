"""Every kernel compiled for GPUs that need not be here: what the interpreter cannot see."""

from __future__ import annotations

import csv
import functools
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import triton

HERE = Path(__file__).parent
TABLE = HERE / f"aot-{triton.__version__}.csv"
LIMIT = {"80": 166_912, "90": 232_448}  # bytes of shared memory a block can have
has_table = pytest.mark.skipif(not TABLE.exists(), reason=f"there is no table of triton {triton.__version__}")


@functools.cache
def compiled() -> list[dict]:
    """What aot.py prints: two minutes of work, which the tests share."""
    command = [sys.executable, HERE / "aot.py", *LIMIT]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(done.stdout.splitlines()))


def known() -> list[dict]:
    with open(TABLE) as file:
        return list(csv.DictReader(file))


@has_table
def test_kernels_take_what_they_are_compiled_with():
    """Nothing is compiled here: a case that fits no kernel, or that the table has not, is found in no time."""
    cases = runpy.run_path(str(HERE / "aot.py"))["cases"]
    found = [(kernel, name, arch, arguments) for arch in LIMIT for kernel, name, _, arguments, *_ in cases(int(arch))]
    assert [(kernel.__name__, name, arch) for kernel, name, arch, _ in found] == [
        (row["kernel"], row["case"], row["arch"]) for row in known()
    ]
    for kernel, name, _, arguments in found:
        constants = {name for name in kernel.arg_names if kernel.fn.__annotations__.get(name) == "tl.constexpr"}
        assert constants <= arguments.keys() <= {*kernel.arg_names, "num_warps", "num_stages"}, (kernel.__name__, name)


@pytest.mark.full
def test_kernels_fit():
    # weights as PyTorch makes them, Pillow's hue and autocontrast
    doubles = {"weights_kernel", "operate_kernel", "statistics_kernel", "tables_kernel"}
    for arch, limit in LIMIT.items():
        rows = [row for row in compiled() if row["arch"] == arch]
        assert len(rows) >= 30
        for row in rows:
            assert int(row["shared"]) <= limit and (row["f64"] == "0" or row["kernel"] in doubles), row


@pytest.mark.full
def test_a_tap_takes_few_instructions():
    """For each pixel and weight; six are the loads and the products of three channels."""
    taps = [float(row["tap"]) for row in compiled() if row["tap"]]
    assert len(taps) == 4 * len(LIMIT) and max(taps) < 20


@pytest.mark.full
def test_matrix_units_are_used():
    products = {
        "sums_kernel",
        "gradient_kernel",
        "losses_kernel",
        "gradients_kernel",
        "attention_kernel",
        "attention_backward_kernel",
    }
    assert products <= {row["kernel"] for row in compiled()}
    for row in compiled():
        if row["kernel"] in products and "stored" not in row["case"] and "ieee" not in row["case"]:
            # sixteen rows, as in the small kernels and those of text, are too few for the units that Hopper adds
            wide = row["arch"] == "90" and row["kernel"] in ("sums_kernel", "gradient_kernel")
            assert int(row["wgmma" if wide else "mma"]) > 0, row


@has_table
@pytest.mark.full
def test_registers_and_memory_are_those_of_the_table():
    """A change here is a change of speed: look at it, then write the table anew (aot.py says how)."""
    assert all(row["stack"] == "0" for row in known()), "registers are spilled"
    assert compiled() == known()
