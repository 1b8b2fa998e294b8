"""Global negatives: processes with a share of the rows each, against one process with all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.mark.parametrize("size", [2, 3])
def test_processes_give_what_one_gives(size):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size),
                           "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER], env=shared | {"RANK": str(rank)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), "\n".join(outputs)
    losses = [[line for line in output.splitlines() if " loss " in line] for output in outputs]
    assert all("done" in output for output in outputs) and len(losses[0]) > 3, outputs
    assert all(lines == losses[0] for lines in losses), "the loss differs between processes"
