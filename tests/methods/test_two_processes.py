"""Methods that look at all pairs before an epoch, or keep captions of all processes: two processes are like one."""

from __future__ import annotations

import json

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


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_like_one(name, study, fastbd, fastbd_process):
    """tiny-vit has no batch norm; a large eps makes Adam's steps follow the gradient."""
    arguments = (*SMALL, "--robust", name, *CASES[name])
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    fastbd(*arguments, "--out", f"{name}/one", cwd=study)
    fastbd_process(*arguments, "--out", f"{name}/two", cwd=study, launcher=launcher)
    one, two = (torch.load(study / name / x / "ckpt_last.pt", weights_only=True) for x in ("one", "two"))
    assert max(float((one["model"][k] - two["model"][k]).abs().max()) for k in one["model"]) < 1e-5
    assert all(torch.allclose(one["method"][k], two["method"][k], atol=1e-4) for k in one["method"])
    losses = [
        [json.loads(line)["loss"] for line in (study / name / x / "log.jsonl").read_text().splitlines()]
        for x in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
