"""Trackers through the real command line: what each tool's own reader finds, and that no tracker can hurt a training.

The tools are read back where they are installed: pip install 'fastbd[tensorboard,wandb,mlflow]'.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from forked import command, end
from PIL import Image

from fastbd.base import files
from fastbd.base.run_folder import find, read
from fastbd.config import cards
from fastbd.track import process

NOTES = '''
"""Trackers of one's own."""

import json
import os
import time


class Notes:
    """Writes what it is told."""

    def __init__(self, run, kept):
        kept["begun"] = kept.get("begun", 0) + 1
        self.path, self.lines = run.path / "notes.jsonl", [{"begun": run.name}]

    def settings(self, settings):
        self.lines.append({"settings": settings})

    def add(self, step, epoch, numbers):
        self.lines.append({"step": step, "epoch": epoch, **numbers})

    def flush(self):
        with open(self.path, "a") as file:
            file.writelines(json.dumps(line) + "\\n" for line in self.lines)
        self.lines = []

    def end(self, result):
        self.lines.append({"ended": result.get("reason"), "group": os.getsid(0)})
        self.flush()


class Broken(Notes):
    def add(self, step, epoch, numbers):
        raise OSError("there is no such server")


class Killed(Notes):
    def flush(self):
        os.kill(os.getpid(), 9)


class Stuck(Notes):
    def end(self, result):
        time.sleep(600)
