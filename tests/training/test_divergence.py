"""Losses and weights that are not finite, in real runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanings import START, WORLD, cleaning, start

from fastbd import cli
from fastbd.base.errors import Diverged, UserError
from fastbd.commands import clean
from fastbd.training import checkpoint, divergence
from fastbd.training.readback import NotFinite
from fastbd.training.run import Run


def diverged(run: Run) -> tuple[str, dict]:
    """What is said, and the file."""
    with pytest.raises(Diverged) as said:
        run.train()
    assert json.loads((run.folder.path / "result.json").read_text())["reason"] == "diverged"
    return str(said.value), json.loads((run.folder.path / "diverged.json").read_text())


def given(run: Run) -> list[np.ndarray]:
    """The rows of each step that it does."""
    steps, step = [], run.opened.step

    class Noting:
        def __call__(self, batch):
            steps.append(batch.ids.numpy().copy())
            return step(batch)

        def __getattr__(self, name):
            return getattr(step, name)

    run.opened.step = Noting()
    return steps


@pytest.mark.parametrize("flags", [(), ("--accumulate", 2, "--bn-group", 12)])
def test_a_run_that_diverges_names_the_step_and_its_rows_and_does_so_again_when_resumed(
    study, monkeypatch, tmp_path, flags
):
    monkeypatch.chdir(study)
    start(study)
    run = cleaning(tmp_path / "run", "--lr", 1e30, "--warmup", 0, "--log-every", 100, "--rows", 96, *flags)
    # Fed to step 7 alone, the third of the second epoch, which the first one's checkpoint precedes.
    run.opened.step.rates[:] = 1e-3
    run.opened.step.rates[5] = 1e30
    steps = given(run)
    said, file = diverged(run)
    assert file["step"] == 7 and file["epoch"] == 7 / run.opened.steps_per_epoch > 1
    assert file["rows"] == steps[6].tolist() and len(file["rows"]) == 24 and file["data"].endswith("train.beton")
    assert file["lr"] == pytest.approx(1e-3) and file["losses"]["loss"] == "nan" and "mmcl" in file["not_finite"]
    path = tmp_path / "run/diverged.json"
    assert said.startswith("the loss is nan at step 7 (not finite: mmcl")
    assert said.endswith(f"the run diverged; lower --lr (1e+30), or look at the batch's rows, in {path}.")

    config = cli.parse("clean", ["--resume", str(run.folder.path)])
    again = Run(config, clean.task(config, WORLD), WORLD)
    assert again.opened.done == run.opened.steps_per_epoch and not path.exists()
    again.opened.step.rates[:] = run.opened.step.rates
    assert diverged(again) == (said, file)


def test_before_an_update_the_learning_rate_is_not_to_blame(study, monkeypatch, tmp_path):
    """A factor that float32 cannot hold; also with a rate of 0, with which no update changes anything."""
    monkeypatch.chdir(study)
    start(study)
    for name, lr, weight in (("first", 1e-3, 1e39), ("still", 0, 1e39)):
        said, file = diverged(cleaning(tmp_path / name, "--lr", lr, "--mmcl-weight", weight))
        assert file["step"] == 1 and file["losses"]["loss"] == "inf" and file["not_finite"] == []
        assert math.isfinite(file["losses"]["mmcl"])
        assert "at step 1, and no update has changed the weights yet, which are finite: look at the factors" in said
        assert "--lr" not in said
    broken = NotFinite(7, {"loss": math.nan, "mmcl": math.nan, "scale": 1.0})
    assert "--lr" not in divergence.sentence(broken, moved=False, lr=0.0, path=Path("x"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_before_training(study, monkeypatch, tmp_path, capsys, value):
    monkeypatch.chdir(study)
    start(study)
    run = cleaning(tmp_path / "run")
    run.folder.release()
    path = tmp_path / "run/ckpt_last.pt"
    state = checkpoint.load(path)
    state["model"]["logit_scale"].fill_(value)
    state["model"]["visual.bn1.running_var"][0] = value
    checkpoint.save(path, state)
    config = cli.parse("clean", ["--resume", str(run.folder.path)])
    with pytest.raises(UserError, match=rf"^the weights of {path} are not finite \(.* and 1 more\)"):
        Run(config, clean.task(config, WORLD), WORLD)
    flags = [*START, "--weights", str(path), "--out", str(tmp_path / "next")]
    assert cli.main(["pretrain", *flags]) == 2 and not (tmp_path / "next").exists()
    flags = ["clean", "--run", str(run.folder.path), "--force", "--device", "cpu", "--out", str(tmp_path / "next")]
    assert cli.main(flags) == 2 and not (tmp_path / "next").exists()
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"error: {path} has NaN or infinite numbers in ")  # as --weights are read
    assert said[1].startswith(f"error: the weights of {path} are not finite (") and len(said) == 2


def test_whole_numbers_among_weights_are_left_alone():
    divergence.check_weights({"count": torch.tensor(3), "w": torch.ones(2)}, "x.pt")
    with pytest.raises(UserError, match=r"^the weights of x\.pt are not finite \(w\), so nothing can be trained"):
        divergence.check_weights({"count": torch.tensor(3), "w": torch.tensor([0, math.nan])}, "x.pt")
