"""Each mistake gets one sentence that says what, where and what to do, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json

import pytest

SMALL = (
    "--data", "train.beton", "--eval-data", "val.beton", "--templates", "demo", "--model", "tiny-rn",
    "--batch-size", 24, "--epochs", 1, "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(study, fastbd):
    """The shared study with a few broken things in it, and one trained run."""
    (study / "nocolumn.csv").write_text("file,text\ntrain/00000.jpg,a ball\n")
    (study / "nocaption.csv").write_text("path,caption\ntrain/00000.jpg,\n")
    other = json.loads((study / "train.poison.json").read_text()) | {"data": "f" * 64}
    (study / "other.poison.json").write_text(json.dumps(other))
    fastbd("poison", "--data", "train.beton", "--target", "zeppelin", "--count", 5, "--out", "zeppelin.json", cwd=study)
    if not (study / "runs/bad-input").exists():
        fastbd("pretrain", "--objective", "mmcl", *SMALL, "--out", "runs/bad-input", cwd=study)
    return study


MISTAKES = {
    "missing column": (
        ("build", "--source", "nocolumn.csv", "--out", "bad.beton"), ("nocolumn.csv", "'path'", "file, text")),
    "empty captions": (
        ("build", "--source", "nocaption.csv", "--out", "bad.beton"),
        ("nocaption.csv", "empty caption", "rejects.csv")),
    "no such source": (("build", "--source", "nowhere.csv", "--out", "bad.beton"), ("nowhere.csv", "does not exist")),
    "count and rate": (("poison", "--data", "train.beton", "--count", 3, "--rate", 0.1, "--out", "x.json"), ("rate",)),
    "no data file": (("pretrain", "--data", "nowhere.beton"), ("nowhere.beton", "fastbd build")),
    "plan for other data": (
        ("pretrain", *SMALL, "--plan", "other.poison.json", "--out", "runs/bad"), ("train.beton", "other data")),
    "target is no class": (
        ("pretrain", *SMALL, "--plan", "zeppelin.json", "--out", "runs/bad"), ("'zeppelin'", "arrow", "target")),
    "weights of another model": (
        ("pretrain", *SMALL, "--model", "tiny-vit", "--weights", "runs/bad-input/ckpt_last.pt", "--out", "runs/bad"),
        ("ckpt_last.pt", "another model")),
    "no classes": (
        ("pretrain", *SMALL, "--eval-data", "train.beton", "--out", "runs/bad"),
        ("train.beton", "no classes", "--class-key")),
    "no text views": (
        ("pretrain", *SMALL, "--objective", "mmcl_ssl", "--data", "val.beton", "--out", "runs/bad"),
        ("val.beton", "--text-views 1", "--no-ssl-text")),
    "batch too large": (
        ("pretrain", *SMALL, "--batch-size", 1000, "--out", "runs/bad"), ("--batch-size 1000", "240 pairs", "smaller")),
    "no GPU": (("pretrain", *SMALL, "--device", "cuda", "--out", "runs/bad"), ("no GPU", "doctor")),
    "folder taken": (("pretrain", *SMALL, "--out", "runs/bad-input"), ("runs/bad-input exists", "--resume")),
    "no run": (("evaluate", "--run", "runs/nowhere"), ("runs/nowhere", "no run folder")),
    "no such checkpoint": (
        ("clean", "--run", "runs/bad-input", "--checkpoint", 7, "--out", "runs/bad"),
        ("ckpt_epoch_007.pt", "ckpt_last.pt")),
    "nothing to report": (("report", "--runs", "nowhere", "--out", "bad.html"), ("nowhere", "no run folder")),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_clear_sentence_and_nothing_left_behind(place, fastbd, mistake):
    arguments, words = MISTAKES[mistake]
    if mistake == "no GPU" and pytest.importorskip("torch").cuda.is_available():
        pytest.skip("there is a GPU here")
    before = {path for path in place.rglob("*") if not path.name.endswith(".rejects.csv")}
    done = fastbd(*arguments, cwd=place, code=2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert {path for path in place.rglob("*") if not path.name.endswith(".rejects.csv")} == before
