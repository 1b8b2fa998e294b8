"""Methods with a state of their own, through the real command line: stopped after half the epochs and resumed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tables import table

from fastbd.cli import main
from fastbd.training.checkpoint import path_of

SMALL = (
    "--data",
    "train.beton",
    "--plan",
    "train.poison.json",
    "--model",
    "tiny-rn",
    "--templates",
    "demo",
)
COMMON = ("--batch-size", 60, "--warmup", 2, "--eval-every", 0, "--log-every", 1, "--device", "cpu")
TWO = (*COMMON, "--epochs", 2, "--save-every", 1)
CASES = {
    "roclip": ("pretrain", *SMALL, *TWO, "--robust", "roclip", "--roclip-period", 1, "--roclip-pool", 50),
    "safeclip": ("pretrain", *SMALL, *TWO, "--robust", "safeclip", "--objective", "mmcl_ssl", "--warm-epochs", 0),
    "progressive": (
        "pretrain",
        *SMALL,
        *TWO,
        "--robust",
        "progressive",
        "--remove-epochs",
        1,
        "--remove-fraction",
        0.2,
    ),
    "unlearn": ("clean", "--run", "start", *TWO, "--method", "unlearn", "--flagged-by", "kept.rows", "--force"),
}


def run(*arguments) -> None:
    assert main([*map(str, arguments)]) == 0


@pytest.fixture(scope="module")
def place(study, tmp_path_factory):
    """A folder with the study's data, a run `start` to be cleaned, and a row list without its 12 worst pairs."""
    folder = tmp_path_factory.mktemp("methods")
    for name in ("train.beton", "train.poison.json"):
        (folder / name).symlink_to(study / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("pretrain", *SMALL, *COMMON, "--epochs", 1, "--out", "start")
        run("detect", "--run", "start", "--drop", 0.05, "--out", "kept.rows", "--device", "cpu")
    return folder


@pytest.mark.parametrize("name", table(CASES, "safeclip", "unlearn"))
def test_half_and_resumed_is_the_whole(name, place, monkeypatch):
    monkeypatch.chdir(place)
    run(*CASES[name], "--out", name)
    halves = place / f"{name}-halves"
    shutil.copytree(place / name, halves)
    shutil.copyfile(path_of(halves, "1"), path_of(halves, "last"))
    (place / "kept.rows").rename(place / "gone.rows")  # a run has its own
    run(CASES[name][0], "--resume", halves)
    (place / "gone.rows").rename(place / "kept.rows")
    first, second = (torch.load(path_of(folder, "last"), weights_only=True) for folder in (place / name, halves))
    assert first["step"] == second["step"] == (8 if name != "unlearn" else 6)
    for part in ("model", "method"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(first[part][key], second[part][key]) for key in first[part])
    assert first["method"]
    # The report is to tell the model from one that was pre-trained as usual.
    about = json.loads((place / name / "config.json").read_text())
    objective = "mmcl_ssl" if name == "safeclip" else "mmcl"
    assert about["pretrain_objective"] == (objective if name == "unlearn" else f"{objective}+{name}")
