"""Every kernel compiled for GPUs that need not be here: what the interpreter cannot see."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from tables import table

HERE = Path(__file__).parent
TABLE = HERE / f"aot-{triton.__version__}.csv"
LIMIT = {80: 166_912, 90: 232_448}  # bytes of shared memory a block can have


@pytest.fixture(scope="module", params=table(["80", "90"], "90"))
def arch(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def compiled(arch) -> list[dict]:
    command = [sys.executable, HERE / "aot.py", arch]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(io.StringIO(done.stdout)))


def test_kernels_fit(compiled):
    assert len(compiled) >= 30
    # weights as PyTorch makes them, Pillow's hue and autocontrast
    doubles = {"weights_kernel", "operate_kernel", "statistics_kernel", "tables_kernel"}
    for row in compiled:
        assert int(row["shared"]) <= LIMIT[int(row["arch"])] and (row["f64"] == "0" or row["kernel"] in doubles), row


def test_a_tap_takes_few_instructions(compiled):
    """For each pixel and weight; six are the loads and the products of three channels."""
    taps = [float(row["tap"]) for row in compiled if row["tap"]]
    assert len(taps) == 4 and max(taps) < 20


def test_matrix_units_are_used(compiled):
    products = {
        "sums_kernel",
        "gradient_kernel",
        "losses_kernel",
        "gradients_kernel",
        "attention_kernel",
        "attention_backward_kernel",
    }
    assert products <= {row["kernel"] for row in compiled}
    for row in compiled:
        if row["kernel"] in products and "stored" not in row["case"] and "ieee" not in row["case"]:
            # sixteen rows, as in the small kernels and those of text, are too few for the units that Hopper adds
            wide = row["arch"] == "90" and row["kernel"] in ("sums_kernel", "gradient_kernel")
            assert int(row["hgmma" if wide else "hmma"]) > 0, row


@pytest.mark.skipif(not TABLE.exists(), reason=f"there is no table of triton {triton.__version__}")
def test_registers_and_memory_are_those_of_the_table(compiled, arch):
    """A change here is a change of speed: look at it, then write the table anew (aot.py says how)."""
    with open(TABLE) as file:
        known = [row for row in csv.DictReader(file) if row["arch"] == arch]
    assert compiled == known
    assert all(row["spills"] == "0" for row in known)
