"""Methods that look at all pairs before an epoch, or keep captions of all processes: two processes are like one."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbd.data.beton import Beton
from fastbd.data.rows import write_rows

# tiny-vit has no batch norm; a large eps makes Adam's steps follow the gradient.
COMMON = (
    "--rows-file", "few.rows", "--batch-size", 24, "--warmup", 2, "--eps", 0.01, "--log-every", 1, "--resident", "none",
    "--device", "cpu",
)  # fmt: skip
FRESH = ("pretrain", "--data", "train.beton", "--plan", "train.poison.json", "--model", "tiny-vit", *COMMON, "--epochs")
CASES = {
    "roclip": (*FRESH, 3, "--robust", "roclip", "--roclip-pool", 30),
    "safeclip": (*FRESH, 3, "--robust", "safeclip", "--objective", "mmcl_ssl", "--warm-epochs", 1),
    "progressive": (*FRESH, 3, "--robust", "progressive", "--remove-epochs", 1, "--remove-fraction", 0.2),
    "deep_cluster": (
        "clean", "--run", "two-processes", *COMMON, "--epochs", 2, "--method", "deep_cluster", "--clusters", 12,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(study, fastbd, together) -> Path:
    """The study's folder with NAME/one and NAME/two, of one process and of two; those start once for all names."""
    write_rows(study / "few.rows", np.arange(96), Beton(study / "train.beton").fingerprint, "few are enough")
    fastbd(*FRESH, 0, "--out", "two-processes", cwd=study)
    for name, words in CASES.items():
        fastbd(*words, "--out", f"{name}/one", cwd=study)
    lines = [shlex.join(map(str, (*words, "--out", f"{name}/two"))) for name, words in CASES.items()]
    together(Path(__file__).parents[1] / "commands_worker.py", 2, *lines, cwd=study)
    return study


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_like_one(name, trained):
    one, two = (torch.load(trained / name / x / "ckpt_last.pt", weights_only=True) for x in ("one", "two"))
    assert max(float((one["model"][k] - two["model"][k]).abs().max()) for k in one["model"]) < 1e-5
    assert one["method"] and all(torch.allclose(one["method"][k], two["method"][k], atol=1e-4) for k in one["method"])
    logs = [
        [json.loads(line) for line in (trained / name / x / "log.jsonl").read_text().splitlines()]
        for x in ("one", "two")
    ]
    assert len(logs[0]) == one["step"] > 0
    for part in ("loss", *(["cluster"] if name == "deep_cluster" else [])):
        assert [row[part] for row in logs[0]] == pytest.approx([row[part] for row in logs[1]], rel=1e-4)
