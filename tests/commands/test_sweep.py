"""A study through the real command line: shared out, killed, stopped, gone on with, by runs in one memory."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from cleanings import start
from forked import command, end
from matplotlib.figure import Figure
from tables import table
from torch._dynamo.testing import CompileCounterWithBackend

from fastbd import cli
from fastbd.base import dist
from fastbd.base.errors import UserError
from fastbd.base.run_folder import find
from fastbd.commands import clean
from fastbd.commands import sweep as sweep_command
from fastbd.config.flags import CleanConfig, SweepConfig
from fastbd.data import resident
from fastbd.evals.zeroshot import ZeroShot
from fastbd.report import write
from fastbd.study import patience
from fastbd.study.engines import load_ray
from fastbd.study.grid import Study
from fastbd.study.ledger import Ledger, _read_claim
from fastbd.training import fastest, opened, watch
from fastbd.training.reuse import Kept
from fastbd.training.run import Run

PRETRAIN = {
    "model": "tiny-rn",
    "epochs": 1,
    "batch_size": 24,
    "data": "train.beton",
    "plan": "train.poison.json",
    "eval_data": "val.beton",
    "templates": "demo",
    "device": "cpu",
}
CLEAN = {"epochs": 2, "batch_size": 24, "rows": 120, "eval_every": "1/2epoch", "warmup": 2, "device": "cpu"}
ALIKE = {**CLEAN, "force": True, "lr": (1e-3, 3e-3)}
SMALL = Study(
    name="small",
    about="Two rates of two methods.",
    pretrain=(PRETRAIN,),
    clean=({"method": "finetune", **ALIKE}, {"method": "cleanclip", **ALIKE}),
)
CLEANINGS = [f"{method}-lr{lr}" for method in ("finetune", "cleanclip") for lr in (0.001, 0.003)]
KILLS = 3  # enough; then the study may end
pytestmark = pytest.mark.process


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For all processes, this one too: sums that more of them share out are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def blank_figures():
    """In the reports of this process: what figures show is tested elsewhere, and takes seconds."""

    def blank(name: str) -> Callable[[list], Figure]:
        def draw(runs: list) -> Figure:
            return Figure(figsize=(1, 1))

        draw.__name__ = name
        return draw

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "shown", lambda runs: [blank(name) for name in ("scatter", "trajectories")])
        patch.setattr(write.interactive, "installed", lambda: False)
        yield


@pytest.fixture(scope="module")
def sweep(study, fastbd):
    """sweep(FOLDER, *flags) works through a study; the last line that it prints."""

    def run(folder: str, *flags, code: int = 0, of: Study = SMALL) -> dict:
        (study / f"{of.name}.py").write_text(f"from fastbd.study.grid import Study\nstudy = {of!r}\n")
        line = ("sweep", *started(folder, of), "--processes", 1, *flags)
        return json.loads(fastbd(*line, cwd=study, code=code).stdout.splitlines()[-1])

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
    assert (undisturbed / "report/index.html").is_file()
    assert [path.parent.name for path in undisturbed.glob("runs/*/ckpt_last.pt")] == ["mmcl-s0"]


def test_a_finished_study_is_left_alone(undisturbed, sweep):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("*s/*")}
    result = sweep("one")
    assert {path: path.stat().st_mtime_ns for path in undisturbed.glob("*s/*")} == before
    assert (result["runs"], result["finished"], result["report"]) == (5, 5, "one/report/index.html")


def test_a_finished_study_needs_no_data(undisturbed, fastbd, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "moved")  # to where train.beton is not
    result = json.loads(fastbd("sweep", "--out", "moved", "--processes", 1, cwd=tmp_path).stdout.splitlines()[-1])
    assert (result["runs"], result["finished"]) == (5, 5)


@pytest.mark.parametrize("name", ["mmcl-s0-finetune-lr0.003", "mmcl-s0-cleanclip-lr0.003"])
def test_a_run_is_that_of_its_own_command(name, undisturbed, study, fastbd):
    """These came second in their memory."""
    command = shlex.split(json.loads((undisturbed / "runs" / name / "config.json").read_text())["command"])
    fastbd(*command[3:], "--out", f"alone/{name}", cwd=study)
    assert numbers(study / "alone" / name) == numbers(undisturbed / "runs" / name)


def test_killed_again_and_again_it_ends_with_the_same_numbers(undisturbed, study):
    chance, kills, code, said = random.Random(0), 0, None, study / "killed.txt"
    while code != 0:
        process = command("sweep", *started("killed"), "--processes", 2, cwd=study, said=said)
        ledger = Ledger(study / "killed", SMALL)
        try:
            for _ in range(2):  # first one worker, whose run the other takes over, then all
                done = number_of_lines(study / "killed") + chance.randrange(1, 4)
                while process.is_alive() and number_of_lines(study / "killed") < done:
                    time.sleep(0.01)
                time.sleep(chance.uniform(0, 0.3))
                at_work = [row.status.who for row in ledger.table() if row.status.state == "running"]
                if process.is_alive() and at_work and kills < KILLS:
                    os.kill(int(chance.choice(at_work).split(":")[1]), signal.SIGKILL)
                    kills += 1
            if process.is_alive() and kills < KILLS:
                process.kill()  # the first process alone: the others save their runs and end
            process.join(300)
            code = process.exitcode
            assert code != -signal.SIGKILL or ended(process.pid)
        finally:
            end(process)
        assert code in (0, 2, -signal.SIGKILL), said.read_text()
    assert kills >= 2
    assert [row.status.state for row in ledger.table()] == ["finished"] * 5
    assert all_numbers(study / "killed") == all_numbers(undisturbed)


def number_of_lines(folder: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in folder.glob("runs/*/metrics.jsonl"))


def ended(group: int) -> bool:
    """Whether all processes of the group end soon."""
    until = time.monotonic() + 60
    while (left := living(group)) and time.monotonic() < until:
        time.sleep(0.1)
    return not left


def living(group: int) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, of = path.read_text().rpartition(")")[2].split()[:3]
            found += [path.parent.name] if int(of) == group and state not in "ZX" else []
    return found


@pytest.mark.parametrize(("processes", "signum"), table([(1, signal.SIGUSR1), (2, signal.SIGHUP)], (2, signal.SIGHUP)))
def test_a_signal_saves_and_the_study_goes_on(processes, signum, undisturbed, study, sweep):
    """One that the whole group is sent, as by a scheduler or a terminal that is lost."""
    folder = f"stopped{processes}"
    said = study / f"{folder}.txt"
    process = command("sweep", *started(folder), "--processes", processes, cwd=study, said=said)
    try:
        while process.is_alive() and number_of_lines(study / folder) < 4:
            time.sleep(0.01)
        os.killpg(process.pid, signum)
        process.join(120)
    finally:
        end(process)
    assert process.exitcode == 128 + signum, said.read_text()
    assert f"go on with: python -m fastbd sweep --out {folder}" in said.read_text()
    states = [row.status.state for row in Ledger(study / folder).table()]
    assert "running" not in states and "waiting" in states
    assert sweep(folder)["finished"] == 5
    assert all_numbers(study / folder) == all_numbers(undisturbed)


@pytest.fixture
def here(study, monkeypatch, tmp_path, capsys):
    """here(study, *flags) sweeps within this process; the ledger, and the last line that is printed.

    The folder has a model, runs/start, which is not trained.
    """
    monkeypatch.chdir(study)
    start(study)

    def run(of: Study, *flags, code: int) -> tuple[Ledger, dict]:
        out = Ledger(tmp_path / of.name, of).folder
        assert cli.main(["sweep", "--out", str(out), "--device", "cpu", "--processes", "1", *map(str, flags)]) == code
        said = capsys.readouterr().out.splitlines()
        return Ledger(out), {**json.loads(said[-1]), "said": said[:-1]}

    return run


def of_models(name: str, *models: str, clean: tuple) -> Study:
    return Study(name=name, about="", pretrained=tuple(Path("runs") / model for model in models), clean=clean)


def statuses(ledger: Ledger) -> dict[str, str]:
    return {row.run.name: row.status.state for row in ledger.table()}


def test_a_study_keeps_which_precision_is_faster_for_a_model(here, monkeypatch):
    monkeypatch.setattr(opened, "has_bf16", lambda: True)
    monkeypatch.setattr(fastest, "measure", lambda model, images: {"fp32": 2.0, "bf16": 1.0})
    small = {**CLEAN, "rows": 24, "epochs": 1, "force": True, "eval_every": "epoch"}
    ledger, _ = here(of_models("fast", "start", clean=({"method": "finetune", **small},)), code=0)
    assert json.loads((ledger.folder / fastest.FILE).read_text()) == {"tiny-rn": {"fp32": 2.0, "bf16": 1.0}}
    assert [numbers(run.out)[-1]["precision"] for run in ledger.runs] == ["bf16"]


def test_what_runs_have_in_common_is_done_once(here, monkeypatch):
    """Of three cleanings of one model: opening the evaluation set, decoding the pairs, evaluating where they begin."""
    done = Counter()

    def counted(name: str, call: Callable) -> Callable:
        def count(*arguments, **keywords):
            done[name] += 1
            return call(*arguments, **keywords)

        return count

    for owner, name in ((watch, "open_set"), (resident, "_fill"), (ZeroShot, "__call__")):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    rates = {**CLEAN, "rows": 24, "epochs": 1, "force": True, "eval_every": "epoch", "lr": (1e-4, 1e-3, 1e-2)}
    ledger, _ = here(of_models("alike", "start", clean=({"method": "finetune", **rates},)), code=0)
    assert [len(numbers(run.out)) for run in ledger.runs] == [2, 2, 2]
    assert done == {"open_set": 1, "_fill": 1, "__call__": 1 + 3}


def test_what_fails_ends_no_other(here):
    """One run whose attack has not landed, between two that may begin all the same; one of those diverges."""
    rates = {**CLEAN, "epochs": 1, "force": True, "lr": (1e-3, 1e6)}
    mixed = of_models("mixed", "start", clean=({"method": "cleanclip", **CLEAN}, {"method": "finetune", **rates}))
    ledger, result = here(mixed, code=1)
    assert (result["runs"], result["finished"]) == (3, 2)
    (failed,) = [row for row in ledger.table() if row.status.state == "failed"]
    assert failed.run.config.method == "cleanclip" and "has not landed" in failed.status.reason
    told = [k for k, line in enumerate(result["said"]) if line.startswith("start-s0-cleanclip failed: ")]
    assert told and told[0] < [line.startswith("wrote ") for line in result["said"]].index(True)
    cleaned = [run for run in ledger.runs if run.config.method == "finetune"]
    assert [json.loads(run.product.read_text())["reason"] for run in cleaned] == ["finished", "diverged"]
    assert not list(ledger.folder.glob("runs/*/ckpt_*"))
    assert f"try what failed again with: python -m fastbd sweep --out {ledger.folder} --retry" in result["said"]
    for flags, attempts in ((), 1), (("--retry",), 2):
        here(mixed, *flags, code=1)
        assert len(list((ledger.folder / "claims").glob("*"))) == 2 + attempts


def copy(name: str, **changes) -> None:
    """runs/NAME is runs/start with changes in its checkpoint."""
    shutil.copytree("runs/start", f"runs/{name}")
    config = json.loads(Path("runs/start/config.json").read_text())
    Path(f"runs/{name}/config.json").write_text(json.dumps({**config, "name": name}))
    state = torch.load("runs/start/ckpt_last.pt", weights_only=True)
    torch.save({**state, **changes}, f"runs/{name}/ckpt_last.pt")


def test_what_goes_wrong_before_training_fails_once(here):
    """A model of no numbers, and one with an error that is none of the user's; then there is nothing to report."""
    model = torch.load("runs/start/ckpt_last.pt", weights_only=True)["model"]
    copy("nan", model={name: value * float("nan") for name, value in model.items()})
    copy("cut", about={})
    ledger, result = here(of_models("wrong", "nan", "cut", clean=({**CLEAN, "force": True},)), code=1)
    assert (result["runs"], result["finished"], result["report"], result["best"]) == (2, 0, None, {})
    reasons = [row.status.reason for row in ledger.table()]
    assert "not finite" in reasons[0] and reasons[1] == "KeyError: 'model'"
    assert "Traceback (most recent call last):" in result["said"]
    assert any(line.startswith("there is no report: ") for line in result["said"])
    assert len(list((ledger.folder / "claims").glob("*"))) == 2


