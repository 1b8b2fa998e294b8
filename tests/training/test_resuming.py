"""What --resume takes from a run folder: the newest whole checkpoint, and nothing that does not belong to it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from cleanings import WORLD

from fastbd import cli
from fastbd.base import files
from fastbd.commands import pretrain
from fastbd.kernels import native
from fastbd.training import fastest, opened
from fastbd.training.resume import difference
from fastbd.training.run import Run

RUN = (
    "pretrain", "--data", "train.beton", "--plan", "train.poison.json", "--eval-data", "val.beton", "--model",
    "tiny-rn", "--templates", "demo", "--batch-size", 60, "--epochs", 2, "--save-every", 1, "--log-every", 2,
    "--device", "cpu",
)  # fmt: skip
TIMES = ("pairs_per_s", "of_limit", "data_wait", "seconds")


def fastbd(*arguments) -> int:
    return cli.main([*map(str, arguments)])


def rows(run, name):
    found = map(json.loads, (run / name).read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


@pytest.fixture(scope="module")
def place(study, tmp_path_factory):
    """A folder with the study's data, and a run `whole` of two epochs, both of whose checkpoints are there."""
    folder = tmp_path_factory.mktemp("resuming")
    for name in ("train.beton", "train.poison.json", "val.beton"):
        shutil.copyfile(study / name, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert fastbd(*RUN, "--out", "whole") == 0
        assert fastbd("clean", "--run", "whole", "--force", "--epochs", 0, "--device", "cpu", "--out", "cleaned") == 0
    return folder


@pytest.fixture
def run(place, tmp_path, monkeypatch):
    """A copy of that run; the working folder is that of the data."""
    monkeypatch.chdir(place)
    return shutil.copytree(place / "whole", tmp_path / "run")


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def test_a_damaged_checkpoint_gives_way_loudly_to_that_of_an_epoch(place, run, capsys):
    damage(run / "ckpt_last.pt")
    damage(run / "ckpt_epoch_002.pt")
    assert fastbd("clean", "--run", run, "--force", "--device", "cpu") == 2  # another model is not cleaned in silence
    assert "ckpt_last.pt is damaged" in (said := capsys.readouterr().err) and "(whole ones there: 1)" in said
    assert fastbd("pretrain", "--resume", run) == 0
    said = capsys.readouterr().out
    assert f"{run}/ckpt_last.pt is damaged (member " in said and f"resumes from {run}/ckpt_epoch_001.pt" in said
    for name in ("log.jsonl", "metrics.jsonl"):
        assert rows(run, name) == rows(place / "whole", name)
    ends = [torch.load(folder / "ckpt_last.pt", weights_only=True) for folder in (place / "whole", run)]
    assert ends[0]["step"] == ends[1]["step"] == 8
    assert all(torch.equal(ends[1]["model"][name], value) for name, value in ends[0]["model"].items())


@pytest.mark.parametrize(("able", "taken"), [(True, "bf16"), (False, "fp32")])
def test_a_run_goes_on_in_the_precision_in_which_it_was_stopped(able, taken, run, monkeypatch, capsys):
    """Without a new measurement; on a processor that has no such instructions it says what has become of it."""
    state = torch.load(run / "ckpt_epoch_001.pt", weights_only=True)
    assert state.pop("precision") == "fp32"
    torch.save(state | {"precision": "bf16"}, run / "ckpt_last.pt")
    monkeypatch.setattr(opened, "has_bf16", lambda: able)
    monkeypatch.setattr(fastest, "measure", None)
    config = cli.parse("pretrain", ["--resume", str(run)])
    resumed = Run(config, pretrain.task(config, WORLD), WORLD)
    resumed.folder.release()
    assert resumed.opened.step.precision == taken
    assert ("the towers computed in bf16, now in fp32" in capsys.readouterr().out) == (not able)


def test_a_run_says_where_it_rounds_otherwise_than_before_it_was_stopped(run, capsys):
    """As without a compiler: batch norms and attention are summed in another order."""
    state = torch.load(run / "ckpt_epoch_001.pt", weights_only=True)
    assert state["libraries"] == native.found() == json.loads((run / "env.json").read_text())["libraries"]
    torch.save(state | {"libraries": ["abacus"]}, run / "ckpt_last.pt")
    assert fastbd("pretrain", "--resume", run) == 0
    now = ", ".join(native.found()) or "none"
    assert f"compiled libraries were abacus, now {now}: numbers will differ by rounding" in capsys.readouterr().out


def test_where_nothing_is_left_to_be_done_the_last_checkpoint_is_whole_again(place, run):
    damage(run / "ckpt_last.pt")
    assert fastbd("pretrain", "--resume", run) == 0
    assert (run / "ckpt_last.pt").read_bytes() == (run / "ckpt_epoch_002.pt").read_bytes()
    assert rows(run, "metrics.jsonl") == rows(place / "whole", "metrics.jsonl")


def test_a_resumption_that_is_refused_changes_nothing(run, capsys):
    damage(run / "ckpt_last.pt")
    edited(run / "config.json", lambda value: value.update(eval_data="nowhere.beton"))
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.name != ".lock"}
    with files.locked(run / ".lock"):
        assert fastbd("pretrain", "--resume", run) == 2 and "is being trained by" in capsys.readouterr().err
    assert fastbd("pretrain", "--resume", run) == 2 and "does not exist" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.name != ".lock"} == before


