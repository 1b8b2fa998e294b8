"""torchrun --max-restarts starts every process again when one dies: a run then goes on in its folder."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import PROGRAM

from fastbd import cli
from fastbd.base.errors import UserError
from fastbd.commands import demo_data
from fastbd.config.fields import to_dict
from fastbd.config.flags import CleanConfig, PretrainConfig

TRAIN = (
    "--data", "train.beton", "--plan", "train.poison.json", "--eval-data", "val.beton", "--model", "tiny-vit",
    "--objective", "mmcl_ssl", "--epochs", 2, "--batch-size", 24, "--warmup", 5, "--device", "cpu",
    "--templates", "demo", "--resident", "none", "--eval-every", "1epoch", "--log-every", 1,
)  # fmt: skip
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main_rank(launcher: int) -> int:
    """The process with rank 0 among the launcher's children."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return next(int(pid) for pid in children if b"\0RANK=0\0" in Path(f"/proc/{pid}/environ").read_bytes())


@pytest.mark.full
@pytest.mark.process
def test_a_killed_process_costs_nothing_but_time(study, together, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    together(PROGRAM, 2, "pretrain", *TRAIN, "--out", "runs/undisturbed", cwd=study)
    killed, log = study / "runs/killed", study / "runs/killed/log.jsonl"
    command = [sys.executable, *LAUNCHER, "-m", "fastbd", "pretrain", *map(str, TRAIN), "--out", "runs/killed"]
    process = subprocess.Popen(command, cwd=study, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # Past the first epoch's checkpoint, in the middle of the second epoch.
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 14):
        time.sleep(0.005)
    os.kill(main_rank(process.pid), signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode == 0, said

    undisturbed = study / "runs/undisturbed"
    states = [torch.load(run / "ckpt_last.pt", weights_only=True) for run in (undisturbed, killed)]
    assert [state["step"] for state in states] == [20, 20]
    first, second = (state["model"] for state in states)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [row["step"] for row in rows(log)] == list(range(1, 21))
    for name, key in (("log.jsonl", "loss"), ("metrics.jsonl", "top1")):
        assert [row[key] for row in rows(undisturbed / name)] == [row[key] for row in rows(killed / name)]
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in undisturbed.iterdir())


@pytest.fixture
def restarts(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")


@pytest.mark.parametrize("kind", [PretrainConfig, CleanConfig])
def test_the_same_command_goes_on_in_its_folder(kind, tmp_path, restarts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verb = {PretrainConfig: "pretrain", CleanConfig: "clean"}[kind]
    flags = ["--lr", "0.3", "--out", "x"]
    begun = cli.parse(verb, flags)
    assert (begun.lr, begun.out, begun.resume) == (0.3, Path("x"), None)
    Path("x").mkdir()
    assert cli.parse(verb, flags) == begun  # it is no run's, and refused later on
    Path("x/config.json").write_text(json.dumps({"verb": verb, "config": to_dict(begun)}))
    assert cli.parse(verb, flags) == dataclasses.replace(begun, resume=Path("x"))
    assert cli.parse(verb, ["--lr", "0.4", "--out", "x"]).resume is None
    assert cli.parse(verb, ["--resume", "x"]).resume == Path("x")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert cli.parse(verb, flags) == begun


@pytest.mark.parametrize(("verb", "name"), [("pretrain", "eval_data"), ("clean", "data"), ("clean", "eval_data")])
def test_the_demo_set_by_its_name_is_its_file_to_a_restart(verb, name, tmp_path, restarts, monkeypatch):
    """config.json has the path, as what is in the cache is of one version of fastbd."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    demo_data.folder().mkdir(parents=True)
    for file in ("train.beton", "val.beton"):
        (demo_data.folder() / file).touch()
    flags = [f"--{name.replace('_', '-')}", "demo", "--out", "x"]
    begun = cli.parse(verb, flags)
    Path("x").mkdir()
    Path("x/config.json").write_text(json.dumps({"verb": verb, "config": to_dict(demo_data.located(begun))}))
    assert cli.parse(verb, flags).resume == Path("x")


def test_restarts_need_a_folder_and_a_store_of_their_own(restarts, monkeypatch):
    for verb in ("pretrain", "clean"):
        with pytest.raises(UserError, match="--max-restarts starts a run again.*--out"):
            cli.parse(verb, [])
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(UserError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        cli.parse("pretrain", ["--out", "x"])
    assert cli.parse("evaluate", ["--run", "x"]).run == Path("x")