def test_a_pretraining_that_diverges_is_not_cleaned(here):
    bad = Study(name="bad", about="", pretrain=({**PRETRAIN, "lr": 1e6},), clean=({**CLEAN, "lr": (1e-3, 1e-4)},))
    ledger, result = here(bad, code=1)
    assert list(statuses(ledger).values()) == ["failed", "blocked", "blocked"]
    assert "blocked by what failed: 2" in result["said"] and result["report"] is None


def test_a_run_that_never_finds_memory_fails_and_the_others_end(here, monkeypatch):
    """More than any machine has, for one of two; it ends by itself, long before the night is over."""
    pauses: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", pauses.append)
    train = sweep_command._train

    def greedy(claim, *rest) -> str:
        if claim.run.config.lr == 1e-3:
            torch.empty(1 << 60, dtype=torch.uint8)
        return train(claim, *rest)

    monkeypatch.setattr(sweep_command, "_train", greedy)
    rates = {**CLEAN, "method": "finetune", "epochs": 1, "force": True, "lr": (1e-3, 3e-3)}
    ledger, result = here(of_models("greedy", "start", clean=(rates,)), code=1)
    assert sorted(statuses(ledger).values()) == ["failed", "finished"]
    (reason,) = [row.status.reason for row in ledger.table() if row.status.reason]
    assert reason.startswith(f"there was not enough memory in {sweep_command.TRIES} tries (") and "allocate" in reason
    assert any("--retry" in line for line in result["said"])
    assert len(pauses) == sweep_command.TRIES - 1 and sum(pauses) < 3600


