"""Cleaning runs within this process, which start from a small model with fresh weights."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from fastbd import cli
from fastbd.base.dist import World
from fastbd.base.signals import Stopped
from fastbd.commands import clean
from fastbd.training.reuse import Kept
from fastbd.training.run import Run

WORLD = World(0, 1, torch.device("cpu"))
START = (
    "--data",
    "train.beton",
    "--plan",
    "train.poison.json",
    "--eval-data",
    "val.beton",
    "--templates",
    "demo",
    "--model",
    "tiny-rn",
    "--batch-size",
    "24",
    "--device",
    "cpu",
    "--epochs",
    "0",
)


def start(study: Path) -> None:
    """The run runs/start in the study's folder."""
    if not (study / "runs/start").exists():
        assert cli.main(["pretrain", *START, "--out", "runs/start"]) == 0


def cleaning(out: str | Path, *flags, kept: Kept | None = None) -> Run:
    """A run that cleans runs/start for two epochs of nine or ten steps; to be called in the study's folder."""
    given = ("--run", "runs/start", "--force", "--epochs", 2, "--batch-size", 24, "--device", "cpu", "--eval-every", 0,
             "--log-every", 1, "--lr", 3e-3, *flags, "--out", out)  # fmt: skip
    config = cli.parse("clean", list(map(str, given)))
    return Run(config, clean.task(config, WORLD), WORLD, kept)


def resumed_after(run: Run, step: int) -> Run:
    """The same run, stopped after a step and gone on with."""
    record = run.record

    def stop(row: dict) -> None:
        record(row)
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    run.record = stop
    with pytest.raises(Stopped):
        run.train()
    config = cli.parse("clean", ["--resume", str(run.folder.path)])
    return Run(config, clean.task(config, WORLD), WORLD)


def state(run: Run) -> dict:
    """Weights of the model and of the method, as they are saved."""
    saved = torch.load(run.folder.path / "ckpt_last.pt", weights_only=True)
    return {**saved["model"], **{f"method.{name}": value for name, value in saved["method"].items()}}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
