from __future__ import annotations

import importlib.util
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from cleanings import START, WORLD, cleaning, start

from fastbd import cli
from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.base.run_folder import read_config
from fastbd.commands import clean
from fastbd.training import fastest, opened
from fastbd.training.folder import RunFolder
from fastbd.training.inputs import same_pixels
from fastbd.training.run import Run

HAS_DALI = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")


@pytest.mark.parametrize("began", ["dali on a CPU", "pil"])
@pytest.mark.parametrize("where", ["auto", "gpu", "none"])
def test_a_run_that_began_with_the_cpus_pixels_keeps_them_on_a_gpu(began, where):
    """Kept images are the CPU's; and where auto no longer keeps them, the stream is."""
    for decode in ("auto", "dali"):
        assert same_pixels(began, decode, where) == ("dali-cpu" if HAS_DALI else "pil", where)
    for decode in ("dali-cpu", "pil", "ffcv"):
        assert same_pixels(began, decode, where) == (decode, where)


def test_a_run_that_began_with_a_gpus_pixels_keeps_none_that_the_cpu_decodes():
    for began in ("dali on a GPU, hw_decoder_load 0", "dali on a GPU, hw_decoder_load 1"):
        assert same_pixels(began, "pil", "ram") == ("pil", "ram")  # they cannot be the same
        assert same_pixels(began, "auto", "auto") == ("auto", "none")
        assert same_pixels(began, "dali", "none") == ("dali", "none")


def test_a_run_that_began_with_ffcvs_pixels_stays_as_it_was_told():
    assert same_pixels("ffcv", "ffcv", "auto") == ("ffcv", "auto")


def test_a_run_that_another_process_trains_is_not_resumed(study, monkeypatch, tmp_path):
    monkeypatch.chdir(study)
    start(study)
    first = cleaning(tmp_path / "run")
    config = cli.parse("clean", ["--resume", str(tmp_path / "run")])
    with pytest.raises(UserError, match=rf"run is being trained by process {os.getpid()} on .*: wait for it to end"):
        Run(config, clean.task(config, WORLD), WORLD)
    # A sweep's claim decides whose a run is, not the lock of a process that has stalled.
    Run(config, clean.task(config, WORLD), WORLD, folder=RunFolder(WORLD, guard=lambda: None))
    first.folder.release()
    second = Run(config, clean.task(config, WORLD), WORLD)
    with pytest.raises(UserError, match="is being trained by"):
        Run(config, clean.task(config, WORLD), WORLD)
    second.folder.release()