def test_nothing_is_written_for_a_run_that_is_anothers(here, tmp_path):
    ledger = Ledger(tmp_path / "lost", of_models("lost", "start", clean=({**CLEAN, "epochs": 1, "force": True},)))
    claim = ledger.take()
    run = Run(claim.run.config, clean.task(claim.run.config, dist.join("cpu")), dist.join("cpu"), quiet=True)
    claim.release()
    assert Ledger(ledger.folder).take().held() and not claim.lost
    how = sweep_command._do(claim, ledger, SweepConfig(), Kept(), dist.join("cpu"))
    assert how == "taken over by another process"
    assert {path.name for path in run.folder.path.glob("*.*")} >= {"ckpt_last.pt"}
    assert not (run.folder.path / "metrics.jsonl").exists() and not claim.run.product.exists()


def test_asha_compares_what_differs_in_its_rates_alone():
    first = CleanConfig(run=Path("runs/a"), lr=1e-3, warmup=5)
    others = [{"lr": 1e-4, "warmup": 9, "out": Path("b")}, {"objective": "ssl"}, {"run": Path("runs/b")}, {"rows": 9}]
    found = [sweep_command._but_for_rates(replace(first, **other)) for other in others]
    assert [one == sweep_command._but_for_rates(first) for one in found] == [True, False, False, False]


