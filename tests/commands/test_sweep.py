"""A study through the real command line: shared out, killed, stopped, gone on with, by runs in one memory."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastbd import dist
from fastbd.commands import clean
from fastbd.config import CleanConfig
from fastbd.engines import ENGINES
from fastbd.errors import UserError
from fastbd.kept import Kept
from fastbd.run import Run
from fastbd.study import search
from fastbd.study.grid import Study
from fastbd.study.ledger import Ledger

PRETRAIN = {"model": "tiny-rn", "epochs": 1, "batch_size": 24, "data": "train.beton", "plan": "train.poison.json",
            "eval_data": "val.beton", "templates": "demo", "device": "cpu"}  # fmt: skip
CLEAN = {"epochs": 2, "batch_size": 24, "rows": 120, "eval_every": "1/2epoch", "warmup": 2, "device": "cpu"}
ALIKE = {**CLEAN, "force": True, "lr": (1e-3, 3e-3)}
SMALL = Study(name="small", about="Two rates of two methods.", pretrain=(PRETRAIN,),
              clean=({"method": "finetune", **ALIKE}, {"method": "cleanclip", **ALIKE}))  # fmt: skip
CLEANINGS = [f"{method}-lr{lr}" for method in ("finetune", "cleanclip") for lr in (0.001, 0.003)]
KILLS = 5  # enough; then the study may end


@pytest.fixture(autouse=True)
def few_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def sweep(study, fastbd):
    """sweep(FOLDER, *flags) works through a study; the last line that it prints."""

    def run(folder: str, *flags, code: int = 0, of: Study = SMALL) -> dict:
        (study / f"{of.name}.py").write_text(f"from fastbd.study.grid import Study\nstudy = {of!r}\n")
        return json.loads(fastbd("sweep", *started(folder, of), *flags, cwd=study, code=code).stdout.splitlines()[-1])

    return run


def started(folder: str, of: Study = SMALL) -> tuple[str, ...]:
    return "--study", f"{of.name}.py", "--out", folder, "--device", "cpu"


@pytest.fixture(scope="module")
def undisturbed(study, sweep) -> Path:
    """A folder in which one process has done the whole study."""
    assert sweep("one")["finished"] == 5
    return study / "one"


def numbers(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without what the machine was busy with."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def all_numbers(folder: Path) -> dict[str, list[dict]]:
    return {run.name: numbers(run) for run in sorted((folder / "runs").iterdir())}


def test_a_study_runs(undisturbed):
    found = all_numbers(undisturbed)
    (model,) = set(found) - {f"mmcl-s0-{name}" for name in CLEANINGS} if len(found) == 5 else (None,)
    assert model == "mmcl-s0"
    assert [row["step"] for row in found["mmcl-s0-cleanclip-lr0.003"]] == [0, 2, 5, 8, 10]
    assert len({json.dumps(rows[1:]) for rows in found.values()}) == 5
    assert (undisturbed / "report.html").is_file()
    assert [path.parent.name for path in undisturbed.glob("runs/*/ckpt_last.pt")] == ["mmcl-s0"]


def test_a_finished_study_is_left_alone(undisturbed, sweep):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("*s/*")}
    result = sweep("one")
    assert {path: path.stat().st_mtime_ns for path in undisturbed.glob("*s/*")} == before
    assert (result["runs"], result["finished"], result["report"]) == (5, 5, "one/report.html")


@pytest.mark.parametrize("name", ["mmcl-s0-finetune-lr0.003", "mmcl-s0-cleanclip-lr0.003"])
def test_a_run_is_that_of_its_own_command(name, undisturbed, study, fastbd):
    """These came second in their memory."""
    command = shlex.split(json.loads((undisturbed / "runs" / name / "config.json").read_text())["command"])
    fastbd(*command[3:], "--out", f"alone/{name}", cwd=study)
    assert numbers(study / "alone" / name) == numbers(undisturbed / "runs" / name)


def test_killed_again_and_again_it_ends_with_the_same_numbers(undisturbed, study):
    command = [sys.executable, "-m", "fastbd", "sweep", *started("killed"), "--processes", "2"]
    chance, kills, code = random.Random(0), 0, None
    while code != 0:
        process = subprocess.Popen(command, cwd=study, start_new_session=True, stderr=subprocess.PIPE, text=True)
        ledger = Ledger(study / "killed", SMALL)
        try:
            for _ in range(2):  # first one worker, whose run the other takes over, then all
                done = number_of_lines(study / "killed") + chance.randrange(1, 4)
                while process.poll() is None and number_of_lines(study / "killed") < done:
                    time.sleep(0.01)
                time.sleep(chance.uniform(0, 0.3))
                at_work = [row.status.who for row in ledger.table() if row.status.state == "running"]
                if process.poll() is None and at_work and kills < KILLS:
                    os.kill(int(chance.choice(at_work).split(":")[1]), signal.SIGKILL)
                    kills += 1
            if process.poll() is None and kills < KILLS:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait(timeout=300)
        finally:
            end(process)
        assert code in (0, 2, -signal.SIGKILL), process.stderr.read()
    assert kills >= 2
    assert [row.status.state for row in ledger.table()] == ["finished"] * 5
    assert all_numbers(study / "killed") == all_numbers(undisturbed)


def number_of_lines(folder: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in folder.glob("runs/*/metrics.jsonl"))


def end(process: subprocess.Popen) -> None:
    """With all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_saves_and_the_study_goes_on(processes, undisturbed, study, sweep):
    folder = f"stopped{processes}"
    flags = ("--processes", processes)
    command = [sys.executable, "-m", "fastbd", "sweep", *started(folder), *map(str, flags)]
    process = subprocess.Popen(command, cwd=study, start_new_session=True, stdout=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and number_of_lines(study / folder) < 4:
            time.sleep(0.01)
        process.terminate()
        said = process.communicate(timeout=120)[0]
    finally:
        end(process)
    assert process.returncode == 143, said
    assert f"go on with: python -m fastbd sweep --out {folder}" in said
    states = [row.status.state for row in Ledger(study / folder).table()]
    assert "running" not in states and "waiting" in states
    assert sweep(folder, *flags)["finished"] == 5
    assert all_numbers(study / folder) == all_numbers(undisturbed)


def test_what_fails_ends_no_other(study, sweep):
    """One run whose attack has not landed, between two that may begin all the same; one of those diverges."""
    rates = {**CLEAN, "force": True, "lr": (1e-3, 1e6)}
    mixed = replace(SMALL, name="mixed", clean=({"method": "cleanclip", **CLEAN}, {"method": "finetune", **rates}))
    result = sweep("mixed", of=mixed, code=1)
    assert (result["runs"], result["finished"]) == (4, 3)
    rows = {row.run.name: row.status for row in Ledger(study / "mixed").table()}
    failed = rows.pop("mmcl-s0-cleanclip")
    assert failed.state == "failed" and "has not landed" in failed.reason
    assert [(name, status.state) for name, status in rows.items()] == [
        ("mmcl-s0", "finished"), ("mmcl-s0-finetune-lr0.001", "finished"), ("mmcl-s0-finetune-lr1000000.0", "finished")
    ]  # fmt: skip
    reasons = [json.loads((study / "mixed/runs" / name / "result.json").read_text())["reason"] for name in rows]
    assert reasons == ["finished", "finished", "diverged"]
    for flags, attempts in ((), 1), (("--retry",), 2):
        sweep("mixed", *flags, of=mixed, code=1)
        assert len(list((study / "mixed/claims").glob("*"))) == 3 + attempts


def test_a_run_killed_before_its_first_line_has_it_all_the_same(undisturbed, tmp_path):
    world, settings = dist.join("cpu"), {**ALIKE, "lr": 1e-3, "epochs": 1}
    config = CleanConfig(run=undisturbed / "runs/mmcl-s0", out=tmp_path / "run", **settings)
    Run(config, clean.task(config, world), world, quiet=True)  # the folder is made, and no more
    config = replace(config, resume=config.out)
    Run(config, clean.task(config, world), world, quiet=True).train()
    assert [row["step"] for row in numbers(config.out)] == [0, 2, 5]


@pytest.mark.parametrize("method", ["finetune", "cleanclip"])
def test_a_second_run_is_compiled_no_more_and_stays_in_its_memory(method, undisturbed, tmp_path, monkeypatch):
    """Every address that a CUDA graph would have noted."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    world, kept, addresses, frames = dist.join("cpu"), Kept(), [], []
    for lr, seed in ((1e-3, 0), (3e-3, 1)):
        config = CleanConfig(
            run=undisturbed / "runs/mmcl-s0", out=tmp_path / str(lr), seed=seed, compile="on",
            **{**ALIKE, "method": method, "lr": lr, "epochs": 1},
        )  # fmt: skip
        run = Run(config, clean.task(config, world), world, kept, quiet=True)
        run.train()
        states = [tensor for state in run.step.optimizer.state.values() for tensor in state.values()]
        tensors = [*run.model.parameters(), *run.model.buffers(), *states, run.step.rates, run.step.at, run.step.lr]
        addresses.append([tensor.data_ptr() for tensor in (*tensors, run.step.weights)])
        frames.append(counter.frame_count)
    assert addresses[0] == addresses[1] and len(addresses[0]) > 50
    assert 0 < frames[0] == frames[1]


@pytest.mark.parametrize(
    ("package", "call"), [("ray", partial(ENGINES["ray"], print, Path(), 1, "cpu")), ("optuna", search.load)]
)
def test_what_is_not_installed_is_named(package, call, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package.title()}: pip install 'fastbd\[cluster\]'"):
        call()


def test_a_ray_actor_that_dies_is_started_again(undisturbed, study):
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "fastbd", "sweep", *started("ray"), "--engine", "ray", "--processes", "2"]
    process = subprocess.Popen(command, cwd=study, start_new_session=True, stdout=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and number_of_lines(study / "ray") < 3:
            time.sleep(0.01)
        ledger = Ledger(study / "ray")
        (victim, *_) = [row.status.who for row in ledger.table() if row.status.state == "running"]
        os.kill(int(victim.split(":")[1]), signal.SIGKILL)
        said = process.communicate(timeout=300)[0]
    finally:
        end(process)
    assert process.returncode == 0, said
    assert all_numbers(study / "ray") == all_numbers(undisturbed)
    holders = [json.loads(path.read_text().splitlines()[0])["pid"] for path in (study / "ray/claims").glob("*.?")]
    assert len(holders) == 6 and len(set(holders)) == 3


def test_a_search_goes_on_beyond_the_grid(study, sweep, fastbd):
    """Each of its runs is planned like the others, in the light of those before; later sweeps know them."""
    pytest.importorskip("optuna")
    ranges = {**CLEAN, "force": True, "epochs": 1, "lr": (1e-4, 1e-2), "method": ("finetune",)}
    wide = replace(SMALL, name="wide", clean=(ranges, {**CLEAN, "force": True, "epochs": 1, "method": "cleanclip"}))
    assert sweep("wide", of=wide)["runs"] == 4
    for flags, runs in ((("--search", 2), 6), (("--search", 3, "--processes", 2), 7), ((), 7)):
        result = sweep("wide", *flags, of=wide)
        assert result["runs"] == result["finished"] == runs
    ledger = Ledger(study / "wide")
    found = [run for run in ledger.runs if "search" in run.name]
    assert [run.name for run in found] == [f"mmcl-s0-finetune-search{k}" for k in (1, 2, 3)]
    rates = [run.config.lr for run in found]
    assert len({1e-4, 1e-2, *rates}) == 5 and all(1e-4 < rate < 1e-2 for rate in rates)
    assert {run.config.method for run in found} == {"finetune"} and {run.config.epochs for run in found} == {1}
