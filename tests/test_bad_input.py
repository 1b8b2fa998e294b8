"""A user's mistakes, through the real command line: one line that says what, where and what to do; nothing left."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from cleanings import start

from fastbd import __version__, cli
from fastbd.models import create

TRAIN = (
    "pretrain", "--data", "train.beton", "--plan", "train.poison.json", "--eval-data", "val.beton",
    "--model", "tiny-rn", "--batch-size", 24, "--epochs", 1, "--device", "cpu", "--decode", "pil", "--out", "run",
)  # fmt: skip


@pytest.fixture
def place(study, tmp_path) -> Path:
    """A folder with links to the study's files."""
    for path in study.iterdir():
        if path.suffix in (".beton", ".json", ".csv") or path.name in ("train", "val"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def refused(fastbd, place):
    """Run a command line that is a mistake; returns what it says, checked for form and for leftovers."""

    def run(*arguments) -> str:
        before = sorted(place.rglob("*"))
        done = fastbd(*arguments, cwd=place, code=2)
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
        assert "Traceback" not in done.stdout
        assert sorted(place.rglob("*")) == before
        return lines[0]

    return run


def edited_plan(place: Path, **changed) -> None:
    """other.json: the study's plan, or its attack, with some entries changed."""
    plan = json.loads((place / "train.poison.json").read_text())
    (attack,) = plan["attacks"]
    del plan["crc32"]
    for name, value in changed.items():
        (plan if name in plan else attack)[name] = value
    (place / "other.json").write_text(json.dumps(plan))


def test_a_column_that_is_missing(refused):
    said = refused("build", "--source", "train.csv", "--out", "new.beton", "--caption-key", "title")
    assert "train.csv has no column 'title'; its columns are: path, caption" in said


def test_captions_that_are_all_empty(fastbd, place):
    (place / "empty.csv").write_text("path,caption\ntrain/00000.jpg,\ntrain/00001.jpg, \n")
    said = fastbd("build", "--source", "empty.csv", "--out", "new.beton", cwd=place, code=2).stderr
    assert said.startswith("error: all 2 rows of empty.csv were rejected, most for: empty caption; see new.rejects.csv")
    assert said.count("\n") == 1
    # The list of rejects is what the message points to, and all that is left.
    assert sorted(p.name for p in place.glob("new*")) == ["new.rejects.csv"]
    assert (place / "new.rejects.csv").read_text().count("empty caption") == 2


def test_a_plan_for_other_data(refused, place):
    edited_plan(place, data="0" * 64)
    said = refused(*TRAIN, "--plan", "other.json")
    assert "made for other data than train.beton" in said and "python -m fastbd poison --data train.beton" in said


@pytest.mark.parametrize("flags", [("--resident", "none"), ("--no-poison",)])
def test_a_patch_larger_than_the_images(refused, place, flags):
    plan = json.loads((place / "train.poison.json").read_text())
    edited_plan(place, trigger=plan["attacks"][0]["trigger"] | {"patch_size": 40})
    assert "a patch of 40 px does not fit into images of 32x32 px" in refused(*TRAIN, "--plan", "other.json", *flags)


def test_weights_of_another_model(refused, place):
    torch.save(create("tiny-vit", 0).state_dict(), place / "vit.pt")
    said = refused(*TRAIN, "--weights", "vit.pt")
    assert "vit.pt is a checkpoint of another model" in said and "give --model tiny-vit" in said


def test_a_run_folder_that_exists(refused, place):
    (place / "run").mkdir()
    assert "run exists already: choose another --out, or go on with --resume run" in refused(*TRAIN)


@pytest.mark.parametrize("arguments", [("clean", "--run"), ("clean", "--resume"), ("report", "--runs")])
def test_a_run_folder_that_is_none(refused, place, arguments):
    (place / "nothing").mkdir()
    said = refused(*arguments, "nothing")
    assert "nothing is no run folder" in said or "there is no checkpoint nothing/ckpt_last.pt" in said


def test_evaluation_data_without_classes(refused):
    assert "train.beton has no classes and cannot be evaluated" in refused(*TRAIN, "--eval-data", "train.beton")


def test_what_evaluation_refuses_costs_no_decoding(place, fastbd):
    for flags in (("--eval-every", "0.5"), ("--eval-data", "train.beton"), ("--landed", 50)):
        done = fastbd(*TRAIN, *flags, cwd=place, code=2)
        assert "decoded" not in done.stdout, flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "sweep needs --study, a shipped one or a file, or --out"),
        (("--study", "papr"), "there is no study 'papr'; did you mean paper?"),
        (("--study", "paper", "--data", "train.beton"), "'paper' measures top-1 and ASR: give --eval-data"),
        (("--study", "paper", "--data", "train.beton", "--eval-data", "v.beton"), "v.beton does not exist"),
        (("--study", "paper", "--data", "t-*.beton", "--eval-data", "val.beton"), "no file matches t-*.beton"),
        (("--study", "demo", "--asha", 1), "--asha 1 would end no run"),
    ],
)
def test_a_sweep_that_cannot_be(refused, flags, message):
    assert message in refused("sweep", *flags)