def test_a_run_killed_before_its_first_line_has_it_all_the_same(undisturbed, tmp_path):
    world, settings = dist.join("cpu"), {**ALIKE, "lr": 1e-3, "epochs": 1}
    config = CleanConfig(run=undisturbed / "runs/mmcl-s0", out=tmp_path / "run", **settings)
    Run(config, clean.task(config, world), world, quiet=True).folder.release()  # the folder is made, and no more
    config = replace(config, resume=config.out)
    Run(config, clean.task(config, world), world, quiet=True).train()
    assert [row["step"] for row in numbers(config.out)] == [0, 2, 5]


def test_a_damaged_study_is_one_sentence(undisturbed, study, fastbd, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "cut")
    path = tmp_path / "cut/study.1/study.json"
    path.write_bytes(path.read_bytes()[:200])
    said = fastbd("sweep", "--out", tmp_path / "cut", cwd=study, code=2).stderr
    assert said.startswith(f"error: {path} is damaged") and said.count("\n") == 1
    assert f"remove {path.parent} and name the study again with --study" in said


# DISK DAMAGED PYTHON SAID RESULT: the sweep in DAMAGED is resumed on a small disk, which fills up when its first run
# has begun; room is made when it says that it waits, and what it has made is copied to RESULT.
ON_A_FULL_DISK = """
mount -t tmpfs -o size=64m tmpfs "$1" || exit 77
cp -r "$2" "$1/out"
"$3" -m fastbd sweep --out "$1/out" --device cpu --processes 1 > "$4" &
until [ -d "$1/out/aside" ] || ! kill -0 $!; do sleep 0.02; done
cat /dev/zero > "$1/ballast"
until grep -q "trying again in 2 s" "$4" || ! kill -0 $!; do sleep 0.1; done
ls "$1/out/failed"
rm "$1/ballast"
wait $!
code=$?
cp -r "$1/out" "$5"
exit $code
"""