def test_a_run_of_a_study_is_left_to_its_sweep(run, tmp_path, capsys):
    """Which may have another process at work on it."""
    part = shutil.copytree(run, tmp_path / "study/runs/a")
    assert fastbd("pretrain", "--resume", part) == 0
    (tmp_path / "study/study.1").mkdir()
    (tmp_path / "study/study.1/study.json").touch()
    assert fastbd("pretrain", "--resume", part) == 2
    assert capsys.readouterr().err == (
        f"error: {part} is part of the study in {tmp_path}/study: go on with python -m fastbd sweep --out "
        f"{tmp_path}/study, or copy the run to another place.\n"
    )


def test_rows_that_were_lost_are_told_of(run, capsys):
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)  # of steps 2, 4, 6 and 8
    (run / "log.jsonl").write_text(lines[0] + lines[3])
    assert fastbd("pretrain", "--resume", run) == 0
    said = f"{run}/log.jsonl has lost 2 rows, the first of step 4: the run goes on without them\n"
    assert said in capsys.readouterr().out
    (run / "log.jsonl").write_text("".join(lines))
    assert fastbd("pretrain", "--resume", run) == 0 and "has lost" not in capsys.readouterr().out


def test_evaluations_that_were_added_are_not_the_runs_own(place, run):
    """In its seconds they have no place, nor in what is left to be measured."""
    whole = json.loads((place / "whole/result.json").read_text())
    *others, last = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    added = last | {"checkpoint": "last", "seconds": 1e4, "set": "other"}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*others, added)))
    assert fastbd("pretrain", "--resume", run) == 0
    found = rows(run, "metrics.jsonl")
    assert found[-2]["set"] == "other" and found[-1] == rows(place / "whole", "metrics.jsonl")[-1]
    assert json.loads((run / "result.json").read_text())["evaluate_seconds"] < 1e4 > whole["evaluate_seconds"]


def edited(path, change):
    value = json.loads(path.read_text())
    value.pop("crc32", None)  # as a plan says that is changed on purpose
    change(value)
    path.write_text(json.dumps(value))