def test_a_target_that_is_no_class(refused, place):
    edited_plan(place, target="zebra")
    said = refused(*TRAIN, "--plan", "other.json")
    assert "no class holds the target word 'zebra'" in said and "arrow, ball, banana" in said


def test_a_batch_larger_than_the_data(refused):
    said = refused(*TRAIN, "--batch-size", 241)
    assert "--batch-size 241 is larger than the 240 pairs there are: make it smaller" in said


def test_text_views_that_are_missing(refused):
    said = refused("pretrain", "--objective", "mmcl_ssl", "--data", "val.beton", *TRAIN[7:])
    assert "val.beton holds no second text views: build it with --text-views 1, or train with --no-ssl-text" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--views", "par", "--objective", "mmcl_ssl"), "--views par has no second view for the self-supervised loss"),
        (("--max-bad", 1.5), "--max-bad 1.5 is out of range: give 0 to 1."),
        (("--max-bad", -0.1), "--max-bad -0.1 is out of range: give 0 to 1."),
        (("--resident", "gpu"), "--resident gpu, but the run is on the CPU: give --resident ram or auto"),
    ],
)
def test_flags_of_the_data_that_cannot_be(refused, flags, message):
    assert message in refused(*TRAIN, *flags)


def test_a_gpu_that_is_not_there(refused, monkeypatch):
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    said = refused(*TRAIN, "--device", "cuda")
    assert "--device cuda, but torch sees no GPU here; 'python -m fastbd doctor' says why" in said


@pytest.mark.parametrize("flag", ["--data", "--plan", "--eval-data"])
def test_a_file_that_is_missing(refused, flag):
    assert "nowhere" in refused(*TRAIN, flag, "nowhere")


def test_a_data_file_that_is_cut_short(refused, place):
    (place / "cut.beton").write_bytes((place / "train.beton").read_bytes()[:-5000])
    assert "cut.beton is no whole .beton file" in refused(*TRAIN, "--data", "cut.beton")


FULL = (
    "-c",
    "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100));"
    "sys.argv[1:3] = []; runpy.run_module('fastbd', run_name='__main__')",
)
"""Starts the program as a process that may write 100 bytes to a file, which stands for a full disk."""


def test_a_plan_is_not_half_written(fastbd_process, place):
    done = fastbd_process(
        "poison", "--data", "train.beton", "--out", "new.json", "--count", 9, cwd=place, code=2, launcher=FULL
    )
    assert done.stderr == "error: the disk is full: new.json could not be written; free some space.\n"
    assert list(place.glob("new*")) == []


@pytest.mark.full
def test_an_evaluation_on_a_full_disk_is_printed_and_said_to_be_lost(fastbd, fastbd_process, place):
    fastbd(*TRAIN, cwd=place)
    before = (place / "run/metrics.jsonl").read_bytes()
    done = fastbd_process("evaluate", "--run", "run", "--device", "cpu", cwd=place, code=2, launcher=FULL)
    assert "top-1" in done.stdout
    assert done.stderr == "error: the disk is full: run/metrics.jsonl could not be written; free some space.\n"
    assert (place / "run/metrics.jsonl").read_bytes() == before


