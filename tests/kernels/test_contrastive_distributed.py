"""Global negatives: processes with a share of the rows each, against one process with all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tables import table

WORKER = Path(__file__).with_name("distributed_worker.py")
LOSSES, COMPILED = "losses sigmoid", "losses sigmoid compiled"


@pytest.mark.parametrize("size, checks", table([(2, LOSSES), (3, COMPILED)], (2, LOSSES)))
def test_processes_give_what_one_gives(size, checks, together):
    outputs = together(WORKER, size, *checks.split())
    losses = [[line for line in output.splitlines() if " loss " in line] for output in outputs]
    assert all("done" in output for output in outputs) and len(losses[0]) > 3, outputs
    assert all(lines == losses[0] for lines in losses), "the loss differs between processes"
