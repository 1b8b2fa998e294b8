"""The verb on a small study, and what training makes of its row list."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbd import cli
from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.commands import detect
from fastbd.data.beton import Beton
from fastbd.data.decode import open_decoder
from fastbd.data.loader import batches
from fastbd.data.pairs import Pairs
from fastbd.data.rows import read_rows
from fastbd.evals.towers import Towers
from fastbd.models import create
from fastbd.poison.plan import Plan

DATA = (
    "--data",
    "train.beton",
    "--batch-size",
    24,
    "--epochs",
    1,
    "--eval-every",
    0,
    "--device",
    "cpu",
    "--model",
    "tiny-rn",
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(study, tmp_path_factory, fastbd) -> Path:
    """A folder with the study's data and plan, and two runs: `poisoned`, and `plain` without a plan."""
    folder = tmp_path_factory.mktemp("detect")
    for name in ("train.beton", "train.poison.json", "val.beton"):
        (folder / name).symlink_to(study / name)
    fastbd("pretrain", *DATA, "--plan", "train.poison.json", "--out", "poisoned", cwd=folder)
    fastbd("pretrain", *DATA, "--out", "plain", cwd=folder)
    return folder


@pytest.fixture
def shown(place, fastbd):
    def run(*arguments) -> str:
        return fastbd("detect", *arguments, "--device", "cpu", cwd=place).stdout

    return run


def test_pairs_are_embedded_as_training_sees_them(study):
    beton, plan = Beton(study / "train.beton"), Plan.load(study / "train.poison.json")
    pairs, model = Pairs(beton, open_decoder("pil", 0, "cpu"), 32, plan), create("tiny-rn", 0).train()
    model.encode_image(torch.randn(16, 3, 32, 32))  # running statistics of its own
    towers, rows = Towers(model, precision="fp32", device=CPU), np.arange(240)
    images, texts = detect.embed_images(towers, pairs, rows), detect.embed_texts(towers, pairs, rows)
    (batch,) = batches(
        pairs,
        np.arange(240),
        240,
        seed=0,
        policies=("plain",),
        text_view=None,
        epoch=0,
        start=0,
        world=World(0, 1, CPU),
    )
    with torch.no_grad():
        expected = model.eval().encode_image(*batch.views), model.encode_text(*batch.texts)
    assert set(plan.rows) <= set(batch.ids.tolist())
    assert torch.allclose(images[batch.ids], expected[0], atol=1e-5)
    assert torch.allclose(texts[batch.ids], expected[1], atol=1e-5)


def test_the_table_and_the_object_hold_the_same_numbers(shown):
    arguments = ("--run", "poisoned", "--detect-batch", 60, "--k", 5)
    found = json.loads(shown(*arguments, "--json"))
    assert (found["pairs"], found["poisoned"], found["k"], found["detect_batch"]) == (240, 24, 5, 60)
    lines = [[cell.strip() for cell in line.split("|")] for line in shown(*arguments).splitlines()]
    table = {line[1]: line[2:5] for line in lines if len(line) == 6}
    assert table["detector"] == ["ROC-AUC", "PR-AUC", "TPR at 1 % FPR"]
    for name in ("clip_score", "k_distance", "slof", "dao"):
        assert table[name] == [f"{number:.1%}" for number in found["detectors"][name].values()]


def test_training_takes_the_rows_that_are_kept_and_goes_on_with_them(shown, place, fastbd):
    said = " ".join(shown("--run", "poisoned", "--drop", 0.25, "--by", "k_distance", "--out", "kept.rows").split())
    beton, plan = Beton(place / "train.beton"), Plan.load(place / "train.poison.json")
    kept = read_rows(place / "kept.rows", beton.fingerprint, 240)
    left = len(np.intersect1d(kept, plan.rows))
    assert len(kept) == 180
    assert f"dropped 60 of 240 rows by k_distance, {24 - left} of the 24 poisoned ones; wrote kept.rows" in said
    assert "without the 0.25 that k_distance finds worst" in (place / "kept.rows").read_text().splitlines()[0]

    rows_file = ("--rows-file", "kept.rows")
    trained = fastbd("pretrain", *DATA, "--plan", "train.poison.json", *rows_file, "--out", "again", cwd=place).stdout
    assert f"180 pairs of train.beton ({left} poisoned), 7 steps" in " ".join(trained.split())
    clean = ("clean", "--run", "poisoned", "--epochs", 0, "--batch-size", 24, *rows_file, "--out", "cleaned")
    assert f"{180 - left} pairs (all there are; --rows 2,000) of" in " ".join(fastbd(*clean, cwd=place).stdout.split())
    (place / "kept.rows").unlink()
    for verb, run in (("pretrain", "again"), ("clean", "cleaned")):
        assert "done: 0 steps" in fastbd(verb, "--resume", run, cwd=place).stdout


def test_without_a_plan_rows_can_be_dropped_but_nothing_measured(shown):
    found = json.loads(shown("--run", "plain", "--drop", 0.1, "--out", "plain.rows", "--json"))
    assert found["poisoned"] is None and found["detectors"] == {}
    assert found["dropped"] == {"by": "dao", "share": 0.1, "rows": 24, "poisoned": None, "out": "plain.rows"}
    # With a plan that is given, the pairs of a model that never saw it.
    found = json.loads(shown("--run", "plain", "--plan", "train.poison.json", "--subset", 100, "--json"))
    assert found["pairs"] == 100 and 0 < found["poisoned"] < 24 and len(found["detectors"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--run", "nowhere"), "there is no folder nowhere: give that of a run"),
        (("--run", "plain"), "there is no plan, so nothing tells which pairs are poisoned: give --plan, or --drop"),
        (("--run", "poisoned", "--data", "val.beton"), "there is no plan"),
        (("--run", "poisoned", "--drop", 0.1), "--drop and --out belong together"),
        (("--run", "poisoned", "--out", "x.rows"), "--drop and --out belong together"),
        (
            ("--run", "poisoned", "--drop", 5, "--out", "x.rows"),
            "--drop 5.0 is out of range: give 0 to 1, but not 0",
        ),
        (("--run", "poisoned", "--drop", 0.1, "--out", "x.rows", "--subset", 9), "leave --subset out"),
        (("--run", "poisoned", "--drop", 0.1, "--out", "train.beton"), "train.beton exists already: name another"),
        (("--run", "poisoned", "--k", 60, "--detect-batch", 60), "60 pairs have no 60 others each to compare with"),
        (("--run", "poisoned", "--k", 0), "--k 0 is out of range: give 1 to"),
    ],
)
def test_mistakes(place, monkeypatch, arguments, message):
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=message):
        detect.run(cli.parse("detect", [*map(str, arguments), "--device", "cpu"]))
    assert not (place / "x.rows").exists()


def test_rows_of_other_data_are_refused(fastbd, place):
    (place / "other.rows").write_text(f"# fastbd rows of {'0' * 64}, all\n0\n")
    said = fastbd("pretrain", *DATA, "--rows-file", "other.rows", "--out", "none", cwd=place, code=2).stderr
    assert said.startswith("error: the row list other.rows was made for other data") and not (place / "none").exists()