@pytest.mark.full
def test_what_is_damaged_is_made_again_also_on_a_disk_that_is_full_for_a_while(undisturbed, study, tmp_path):
    """A pre-training is resumed from its checkpoint; a cleaning, which has none left, begins anew beside what it was.

    Neither fails for want of room: the sweep waits for it.
    """
    damaged, disk, said, found = (tmp_path / name for name in ("damaged", "disk", "said", "found"))
    shutil.copytree(undisturbed, damaged)
    cleaning = damaged / "runs/mmcl-s0-cleanclip-lr0.003"
    (damaged / "runs/mmcl-s0/result.json").write_bytes(b"")
    (cleaning / "result.json").write_bytes((cleaning / "result.json").read_bytes()[:40])
    disk.mkdir()
    command = ["unshare", "-rm", "sh", "-c", ON_A_FULL_DISK, "sh", disk, damaged, sys.executable, said, found]
    done = subprocess.run(command, cwd=study, capture_output=True, text=True, timeout=300)
    if done.returncode == 77 or done.stderr.startswith("unshare: "):
        pytest.skip("needs the right to mount")
    assert done.returncode == 0 and done.stdout == "", f"{said.read_text()}\n{done.stderr}"  # none is in failed/
    assert "No space left on device: nothing is lost; trying again in 1 s" in said.read_text()
    assert all_numbers(found) == all_numbers(undisturbed)
    checkpoint = Path("runs/mmcl-s0/ckpt_last.pt")
    assert (found / checkpoint).read_bytes() == (undisturbed / checkpoint).read_bytes()
    aside = {path.name: path for path in (found / "aside").iterdir()}
    assert set(aside) == {"runs-mmcl-s0-cleanclip-lr0.003.1.tmp", "runs-mmcl-s0-result.json.1.tmp"}
    assert numbers(aside["runs-mmcl-s0-cleanclip-lr0.003.1.tmp"]) == numbers(undisturbed / "runs" / cleaning.name)
    assert len(find([found])) == 5  # no run of a report


