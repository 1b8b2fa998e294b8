"""Evaluation sets on which ASR, or that of one of two attacks, cannot be measured: everything works without it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from cleanings import START
from tables import table

from fastbd import cli
from fastbd.training.run import result_line


def built(study: Path, name: str, classes: set[str], most: int) -> str:
    """A .beton of the first images of these classes."""
    head, *lines = (study / "val.csv").read_text().splitlines()
    taken = [line for line in lines if line.split(",")[1] in classes][:most]
    (study / f"{name}.csv").write_text("\n".join([head, *taken]) + "\n")
    flags = ["--out", f"{name}.beton", "--class-key", "class", "--text-views", "0", "--workers", "1"]
    assert (study / f"{name}.beton").exists() or cli.main(["build", "--source", f"{name}.csv", *flags]) == 0
    return f"{name}.beton"


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("name", "most"), table([("bananas", 100), ("banana", 1)], ("banana", 1)))
def test_a_set_of_the_target_class_alone_gives_each_line_without_asr(study, monkeypatch, tmp_path, capsys, name, most):
    monkeypatch.chdir(study)
    (study / "two.txt").write_text("apple\nbanana\n")
    data = built(study, name, {"banana"}, most)
    common = ["--eval-data", data, "--device", "cpu", "--eval-every", "1/2epoch", "--eval-between", "1"]
    train = [*START, "--epochs", "1", *common, "--classes", "two.txt", "--out", str(tmp_path / "start")]
    assert cli.main(["pretrain", *train]) == 0
    run = ["--run", str(tmp_path / "start")]
    clean = ["clean", *run, *common, "--epochs", "1", "--batch-size", "24", "--out", str(tmp_path / "cleaned")]
    assert cli.main(clean) == 0  # what cannot be measured is not "not landed"
    for folder in ("start", "cleaned"):
        assert cli.main(["evaluate", "--run", str(tmp_path / folder), "--per-class"]) == 0
        found = rows(tmp_path / folder)
        assert len(found) >= 3 and all(row["asr"] is None and row["top1"] is not None for row in found)
    assert cli.main(["report", "--runs", str(tmp_path), "--out", str(tmp_path / "page")]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "ASR -" not in said.out and "landed" not in said.out
    assert {path.stem for path in (tmp_path / "page/figures").iterdir()} == {"trajectories"}
    assert cli.main([*clean[:-1], str(tmp_path / "back"), "--rebound", "2"]) == 2
    assert "with its target and with images of other classes" in capsys.readouterr().err
    assert cli.main(["evaluate", *run, "--rebound", "10"]) == 0
    assert f"{name}: no rebound, as ASR cannot be measured on it" in capsys.readouterr().out


def test_of_two_attacks_the_one_that_can_be_measured_is_said(study, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(study)
    data = built(study, "bananas", {"banana"}, 100)
    second = ["--add-to", "train.poison.json", "--trigger", "yellow", "--target", "apple", "--patch-size", "6"]
    poison = ["poison", "--data", "train.beton", *second, "--count", "12", "--templates", "demo"]
    assert cli.main([*poison, "--out", str(tmp_path / "both.json")]) == 0
    (study / "two.txt").write_text("apple\nbanana\n")
    flags = ["--plan", str(tmp_path / "both.json"), "--eval-data", data, "--classes", "two.txt", "--epochs", "1"]
    assert cli.main(["pretrain", *START, *flags, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert said.count("landed") == 2 and "the attack, yellow to 'apple', has" in said  # landed, and (--landed)
    last = rows(tmp_path / "run")[-1]
    assert [attack["asr"] is None for attack in last["attacks"]] == [True, False] and last["target"] == "apple"
    assert cli.main(["evaluate", "--run", str(tmp_path / "run"), "--asr-seed", "0", "1"]) == 0
    last = rows(tmp_path / "run")[-1]
    assert last["attacks"][0]["asr"] is None and math.isfinite(last["asr_seeds_low"])
    assert last["attacks"][0]["asr_all"] is not None
    assert cli.main(["report", "--runs", str(tmp_path / "run"), "--out", str(tmp_path / "report")]) == 0


def test_a_line_says_asr_where_it_is_known():
    row = {"epoch": 1.0, "top1": 0.5, "set": "val", "seconds": 1.0}
    assert result_line(row | {"asr": None, "recovery": None}) == result_line(row)
    assert "ASR  25.0%  recovery  75.0%" in result_line(row | {"asr": 0.25, "recovery": 0.75})
