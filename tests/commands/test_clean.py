from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from cleanings import cleaning, start

from fastbd import cli
from fastbd.base.errors import UserError
from fastbd.commands.clean import cleaning_rows
from fastbd.data.beton import Beton
from fastbd.poison.plan import Plan


def test_the_cleaning_set_is_drawn_and_others_are_held_out(study):
    beton, plan = Beton(study / "train.beton"), Plan.load(study / "train.poison.json")
    everything = np.arange(len(beton))
    rows, held_out = cleaning_rows(beton, everything, plan, 100, seed=3, left=0, watch=512)
    assert len(set(rows)) == 100 and (np.diff(rows) > 0).all() and (np.diff(held_out) > 0).all()
    assert not set(rows) & set(held_out) and not set(plan.rows) & {*rows, *held_out}
    assert len(held_out) == 240 - 24 - 100
    for watch in (0, 20):
        same, fewer = cleaning_rows(beton, everything, plan, 100, seed=3, left=0, watch=watch)
        assert len(fewer) == watch and set(fewer) <= set(held_out) and same.tolist() == rows.tolist()
    assert cleaning_rows(beton, everything, plan, 100, seed=3, left=0, watch=512)[0].tolist() == rows.tolist()
    assert cleaning_rows(beton, everything, plan, 100, seed=4, left=0, watch=512)[0].tolist() != rows.tolist()
    assert len(cleaning_rows(beton, everything, plan, 1000, seed=3, left=0, watch=512)[1]) == 0


def test_poison_that_was_overlooked_is_in_the_cleaning_set(study):
    beton, plan = Beton(study / "train.beton"), Plan.load(study / "train.poison.json")
    everything = np.arange(len(beton))
    rows, held_out = cleaning_rows(beton, everything, plan, 100, 3, left=5, watch=512)
    assert len(rows) == 100 and len(set(rows) & set(plan.rows)) == 5 and not set(held_out) & set(plan.rows)
    with pytest.raises(UserError, match="poison-left 25 is more than the 24 poisoned pairs"):
        cleaning_rows(beton, everything, plan, 100, 3, left=25, watch=512)


def test_what_is_left_is_stamped_and_what_rebounds_is_measured(study, fastbd, tmp_path):
    data = ("--data", study / "train.beton", "--plan", study / "train.poison.json", "--eval-data", study / "val.beton")
    fastbd("pretrain", *data, "--model", "tiny-rn", "--epochs", 0, "--batch-size", 24, "--out", "start", cwd=tmp_path)
    flags = ("--epochs", 1, "--batch-size", 24, "--rows", 96, "--eval-every", "1/2epoch", "--eval-between", 20)
    clean = ("clean", "--run", "start", "--force", *flags)
    said = fastbd(*clean, "--poison-left", 3, "--rebound", 4, "--out", "cleaned", cwd=tmp_path).stdout
    assert "96 pairs of" in said and "all there are; --rows" not in said and "(3 poisoned)" in said
    rows = [json.loads(line) for line in (tmp_path / "cleaned" / "metrics.jsonl").read_text().splitlines()]
    shown = [(row["step"], row["n"], row.get("subset", False)) for row in rows]
    assert shown == [(0, 60, False), (2, 20, True), (4, 60, False)]
    assert rows[0]["drift_image"] == rows[0]["drift_text"] == 0 < min(rows[1]["drift_image"], rows[2]["drift_text"])
    result = json.loads((tmp_path / "cleaned" / "result.json").read_text())
    assert result["reason"] == "finished" and result["rebound"]["rebound"]["steps"][-1] == 4
    for more, said in (
        (("--keep-optimizer", "--method", "deep_cluster", "--clusters", 4), "one has a head of its own"),
        (("--rebound", 2, "--bn-group", 24), "--rebound takes 16 pairs a step: give a --bn-group that divides it"),
    ):
        assert said in " ".join(fastbd(*clean, *more, "--out", "refused", cwd=tmp_path, code=2).stderr.split())
        assert not (tmp_path / "refused").exists()
    fewer = fastbd(*clean, "--rows", 10_000, "--watch", 0, "--epochs", 0, "--out", "fewer", cwd=tmp_path).stdout
    assert "216 pairs (all there are; --rows 10,000) of" in fewer
    assert "val_loss" not in (tmp_path / "fewer" / "metrics.jsonl").read_text()
    refused = fastbd(*clean, "--data", study / "val.beton", "--poison-left", 3, cwd=tmp_path, code=2).stderr
    assert "--poison-left takes pairs that the run's plan poisons" in refused


def test_a_rebound_that_diverges_leaves_the_cleaning_finished(study, monkeypatch, tmp_path):
    monkeypatch.chdir(study)
    start(study)
    monkeypatch.setattr("fastbd.training.rebound.LR", 1e30)
    run = cleaning(tmp_path / "run", "--epochs", 1, "--rebound", 4)
    assert run.train() == "finished"
    result = json.loads((run.folder.path / "result.json").read_text())
    assert result["reason"] == "finished" and "rebound" not in result


def test_a_model_whose_training_is_not_at_its_end_is_cleaned_on_request_only(study, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(study)
    start(study)
    stopped = shutil.copytree("runs/start", tmp_path / "stopped")
    (stopped / "result.json").unlink()
    shutil.copyfile(stopped / "ckpt_last.pt", stopped / "ckpt_epoch_001.pt")
    clean = ["clean", "--run", str(stopped), "--landed", "0", "--epochs", "0", "--batch-size", "24", "--device", "cpu"]
    assert cli.main([*clean, "--out", str(tmp_path / "refused")]) == 2
    assert capsys.readouterr().err == (
        f"error: {stopped} is not at its end (step 0, no result.json): go on with it by python -m fastbd pretrain "
        f"--resume {stopped}, or clean the model as it is with --force.\n"
    )
    assert not (tmp_path / "refused").exists()
    for more in (["--force"], ["--checkpoint", "1"]):
        assert cli.main([*clean, *more, "--out", str(tmp_path / more[0])]) == 0
        assert json.loads((tmp_path / more[0] / "config.json").read_text())["start_step"] == 0


def test_data_that_the_model_was_not_trained_on_are_named(study, monkeypatch, tmp_path, capsys):
    """Without a plan too, which is bound to its data."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.beton", "val.beton"):
        shutil.copyfile(study / name, name)
    small = ["--batch-size", "24", "--device", "cpu", "--epochs", "0", "--no-ssl-text"]
    assert cli.main(["pretrain", "--data", "train.beton", "--model", "tiny-rn", *small, "--out", "run"]) == 0
    shutil.copyfile("val.beton", "train.beton")
    clean = ["clean", "--run", "run", *small]
    assert cli.main([*clean, "--out", "refused"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "train.beton has other content than when run was trained on it: put " in said
    assert cli.main([*clean, "--data", "train.beton", "--out", "cleaned"]) == 0
