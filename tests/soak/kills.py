"""Signals at random moments of each verb; then the command is repeated, or the run resumed, as the program says."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from soak import small
from soak.forks import Ended, Forks
from soak.tally import SAME, SENTENCE, Tally, main

SUITE_SHARE = 0.002  # one moment of the first verb
MOMENTS = 50  # of each verb
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
VERBS_AT_ONCE = 2
TRIES = 50  # until a signal comes before the end
SMALL = (
    "--data ../study/train.beton --plan ../study/train.poison.json --eval-data ../study/val.beton --model tiny-rn "
    "--batch-size 24 --warmup 5 --device cpu --decode pil --templates demo"
)
STUDY = """
from fastbd.study.grid import Study
data = {"data": "../study/train.beton", "plan": "../study/train.poison.json", "eval_data": "../study/val.beton"}
small = {"batch_size": 24, "epochs": 1, "device": "cpu", "log_every": 1}
study = Study(
    name="small", about="Two rates of one method.",
    pretrain=({**data, **small, "model": "tiny-rn", "templates": "demo"},),
    clean=({**small, "method": "finetune", "rows": 72, "force": True, "lr": (1e-3, 3e-3)},),
)
"""
TIMES = {"seconds", "train_seconds", "evaluate_seconds", "pairs_per_s", "of_limit", "data_wait", "date"}
OTHERS = {"resume", "commit"}
"""What JSON and checkpoints hold that is not compared: times, whether a run was resumed, and the program's commit."""


@dataclass(frozen=True)
class Case:
    """A command line, in a folder beside `study`."""

    command: str
    copied: str | None = None
    """What is in the folder before, from `study`."""
    resume: tuple[str, str] | None = None
    """(a path, the command that resumes where it is there)."""
    within: tuple[str, ...] = ("",)
    """How the paths of what it makes begin."""

    @property
    def verb(self) -> str:
        return self.command.split()[0]

    def again(self, place: Path) -> str:
        """What the program says to do after a stop."""
        return self.resume[1] if self.resume and (place / self.resume[0]).exists() else self.command


CASES = (
    Case(
        f"pretrain --objective mmcl_ssl {SMALL} --epochs 2 --save-every 1 --log-every 1 --out run",
        resume=("run", "pretrain --resume run"),
    ),
    Case("build --source ../study/train.csv --out train.beton --workers 2"),
    Case(
        "sweep --study ../study/small.py --out sweep --device cpu",
        resume=("sweep/study.1/study.json", "sweep --out sweep --device cpu"),
        within=("sweep/runs/", "sweep/plans/", "sweep/failed/", "sweep/study."),  # the report's have times in them
    ),
    Case(
        "clean --run ../study/runs/a --epochs 2 --rows 120 --batch-size 24 --eval-every 1/2epoch --log-every 1 --force "
        "--device cpu --out run",
        resume=("run", "clean --resume run"),
    ),
    Case("label --run ../study/runs/a --data ../study/train.beton --classes cifar10 --device cpu --out labels.npy"),
    Case("evaluate --run runs/b --asr-seed 5 --device cpu", copied="runs/b"),
    Case("detect --run ../study/runs/a --drop 0.1 --device cpu --out kept.rows"),
    Case("poison --data ../study/train.beton --patch-size 6 --rate 0.1 --templates demo --out train.poison.json"),
    Case("preview --data ../study/train.beton --plan ../study/train.poison.json --out preview.png"),
    Case("report --runs ../study/runs --out report"),
)


def inject(share: float, seed: int, folder: Path) -> Iterator[Tally]:
    """Stop each verb MOMENTS times; where `share` is small, only the first verbs."""
    injections = round(share * MOMENTS * len(CASES))

    def tally(number: int) -> Tally:
        case, place = CASES[number], folder / CASES[number].verb
        shutil.copytree(folder / "study", place / "study")
        (place / "place").mkdir()
        forks, times = free.pop(), len(range(number, injections, len(CASES)))
        ends = stop(case, times, random.Random(f"{seed} {case.verb}"), forks, place)
        free.append(forks)
        return ends

    with ExitStack() as all_forks:
        logs = [folder / f"forks-{k}.log" for k in range(min(VERBS_AT_ONCE, injections))]
        free = [all_forks.enter_context(Forks(log)) for log in logs]
        make_study(folder)
        with ThreadPoolExecutor(len(free)) as pool:
            yield from pool.map(tally, range(min(injections, len(CASES))))


def make_study(folder: Path) -> None:
    """Make what the verbs are to work on, in `study`."""
    study, place = folder / "study", folder / "place"
    for made in (study, place):
        made.mkdir()
    small.write_data(study)
    (study / "small.py").write_text(STUDY)
    small.fastbd(
        place,
        f"pretrain {SMALL} --epochs 1 --out ../study/runs/a",
        "clean --run ../study/runs/a --epochs 1 --rows 120 --batch-size 24 --force --device cpu --out ../study/runs/b",
    )


def stop(case: Case, times: int, draw: random.Random, forks: Forks, folder: Path) -> Tally:
    """Return how the verb ended after signals at so many moments."""
    whole, seconds = undisturbed(case, forks, folder, runs=min(2, times))
    then = "the same command again" if case.resume is None else f"{case.resume[1].split(' --device')[0]}"
    tally = Tally(f"a signal at a random moment of {case.verb}, then {then}", "")
    sent: Counter[str] = Counter()
    for number in range(times):
        signum = SIGNALS[number % len(SIGNALS)] if number else draw.choice(SIGNALS)
        place, ended, after = strike(case, signum, seconds, draw, forks, folder)
        sent[signum.name] += 1
        end, seen = judge(case, place, ended, signum, whole, forks)
        tally.count(end, f"{signum.name} after {after:.3f} of {seconds:.3f} s: {seen}")
    tally.how = ", ".join(f"{name} {count}" for name, count in sorted(sent.items())) + " times"
    return tally


