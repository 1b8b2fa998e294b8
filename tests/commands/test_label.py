from __future__ import annotations

import json

import numpy as np
import pytest
from cleanings import start

from fastbd import cli
from fastbd.data.beton import Beton


def test_labels_are_the_classes_that_evaluation_finds(study, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(study)
    start(study)
    beton = Beton("val.beton")
    (tmp_path / "classes.txt").write_text("\n".join(beton.class_names))
    flags = [
        "label",
        "--run",
        "runs/start",
        "--data",
        "val.beton",
        "--classes",
        str(tmp_path / "classes.txt"),
        "--templates",
        "demo",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "labels.npy"),
    ]
    assert cli.main(flags) == 0
    labels = np.load(tmp_path / "labels.npy")
    (row,) = map(json.loads, (study / "runs/start/metrics.jsonl").read_text().splitlines())
    assert labels.shape == (60,) and (labels == beton.labels).mean() == pytest.approx(row["top1"])
    assert cli.main(flags) == 2 and "must be a new file" in capsys.readouterr().err
