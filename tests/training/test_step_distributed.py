"""Several processes: averaged gradients, shared statistics, parts, an idle tower, compiled towers.

The published PAR program calls the towers inside DDP's wrapper directly, so that its gradients are never averaged.
"""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.full
def test_two_processes_step_like_one(together):
    for output in together(Path(__file__).with_name("step_worker.py"), 2):
        assert output.count(" done") == 7, output