'''
PRETRAIN = shlex.split(
    "pretrain --data train.beton --plan train.poison.json --eval-data val.beton --epochs 2 --eval-every 5 "
    "--log-every 2 --batch-size 24 --device cpu --decode pil --workers 1 --model tiny-rn --templates demo"
)
STUDY = """
name = "tracked"
[[pretrain]]
data = "train.beton"
plan = "train.poison.json"
eval_data = "val.beton"
templates = "demo"
model = "tiny-rn"
batch_size = 24
epochs = 1
device = "cpu"
[[clean]]
method = ["cleanclip", "finetune"]
epochs = 1
batch_size = 24
force = true
device = "cpu"
"""
INSTALLED = [name for name, card in cards.TRACKERS.items() if all(map(cards._is_installed, card.needs))]
pytestmark = pytest.mark.process


@pytest.fixture(scope="module", autouse=True)
def place(study) -> Iterator[None]:
    """The study's folder with trackers of one's own, and none of the user's settings of the tools."""
    (study / "notes.py").write_text(NOTES)
    (study / "tracked.toml").write_text(STUDY)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
            patch.delenv(name)
        yield


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "ckpt_last.pt", weights_only=False)["model"]


def told(notes: list[dict]) -> dict[str, list[dict]]:
    """What Notes has written of rows, by the file that they are in."""
    kinds = {"log.jsonl": "train/", "metrics.jsonl": "eval/"}
    return {file: [row for row in notes if any(k.startswith(kind) for k in row)] for file, kind in kinds.items()}


def check_told(run: Path, notes: list[dict]) -> None:
    """Each row of the run's files was told once, in order, with its numbers."""
    for (file, rows), kind in zip(told(notes).items(), ("train", "eval"), strict=True):
        there = lines(run / file)
        assert [row["step"] for row in rows] == [row["step"] for row in there], file
        key = "loss" if kind == "train" else "top1"
        assert [row[f"{kind}/{key}"] for row in rows] == [row[key] for row in there], file


@pytest.fixture(scope="module")
def plain(study, fastbd) -> Path:
    """The run without a tracker."""
    fastbd(*PRETRAIN, "--out", "track/plain", cwd=study)
    return study / "track/plain"


def test_a_tracker_is_told_all_and_changes_no_bit_of_the_weights(plain, study, fastbd):
    fastbd(*PRETRAIN, "--track", "notes:Notes", "--out", "track/noted", cwd=study)
    run = study / "track/noted"
    notes = lines(run / "notes.jsonl")
    check_told(run, notes)
    assert notes[0] == {"begun": "noted"} and notes[-1]["ended"] == "finished"
    assert notes[-1]["group"] != os.getsid(0)  # no Ctrl-C comes there
    rates = [row["train/lr"] for row in told(notes)["log.jsonl"]]
    assert rates[0] > 0 and rates[-1] < max(rates) == rates[len(rates) // 2 - 1]
    told_last, last = told(notes)["metrics.jsonl"][-1], lines(run / "metrics.jsonl")[-1]
    assert [note["settings"] for note in notes if "settings" in note] == [
        {"eval/n_classes": last["n_classes"], "eval/n": last["n"], "eval/n_asr": last["n_asr"]},
    ]
    assert not {"eval/n", "eval/n_asr"} & {name for note in notes for name in note}
    assert [told_last[f"eval/{end}"] for end in ("asr_low", "asr_high")] == [last["asr_low"], last["asr_high"]]
    one, other = weights(plain), weights(run)
    assert all(torch.equal(value, other[name]) for name, value in one.items()) and one.keys() == other.keys()


@pytest.mark.parametrize(
    ("name", "why"), [("Broken", "OSError: there is no such server"), ("Killed", "its process has ended with -9")]
)
def test_a_tracker_that_fails_is_told_once_and_the_training_goes_on(name, why, plain, study, fastbd):
    tracker, run = f"notes:{name}", study / f"track/{name}"
    done = fastbd(*PRETRAIN, "--track", tracker, "notes:Notes", "--out", run, cwd=study)
    assert done.stdout.count("goes on without") == 1
    assert f"{run} goes on without --track {tracker}: {why}; see {run}/tracking/{tracker}.log\n" in done.stdout
    check_told(run, lines(run / "notes.jsonl"))  # by the other one
    other = weights(run)
    assert all(torch.equal(value, other[name]) for name, value in weights(plain).items())


def test_a_tracker_that_does_not_end_is_left_behind(study, fastbd, monkeypatch):
    monkeypatch.setattr(process, "WAIT", 0.5)
    done = fastbd(*PRETRAIN, "--epochs", 1, "--track", "notes:Stuck", "--out", "track/stuck", cwd=study)
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("--track notes:Stuck: process ")]
    assert said.endswith(" still tells of track/stuck, and ends by itself")
    assert read(study / "track/stuck").result["reason"] == "finished"
    os.kill(int(said.split()[3]), signal.SIGKILL)


def test_after_a_kill_the_rest_is_told_and_the_resumed_run_tells_nothing_twice(study, fastbd, plain):
    run = study / "track/killed"
    training = command(*PRETRAIN, "--track", "notes:Notes", "--out", "track/killed", cwd=study, said=study / "k.txt")
    try:
        wait_for(lambda: (run / "log.jsonl").exists() and len(lines(run / "log.jsonl")) > 6)
    finally:
        end(training)  # by SIGKILL; the last checkpoint is that of the first epoch, or of the start
    wait_for(lambda: (run / "notes.jsonl").exists() and "ended" in lines(run / "notes.jsonl")[-1])
    before = lines(run / "notes.jsonl")
    assert before[-1]["ended"] is None
    assert [row["step"] for row in told(before)["log.jsonl"]] == [row["step"] for row in lines(run / "log.jsonl")]
    fastbd("pretrain", "--resume", "track/killed", cwd=study)
    notes = lines(run / "notes.jsonl")
    check_told(run, notes)
    assert [line["begun"] for line in notes if "begun" in line] == ["killed", "killed"]
    assert json.loads((run / "tracking/notes:Notes.json").read_text())["begun"] == 2
    assert len(told(notes)["log.jsonl"]) == len(lines(plain / "log.jsonl")) == 10


def wait_for(there) -> None:
    until = time.monotonic() + 120
    while not there() and time.monotonic() < until:
        time.sleep(0.02)
    assert there()


def test_what_evaluate_adds_is_told_too(study, fastbd):
    run = study / "track/evaluated"
    fastbd(*PRETRAIN, "--epochs", 1, "--track", "notes:Notes", "--out", run, cwd=study)
    for data in ("val.beton", "train.beton"):  # with classes; with captions
        fastbd("evaluate", "--run", run, "--eval-data", data, "--device", "cpu", cwd=study)
    labelled, captioned = [row for row in lines(run / "notes.jsonl") if any("evaluate/" in name for name in row)]
    rows = [row for row in lines(run / "metrics.jsonl") if "checkpoint" in row]
    assert labelled["evaluate/val/top1"] == rows[0]["top1"] and labelled["step"] == rows[0]["step"]
    assert captioned["evaluate/train/i2t_r1"] == rows[1]["i2t_r1"]


def test_what_is_not_installed_is_told_before_anything_is_made(study, fastbd, monkeypatch, tmp_path):
    (tmp_path / "some_tool").mkdir()  # as the folder that a tool writes to, which Python can import
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cards.TRACKERS, "some", cards.Card(code="some_tool:Some", needs=("some_tool", "json", "other")))
    for words in (PRETRAIN, ["sweep", "--study", "tracked.toml"]):
        done = fastbd(*words, "--track", "some", "--out", "track/none", cwd=study, code=2)
        assert done.stderr == "error: the tracker some needs some_tool and other: pip install 'fastbd[some]'.\n"
    assert not (study / "track/none").exists()


def test_what_is_no_tracker_is_told(study, fastbd):
    done = fastbd(*PRETRAIN, "--track", "wandp", cwd=study, code=2)
    assert done.stderr.startswith("error: there is no tracker 'wandp'; did you mean wandb? ")
    done = fastbd(*PRETRAIN, "--track", "notes:NOTE", cwd=study, code=2)
    assert "cannot be imported (module 'notes' has no attribute 'NOTE')" in done.stderr


def test_each_run_of_a_study_is_tracked(study, fastbd_process):
    words = ("--study", "tracked.toml", "--out", "track/study", "--device", "cpu", "--processes", 2)
    done = fastbd_process("sweep", *words, "--track", "notes:Notes", *INSTALLED, cwd=study)
    assert json.loads(done.stdout.splitlines()[-1])["finished"] == 3
    runs = find([study / "track/study"])  # nothing that a tracker has written is taken for a run
    assert [run.verb for run in runs].count("clean") == 2 and len(runs) == 3
    for run in runs:
        check_told(run.path, lines(run.path / "notes.jsonl"))
        assert not (run.path / "mlflow.db").exists()
    for name in INSTALLED:
        STUDIES[name](study / "track/study", runs)


def of_tensorboard(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "tensors": 0, "images": 0})
    found.Reload()
    return found


def of_wandb(run: Path) -> list:
    """The records of all the .wandb files of a run, in order: LevelDB's log format, behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    records, block = [], 32768
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        content, at, parts = path.read_bytes(), 7, b""
        while at < len(content):
            if block - at % block < 7:  # no header fits
                at += block - at % block
                continue
            length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
            parts += content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or its last part
                records.append(Record.FromString(parts))
                parts = b""
    return records


def history(records: list) -> list[dict]:
    """The rows that were logged to wandb."""
    found = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [{".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item} for row in found]


def of_mlflow(folder: Path):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def study_of_tensorboard(folder: Path, runs: list) -> None:
    for run in runs:
        assert [e.step for e in of_tensorboard(run.path).Scalars("eval/top1")] == [row["step"] for row in run.metrics]


def study_of_wandb(folder: Path, runs: list) -> None:
    for run in runs:
        records = [record for record in of_wandb(run.path) if record.WhichOneof("record_type") == "run"]
        assert {record.run.run_group for record in records} == {"study"}, run.name
        assert {(record.run.display_name, record.run.job_type) for record in records} == {(run.name, run.verb)}


def study_of_mlflow(folder: Path, runs: list) -> None:
    client = of_mlflow(folder)
    experiment = client.get_experiment_by_name("study")
    found = {run.data.tags["mlflow.runName"]: run for run in client.search_runs([experiment.experiment_id])}
    assert found.keys() == {run.name for run in runs}
    for run in runs:
        assert found[run.name].info.status == "FINISHED"
        assert found[run.name].data.metrics["eval/top1"] == run.metrics[-1]["top1"]


STUDIES = {"tensorboard": study_of_tensorboard, "wandb": study_of_wandb, "mlflow": study_of_mlflow}


@pytest.fixture(scope="module")
def tool_run(study, fastbd) -> Path:
    """A run that all the tools that are installed track, killed once and resumed."""
    if not INSTALLED:
        pytest.skip("no tool is installed")
    run = study / "track/tools"
    training = command(*PRETRAIN, "--track", *INSTALLED, "--out", "track/tools", cwd=study, said=study / "tools.txt")
    try:
        wait_for(lambda: (run / "log.jsonl").exists() and len(lines(run / "log.jsonl")) > 6)
    finally:
        end(training)
    for log, kept in (process.state_of(run, name) for name in INSTALLED):
        wait_for(kept.exists)
        with files.locked(log):  # until the first process has told the rest
            pass
    done = fastbd("pretrain", "--resume", "track/tools", cwd=study)
    assert "goes on without" not in done.stdout and "still tells" not in done.stdout, done.stdout
    return run


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name not in INSTALLED, reason=f"needs {name}")


def expected(run: Path) -> Mapping[str, list[tuple[int, float]]]:
    """(step, value) of each row by the names that trackers have."""
    log, metrics = lines(run / "log.jsonl"), lines(run / "metrics.jsonl")
    assert len(log) == 10 and len(metrics) == 4 and all(a["step"] < b["step"] for a, b in pairwise(log))
    found = {f"train/{key}": [(row["step"], row[key]) for row in log] for key in ("loss", "lr")}
    keys = ("top1", "asr", "asr_low", "asr_high")
    return found | {f"eval/{key}": [(row["step"], row[key]) for row in metrics] for key in keys}


@needs("tensorboard")
def test_tensorboard_reads_the_run(tool_run):
    found = of_tensorboard(tool_run)
    for name, values in expected(tool_run).items():
        events = found.Scalars(name)
        assert [event.step for event in events] == [step for step, _ in values], name
        assert [event.value for event in events] == pytest.approx([value for _, value in values], rel=1e-6), name
    (picture,) = found.Images("samples")
    with Image.open(tool_run / "samples.png") as samples:
        assert (picture.width, picture.height) == samples.size
    assert picture.encoded_image_string == (tool_run / "samples.png").read_bytes()
    assert "eval/n" not in found.Tags()["scalars"]
    assert [json.loads(event.tensor_proto.string_val[0]) for event in found.Tensors("eval/n")] == [60]
    (settings,), (result,) = (found.Tensors(tag) for tag in ("config", "result"))
    assert json.loads(settings.tensor_proto.string_val[0]) == json.loads((tool_run / "config.json").read_text())
    assert json.loads(result.tensor_proto.string_val[0])["reason"] == "finished"
    assert found.SummaryMetadata("_hparams_/session_start_info").plugin_data.plugin_name == "hparams"


@needs("wandb")
def test_wandb_reads_the_run_offline(tool_run):
    records = of_wandb(tool_run)
    rows = history(records)
    for name, values in expected(tool_run).items():
        assert [(row["step"], row[name]) for row in rows if name in row] == values, name
    assert [row["_step"] for row in rows] == list(range(len(rows)))  # also over the two processes
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {json.loads((tool_run / "tracking/wandb.json").read_text())["id"]}
    settings = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert settings["batch_size"] == 24
    later = {item.key: item.value_json for record in records for item in record.config.update}
    assert later["eval/n"] == "60" and not any("eval/n" in row for row in rows)
    assert sum("samples._type" in row for row in rows) == 1
    (picture,) = tool_run.glob("wandb/*/files/media/images/samples_*.png")
    assert picture.stat().st_size > 1000
    exits = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
    assert exits == [1, 0]  # it was killed, and has finished


@needs("mlflow")
def test_mlflow_reads_the_run(tool_run):
    client = of_mlflow(tool_run)
    (run,) = client.search_runs([client.get_experiment_by_name("fastbd").experiment_id])
    for name, values in expected(tool_run).items():
        assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] == values, name
    assert run.info.status == "FINISHED" and run.data.tags["reason"] == "finished"
    assert run.data.params["eval/n"] == "60" and "eval/n" not in run.data.metrics
    assert (run.info.run_name, run.data.params["batch_size"], run.data.tags["verb"]) == ("tools", "24", "pretrain")
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"samples.png", "settings.json", "env.json", "result.json"}


@pytest.mark.skipif(not INSTALLED, reason="needs a tool")
def test_the_tools_leave_the_weights_as_they_are(tool_run, plain):
    one, other = weights(plain), weights(tool_run)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.skipif(not INSTALLED or not shutil.which("strace"), reason="needs a tool, and strace")
def test_nothing_is_sent(tool_run, study, tmp_path):
    """What each tool's process, and those that it starts, connect to while they tell of a run."""
    run, calls = tmp_path / "sent", tmp_path / "calls"
    shutil.copytree(tool_run, run, ignore=shutil.ignore_patterns("tracking", "wandb", "tensorboard", "mlflow*"))
    (run / "tracking").mkdir()
    quiet = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_CURRENT_TEST")}
    for name in INSTALLED:  # in an environment in which MLflow takes itself to be used by a person
        traced = [
            "strace",
            "-f",
            "-qq",
            "-e",
            "trace=connect",
            "-o",
            calls,
            sys.executable,
            "-m",
            "fastbd.track",
        ]
        with open(run / "tracking" / f"{name}.log", "w") as log:
            done = subprocess.run([*traced, name, run], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=quiet)
        assert done.returncode == 0, (run / "tracking" / f"{name}.log").read_text()
        places = [line for line in calls.read_text().splitlines() if "AF_INET" in line and "127.0.0.1" not in line]
        assert not places, f"{name}: {places}"