def test_an_evaluation_on_what_it_trains_on_is_told(study, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(study)
    start(study)
    for data, told in (("./val.beton", " (which it also trains on)"), ("train.beton", "")):
        cleaning(
            tmp_path / data.strip("./"), "--data", data, "--eval-data", "val.beton", "--rows", 24, "--no-ssl-text"
        ).train()
        assert f"evaluated on val.beton{told}, templates" in " ".join(capsys.readouterr().out.split())


def test_the_last_line_counts_the_time_of_the_whole_run(study, monkeypatch, tmp_path, capsys):
    """As result.json does: also what passes until the data are open, and the evaluation of the start."""
    monkeypatch.chdir(study)
    start(study)

    def opening(*args):
        time.sleep(3)
        return opened.Opened(*args)

    monkeypatch.setattr("fastbd.training.run.Opened", opening)
    run = cleaning(tmp_path / "run", "--epochs", 1)
    run.train()
    said = re.findall(r"steps\s+in\s+(\d+)\s+s,", capsys.readouterr().out)[-1]
    seconds = json.loads((tmp_path / "run/result.json").read_text())["seconds"]
    assert seconds > 3 and abs(int(said) - seconds) < 1


def test_a_warmup_longer_than_the_run_is_half_of_it(study, monkeypatch, tmp_path, capsys):
    """The run says and records how many steps that are; and, as it is asked for more, how many pairs it watches."""
    monkeypatch.chdir(study)
    start(study)
    run = cleaning(tmp_path / "run", "--warmup", 1000, "--rows", 96)
    run.train()
    said = " ".join(capsys.readouterr().out.split())
    assert "8 steps (4 of warm-up; --warmup 1,000), evaluated on" in said
    assert "val.beton, templates demo, 120 held-out pairs watched (all there are; --watch 512)" in said
    recorded = read_config(tmp_path / "run")
    assert (recorded["warmup_steps"], recorded["pairs"]) == (4, 96)
    rates = run.opened.step.rates
    assert (
        len(rates) == 8
        and rates.max().item() == pytest.approx(3e-3)
        and rates[:4].tolist() == pytest.approx([3e-3 * k / 4 for k in range(1, 5)])
    )


def test_a_training_says_in_which_precision_it_is_the_fastest(study, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(study)
    start(study)
    monkeypatch.setattr(opened, "has_bf16", lambda: True)
    monkeypatch.setattr(fastest, "measure", lambda model, images: {"fp32": 3.0 * images, "bf16": 48.0})
    for epochs, taken in ((1, "bf16"), (0, "fp32")):  # where nothing is trained, nothing is measured
        run = cleaning(tmp_path / taken, "--rows", 24, "--epochs", epochs)
        run.folder.release()
        assert run.opened.step.precision == json.loads((run.folder.path / "env.json").read_text())["precision"] == taken
        said = "bf16: bf16 is 3.00 times as fast as fp32 on this CPU"  # at 24 pairs, two views of each
        assert (said in capsys.readouterr().out) == (epochs > 0)


@pytest.mark.parametrize(
    ("made", "refused"),
    [
        (lambda rows: np.random.default_rng(0).shuffle(rows) or rows, False),  # in place
        (lambda rows: rows.astype(np.int32), False),
        (lambda rows: rows.astype(float), True),
        (lambda rows: rows + 1000, True),
        (lambda rows: rows[:-1], True),
    ],
)
def test_a_method_gives_rows_of_the_run_and_changes_none(made, refused, study, monkeypatch, tmp_path):
    monkeypatch.chdir(study)
    start(study)
    run = cleaning(tmp_path / "run", "--rows", 48)
    run.folder.release()
    own, opened = run.opened.task.rows.copy(), run.opened
    monkeypatch.setattr(opened.method, "rows", lambda epoch, rows: made(rows))
    if refused:
        with pytest.raises(UserError, match=r"^rows of .* returned"):
            next(iter(opened.batches(0, 0)))
    else:
        assert len(next(iter(opened.batches(0, 0))).ids) == 24
    assert np.array_equal(opened.task.rows, own)


def test_of_two_runs_that_make_one_folder_the_second_is_told(study, monkeypatch, tmp_path):
    monkeypatch.chdir(study)
    start(study)

    class Overtaken(World):
        def barrier(self) -> None:
            cleaning(tmp_path / "run").folder.release()

    config = cli.parse("clean", ["--run", "runs/start", "--force", "--device", "cpu", "--out", str(tmp_path / "run")])
    world = Overtaken(0, 1, WORLD.device)
    with pytest.raises(UserError, match=r"another run has just made .*run: choose another --out, or run this again\.$"):
        Run(config, clean.task(config, world), world)
    assert os.listdir(tmp_path) == ["run"]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("objective", ["mmcl", "ssl", "siglip", "cyclip"])
def test_a_batch_of_one_is_refused_where_the_loss_tells_pairs_apart(study, monkeypatch, tmp_path, objective):
    monkeypatch.chdir(study)
    start(study)
    flags = ("--method", "finetune", "--objective", objective)
    message = "a batch needs 2 or more: --batch-size is 1, and 216 of the data's pairs are trained on"
    with pytest.raises(UserError, match=message):
        cleaning(tmp_path / "run", *flags, "--batch-size", 1)
    with pytest.raises(UserError, match="--batch-size is 24, and 1 of the data's pairs are trained on"):
        cleaning(tmp_path / "run", *flags, "--rows", 1)
    assert not (tmp_path / "run").exists()


def test_a_batch_of_two_in_parts_of_one_is_trained(study, monkeypatch, tmp_path):
    """GradCache: the loss sees the whole batch."""
    monkeypatch.chdir(study)
    start(study)
    run = cleaning(tmp_path / "run", "--batch-size", 2, "--accumulate", 2, "--bn-group", 2, "--rows", 4)
    run.train()
    assert all(row["loss"] > 0 for row in rows(tmp_path / "run/log.jsonl"))


def test_a_batch_of_one_labelled_image_is_trained(study, monkeypatch, tmp_path):
    """The classes tell it from others, which need not be in the batch."""
    monkeypatch.chdir(study)
    start(study)
    assert cli.main(["pretrain", *START, "--model", "tiny-vit", "--out", str(tmp_path / "vit")]) == 0
    flags = ("--method", "supervised", "--data", "val.beton", "--batch-size", 1, "--rows", 3)
    with pytest.raises(UserError, match="batch norm needs the statistics of more than the 1 image"):
        cleaning(tmp_path / "run", *flags)
    cleaning(tmp_path / "run", *flags, "--run", tmp_path / "vit").train()
    assert all(row["loss"] > 0 for row in rows(tmp_path / "run/log.jsonl"))