def undisturbed(case: Case, forks: Forks, folder: Path, runs: int) -> tuple[dict[str, Any], float]:
    """(what the command makes, its seconds); RuntimeError where it makes something else the last time."""
    made, seconds = [], []
    for _ in range(runs):
        place = fresh(case, folder)
        ended = forks.run(case.command.split(), place)
        if ended.code:
            raise RuntimeError(f"{case.command}: exit code {ended.code}: {ended.stderr}")
        made.append(outcome(case, place))
        seconds.append(ended.seconds)
    if different := differences(made[0], made[-1]):
        raise RuntimeError(f"{case.command} makes something else each time: {different}")
    return made[0], min(seconds)


def fresh(case: Case, folder: Path) -> Path:
    """The folder to work in, always the same one, as it is before."""
    place = folder / "place"
    shutil.rmtree(place)
    place.mkdir()
    if case.copied:
        shutil.copytree(folder / "study" / case.copied, place / case.copied)
    return place


def strike(
    case: Case, signum: signal.Signals, seconds: float, draw: random.Random, forks: Forks, folder: Path
) -> tuple[Path, Ended, float]:
    """(folder, end, moment) of a command that got the signal before it had ended."""
    for _ in range(TRIES):
        place, after = fresh(case, folder), draw.uniform(0, seconds)
        group = signum == signal.SIGINT  # as a terminal sends it
        ended = forks.run(case.command.split(), place, after=after, signum=signum, group=group)
        if ended.struck:
            return place, ended, after
    raise RuntimeError(f"{case.command} always ends before its signal")


def judge(
    case: Case, place: Path, ended: Ended, signum: signal.Signals, whole: dict[str, Any], forks: Forks
) -> tuple[str, str]:
    """(the end, what was seen) of a command that was stopped, after it was repeated or resumed."""
    if bad := wrong_stop(ended, signum):
        return bad, ended.stderr
    if half := half_written(case, place, whole):
        return "half-written", ", ".join(half)
    end, said = SAME, f"exit code {ended.code}"
    if ended.code:
        command = case.again(place)
        again = forks.run(command.split(), place)
        said += f"; {command.split(' --d')[0]}: exit code {again.code}: {again.stderr}"
        if again.code == 2 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1:
            end = SENTENCE
        elif again.code:
            return "not repeated", said
    different = differences(whole, outcome(case, place))
    return ("other bytes", f"{different}; {said}") if different else (end, said)


def wrong_stop(ended: Ended, signum: signal.Signals) -> str:
    """What is wrong with the way the command stopped; it may have been about to end by itself."""
    if ended.hung:
        return "hung"
    if ended.left:
        return "workers left"
    if ended.code not in (0, -signum, 128 + signum):
        return f"exit code {ended.code}"
    return "traceback" if "Traceback" in ended.stderr else ""


def outcome(case: Case, place: Path) -> dict[str, Any]:
    """What the files of the folder hold, by their names."""
    found = {str(path.relative_to(place)): path for path in sorted(place.rglob("*")) if path.is_file()}
    return {
        name: content(path, once=case.verb == "evaluate")
        for name, path in found.items()
        if name.startswith(case.within) and path.name != ".lock"
    }


def content(path: Path, once: bool = False) -> Any:
    """What a file holds, without times; of the lines of a .jsonl file equal ones count once where `once`."""
    if path.suffix == ".pt":
        return timeless(torch.load(path, map_location="cpu", weights_only=True))
    if path.suffix == ".json":
        return timeless(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        rows = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        return [row for i, row in enumerate(rows) if not (once and row in rows[:i])]
    return path.read_bytes()


def timeless(value: Any) -> Any:
    """The value without TIMES and OTHERS, tensors as bytes."""
    if isinstance(value, dict):
        return {key: timeless(each) for key, each in value.items() if key not in TIMES | OTHERS}
    if isinstance(value, list | tuple):
        return [timeless(each) for each in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), list(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return value


def half_written(case: Case, place: Path, whole: dict[str, Any]) -> list[str]:
    """Files under their final names that cannot be read, or are not what they will be at the end."""
    half = []
    for path in filter(Path.is_file, place.rglob("*")):
        name = str(path.relative_to(place))
        if path.suffix == ".jsonl" or not (name in whole or path.suffix == ".pt"):
            continue
        try:
            found = content(path)
        except Exception:  # whatever a reader finds in half a file
            half.append(name)
        else:
            half += [name] if path.name != "ckpt_last.pt" and found != whole.get(name, found) else []
    return half


def differences(whole: dict[str, Any], other: dict[str, Any]) -> str:
    """Names of files that are missing, left over or other; empty where there is none."""
    found = {
        "missing": whole.keys() - other.keys(),
        "left over": other.keys() - whole.keys(),
        "other": {
            name + "".join(f" [{key}]" for key in keys_that_differ(whole[name], other[name]))
            for name in whole.keys() & other.keys()
            if whole[name] != other[name]
        },
    }
    return "; ".join(f"{how}: {', '.join(sorted(names))}" for how, names in found.items() if names)


def keys_that_differ(one: Any, other: Any) -> list[str]:
    """Where both are dicts."""
    both = isinstance(one, dict) and isinstance(other, dict)
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key)) if both else []


if __name__ == "__main__":
    main("kills", inject)