@pytest.mark.parametrize("method", table(["finetune", "cleanclip"], "cleanclip"))
def test_a_second_run_is_compiled_no_more_and_stays_in_its_memory(method, undisturbed, tmp_path, monkeypatch):
    """Every address that a CUDA graph would have noted."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    world, kept, addresses, frames = dist.join("cpu"), Kept(), [], []
    for lr, seed in ((1e-3, 0), (3e-3, 1)):
        config = CleanConfig(
            run=undisturbed / "runs/mmcl-s0",
            out=tmp_path / str(lr),
            seed=seed,
            compile="on",
            **{**ALIKE, "method": method, "lr": lr, "epochs": 1},
        )
        run = Run(config, clean.task(config, world), world, kept, quiet=True)
        run.train()
        model, step = run.opened.model, run.opened.step
        states = [tensor for state in step.optimizer.state.values() for tensor in state.values()]
        tensors = [*model.parameters(), *model.buffers(), *states, step.rates, step.at, step.lr, step.weights]
        addresses.append([tensor.data_ptr() for tensor in tensors])
        frames.append(counter.frame_count)
    assert addresses[0] == addresses[1] and len(addresses[0]) > 50
    assert 0 < frames[0] == frames[1]


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs Ray: pip install 'fastbd\[cluster\]'"):
        load_ray()


@pytest.mark.full
def test_a_ray_actor_that_dies_is_started_again(undisturbed, study):
    pytest.importorskip("ray")
    said = study / "ray.txt"
    process = command("sweep", *started("ray"), "--engine", "ray", "--processes", 2, cwd=study, said=said)
    try:
        while process.is_alive() and number_of_lines(study / "ray") < 3:
            time.sleep(0.01)
        ledger = Ledger(study / "ray")
        (victim, *_) = [row.status.who for row in ledger.table() if row.status.state == "running"]
        os.kill(int(victim.split(":")[1]), signal.SIGKILL)
        process.join(300)
    finally:
        end(process)
    assert process.exitcode == 0, said.read_text()
    assert all_numbers(study / "ray") == all_numbers(undisturbed)
    holders = [_read_claim(path)[0]["pid"] for path in (study / "ray/claims").glob("*/claim.json")]
    assert len(holders) == 6 and len(set(holders)) == 3


def test_a_search_goes_on_beyond_the_grid(here):
    """Each of its runs is planned like the others, in the light of those before; later sweeps know them."""
    small = {**CLEAN, "force": True, "epochs": 1}
    wide = of_models("wide", "start", clean=({**small, "method": "finetune", "lr": (1e-4, 1e-2)}, small))
    for flags, runs in ((("--search", 2), 5), (("--search", 3), 6), ((), 6)):
        ledger, result = here(wide, *flags, code=0)
        assert result["runs"] == result["finished"] == runs
    found = [run for run in ledger.runs if "search" in run.name]
    assert [run.name for run in found] == [f"start-s0-finetune-search{k}" for k in (1, 2, 3)]
    rates = [run.config.lr for run in found]
    assert len({1e-4, 1e-2, *rates}) == 5 and all(1e-4 < rate < 1e-2 for rate in rates)
    assert {run.config.method for run in found} == {"finetune"} and {run.config.epochs for run in found} == {1}


@pytest.mark.parametrize(
    ("flags", "model", "free", "processes"),
    [
        ({}, "tiny-rn", 64 << 30, 5),  # one a training
        ({}, "tiny-rn", 5 << 30, 2),  # as memory allows
        ({}, "tiny-rn", 1 << 30, 1),
        ({}, "rn50", 64 << 30, 1),
        ({"processes": 3}, "rn50", 1 << 30, 3),
        ({"engine": "ray"}, "tiny-rn", 64 << 30, 0),
    ],
)
def test_small_models_train_side_by_side_on_a_cpu(flags, model, free, processes, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(sweep_command, "free_memory", lambda: free)
    ledger = Ledger(tmp_path / "study", replace(SMALL, pretrain=({**PRETRAIN, "model": model},)))
    assert sweep_command.processes_of(SweepConfig(device="cpu", **flags), ledger) == processes


def test_cleanings_of_a_model_that_is_there_train_side_by_side(study, tmp_path, monkeypatch):
    monkeypatch.chdir(study)
    start(study)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    ledger = Ledger(tmp_path / "study", replace(SMALL, pretrain=(), pretrained=(Path("runs/start"),)))
    assert sweep_command.processes_of(SweepConfig(device="cpu"), ledger) == 3