CHANGES = {
    "trigger": (
        "plan.json",
        lambda v: v["attacks"][0]["trigger"].update(patch_size=7),
        "trigger, patch_size was 6 when",
    ),
    "seed": ("plan.json", lambda v: v.update(seed=5), "the plan, seed was 0 when that was saved, is now 5"),
    "data": ("plan.json", lambda v: v.update(data="0" * 64), "the plan, data was "),
    "lr": ("config.json", lambda v: v["config"].update(lr=0.5), "lr was 0.002 when that was saved, is now 0.5"),
    "dropped": ("config.json", lambda v: v["config"].pop("warmup"), "warmup was "),
    "model": (
        "config.json",
        lambda v: v.update(model="demo"),
        "model was 'tiny-rn' when that was saved, is now 'demo'",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_is_named(run, name, capsys):
    file, change, said = CHANGES[name]
    edited(run / file, change)
    if name == "dropped":
        edited(run / file, lambda v: v["config"].update(warmup=3))
    assert fastbd("pretrain", "--resume", run) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run}/{file} does not belong to {run}/ckpt_last.pt: ") and said in error
    assert error.endswith("; put back what was changed, or start the run again.\n") and error.count("\n") == 1


def test_a_damaged_plan_is_refused_and_one_that_is_gone_taken_from_the_checkpoint(run, capsys):
    plan = run / "plan.json"
    whole = plan.read_bytes()
    plan.write_bytes(whole[:-20])
    assert fastbd("pretrain", "--resume", run) == 2
    said = capsys.readouterr().err
    assert said == f"error: {plan} is damaged or was changed: remove it, and --resume writes it anew.\n"
    plan.unlink()
    assert fastbd("pretrain", "--resume", run) == 0
    assert f"{plan} was missing: written anew from ckpt_last.pt" in capsys.readouterr().out
    assert plan.read_bytes() == whole


def test_a_damaged_result_is_made_again(run):
    (run / "result.json").write_text("{")
    assert fastbd("pretrain", "--resume", run) == 0
    assert json.loads((run / "result.json").read_text())["reason"] == "finished"


CONTENTS = {
    "optimizer": {},
    "step": "x",
    "random": {},
    "config": [],
    "plan": 3,
}


@pytest.mark.parametrize("part", CONTENTS)
def test_a_checkpoint_of_other_parts_is_refused(run, part, capsys):
    state = torch.load(run / "ckpt_last.pt", weights_only=True)
    torch.save(state | {part: CONTENTS[part]}, run / "ckpt_last.pt")
    assert fastbd("pretrain", "--resume", run) == 2
    assert f"error: {run}/ckpt_last.pt has no {part}, so that it is not" in capsys.readouterr().err


@pytest.mark.parametrize("step", [-5, 10**9])
def test_a_step_that_the_run_has_not_is_refused(run, step, capsys):
    state = torch.load(run / "ckpt_last.pt", weights_only=True)
    torch.save(state | {"step": step}, run / "ckpt_last.pt")
    assert fastbd("pretrain", "--resume", run) == 2
    assert f"is of step {step}, and its run has 8 steps" in capsys.readouterr().err


def test_another_runs_checkpoint_is_refused(place, run, capsys):
    shutil.copyfile(place / "cleaned" / "ckpt_last.pt", run / "ckpt_last.pt")
    assert fastbd("pretrain", "--resume", run) == 2
    assert "verb was 'clean' when that was saved, is now 'pretrain'" in capsys.readouterr().err


def test_other_data_is_refused_and_a_moved_one_is_not(place, run, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copyfile(place / "val.beton", moved / "other.beton")
    edited(
        run / "config.json",
        lambda v: (v.update(eval_data=f"{moved}/other.beton"), v["config"].update(eval_data=f"{moved}/other.beton")),
    )
    assert fastbd("pretrain", "--resume", run) == 0
    shutil.copyfile(place / "train.beton", moved / "other.beton")
    assert fastbd("pretrain", "--resume", run) == 2
    assert "was saved by a run with other content of --eval-data" in capsys.readouterr().err


def test_an_older_checkpoint_is_still_resumed(run, monkeypatch):
    monkeypatch.setattr(opened, "has_bf16", lambda: True)
    state = torch.load(run / "ckpt_last.pt", weights_only=True)
    del state["inputs"], state["precision"]  # which was fp32 on every CPU
    state["config"] |= {"gone": 1}
    state["step"], state["epoch"], state["seconds"] = 4, 1.0, 5000.0
    torch.save(state, run / "ckpt_last.pt")
    written = json.loads((run / "config.json").read_text())
    edited(run / "config.json", lambda v: [v.pop(name) for name in ("start_step", "start_weights")])  # not known then
    assert fastbd("pretrain", "--resume", run) == 0
    assert torch.load(run / "ckpt_last.pt", weights_only=True)["step"] == 8
    assert {row["precision"] for row in rows(run, "metrics.jsonl")} == {"fp32"}
    assert 5000 < json.loads((run / "result.json").read_text())["seconds"] < 6000  # with those before it was stopped
    assert fastbd("pretrain", "--resume", run) == 0  # from what has just been written
    assert written.keys() > json.loads((run / "config.json").read_text()).keys()


def test_what_does_not_matter_to_the_numbers_may_change():
    """As in a study whose entry of log_every was changed while some of its runs were under way."""
    was = {"lr": 1e-3, "log_every": 10, "max_bad": 0.0, "data": "/a/train.beton", "attacks": [{"rate": 1}]}
    assert difference(was, was | {"log_every": 7, "max_bad": 0.1, "data": "/b/other.beton"}) is None
    assert difference(was, was | {"lr": 2e-3}) == ("lr", 1e-3, 2e-3)
    assert difference(was, was | {"attacks": [{"rate": 2}]}) == ("attacks[0], rate", 1, 2)