def test_a_checkpoint_that_is_not_there(refused, place, study, fastbd):
    fastbd("pretrain", "--objective", "mmcl", *TRAIN[1:], cwd=place)
    before = sorted(place.rglob("*"))
    said = fastbd("clean", "--run", "run", "--checkpoint", 7, "--out", "cleaned", cwd=place, code=2).stderr
    assert "there is no checkpoint run/ckpt_epoch_007.pt; checkpoints there: ckpt_last.pt" in said
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--bn-group", 5), "--bn-group 5 does not share out the 24 images, 1 of a pair, that are embedded together"),
        (
            ("--bn-group", 3, "--objective", "mmcl_ssl"),
            "2 of a pair, that are embedded together: choose a divisor of 48 that is a multiple of 2",
        ),
        (("--accumulate", 5), "--batch-size 24 is no multiple of the 5 parts of --accumulate"),
        (
            ("--accumulate", 2),
            "--accumulate 2 needs a number for --bn-group, as batch norm sees one part at a time: a divisor of 12",
        ),
        (("--accumulate", 2, "--bn-group", "sync"), "--accumulate 2 needs a number for --bn-group"),
        (("--bn-group", 1), "--bn-group 1 is out of range: give 2 to"),
        (("--graph", "on"), "--graph on captures the step of one process on a GPU, with Triton; give --graph off here"),
    ],
)
def test_a_step_that_cannot_be(refused, flags, message):
    assert message in refused(*TRAIN, *flags)


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo",),
        ("build", "--source", "train.csv"),
        ("poison", "--data", "train.beton"),
        ("pretrain", *TRAIN[1:-2]),
        ("pretrain",),  # which would make the demo set first
        ("clean", "--run", "start", "--force"),
        ("sweep", "--study", "demo"),
        ("detect", "--run", "start", "--drop", "0.1"),
        ("label", "--run", "start"),
        ("preview",),
        ("report", "--runs", "start"),
    ],
)
def test_a_place_that_cannot_be_written_is_known_before_the_work(arguments, study, place, monkeypatch, capsys):
    """A file in place of a folder stands for one that is read-only, as root writes to any other."""
    monkeypatch.chdir(study)
    start(study)
    (place / "start").symlink_to(study / "runs/start")
    monkeypatch.chdir(place)
    before, out = sorted(place.rglob("*")), "val.csv/deep/out.npy"
    assert cli.main([*map(str, arguments), "--out", out]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"error: --out {out} cannot be written in {place}/val.csv (Not a directory): choose another --out."
    assert sorted(place.rglob("*")) == before


READ_ONLY = """
import os, sys
from fastbd import cli
os.environ["XDG_CACHE_HOME"] = os.getcwd()
scratch = sys.argv[1]
train = ["--data", "train.beton", "--model", "tiny-rn", "--batch-size", "24", "--epochs", "1", "--device", "cpu"]
kept = ["--resident", "disk", "--resident-dir", scratch + "/pixels"]
for command in (
    ["poison", "--data", "train.beton", "--count", "3"],
    ["pretrain", "--resume", "runs/start"],
    ["pretrain", *train],
    ["evaluate", "--run", "runs/start"],
    ["report", "--runs", "runs", "--out", "page"],
    ["preview", "--out", scratch + "/preview.png"],
    ["pretrain", *train, "--resident", "disk", "--out", scratch + "/run"],
    ["pretrain", *train, *kept, "--out", scratch + "/run"],
    ["clean", "--run", "runs/start", "--force", "--epochs", "0", "--device", "cpu", "--out", scratch + "/cleaned"],
):
    code = cli.main(command)
    print("exit code", code, file=sys.stderr)
"""


def test_where_all_is_read_only_it_is_read_and_nothing_else(study, tmp_path, monkeypatch, read_only):
    monkeypatch.chdir(study)
    start(study)
    done = read_only(study, sys.executable, "-c", READ_ONLY, tmp_path, cwd=study)
    refused = "(Read-only file system)"
    assert f"not recorded, as runs/start/metrics.jsonl cannot be written {refused}\n" in done.stdout
    assert "top-1" in done.stdout.partition("not recorded")[2]
    assert done.stderr.splitlines() == [
        f"error: --out train.poison.json cannot be written in {study} {refused}: choose another --out.",
        "exit code 2",
        f"error: --resume runs/start cannot be written in {study}/runs/start {refused}: copy the run to "
        "where that is possible.",
        "exit code 2",
        f"error: --out runs cannot be written in {study}/runs {refused}: choose another --out.",
        "exit code 2",
        "exit code 0",
        f"error: --out page cannot be written in {study} {refused}: choose another --out.",
        "exit code 2",
        f"error: the demo set's folder {study}/fastbd/demo-{__version__} cannot be written in {study} {refused}: "
        "set XDG_CACHE_HOME to a folder that can be written to, or give --data.",
        "exit code 2",
        f"error: train.32.pixels cannot be written {refused}: give another --resident-dir, or --resident ram or none.",
        "exit code 2",
        "exit code 0",
        "exit code 0",
    ]
    made = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/c*.pt"))
    assert made == ["cleaned/ckpt_last.pt", "run/ckpt_last.pt"]
    assert [path.name for path in (tmp_path / "pixels").iterdir()] == ["train.32.pixels"]
