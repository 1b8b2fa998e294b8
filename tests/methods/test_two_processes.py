"""Methods that look at all pairs before an epoch, or keep captions of all processes: two processes are like one."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SMALL = (
    "pretrain", "--data", "train.beton", "--plan", "train.poison.json", "--model", "tiny-vit", "--batch-size", 24,
    "--warmup", 5, "--epochs", 3, "--eps", 0.01, "--resident", "none", "--device", "cpu",
)  # fmt: skip
CASES = {
    "roclip": ("--roclip-pool", 30),
    "safeclip": ("--objective", "mmcl_ssl", "--warm-epochs", 1),
    "progressive": ("--remove-epochs", 1, "--remove-fraction", 0.2),
}


WORKER = Path(__file__).parents[1] / "commands_worker.py"


@pytest.fixture(scope="module")
def trained(study, fastbd) -> Path:
    """The study's folder with NAME/one and NAME/two, of one process and of two; those start once for all names."""
    lines = {name: (*SMALL, "--robust", name, *flags, "--out") for name, flags in CASES.items()}
    for name, words in lines.items():
        fastbd(*words, f"{name}/one", cwd=study)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", WORKER]
    command += [shlex.join([*map(str, words), f"{name}/two"]) for name, words in lines.items()]
    done = subprocess.run(command, cwd=study, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return study


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_like_one(name, trained):
    """tiny-vit has no batch norm; a large eps makes Adam's steps follow the gradient."""
    one, two = (torch.load(trained / name / x / "ckpt_last.pt", weights_only=True) for x in ("one", "two"))
    assert max(float((one["model"][k] - two["model"][k]).abs().max()) for k in one["model"]) < 1e-5
    assert all(torch.allclose(one["method"][k], two["method"][k], atol=1e-4) for k in one["method"])
    losses = [
        [json.loads(line)["loss"] for line in (trained / name / x / "log.jsonl").read_text().splitlines()]
        for x in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
