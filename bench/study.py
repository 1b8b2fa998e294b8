"""python -m bench study: a whole study by the command line, and how soon a pre-training has taken its first step.

Each is a process in a temporary folder. With --base COMMIT the tree of that commit takes turns with the working tree,
and what the study found is shown for both. Rows go to bench/results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import torch

from bench import processes, records
from bench.base import ROOT, NoCommit, checkout, environment
from bench.limits import measure_limits
from bench.measure import spread
from bench.processes import Taken
from fastbd.base.console import markdown

QUICK = """
seeds = [0]
[[pretrain]]
objective = "mmcl"
epochs = 1
[[clean]]
method = ["finetune", "cleanclip"]
lr = 1e-3
epochs = 1
"""
FASTBD = sys.executable, "-m", "fastbd"
PRETRAIN = *FASTBD, "pretrain", "--epochs", "1", "--batch-size", "8", "--log-every", "1"  # a step takes little itself
Trees = Mapping[str, dict[str, str]]  # by what the rows call them, the environment of a process of that tree


class Failed(Exception):
    """A command that gave no result, with the end of what it said."""


def main(words: list[str]) -> int:
    """Exit code 0; 1 when a command failed; 2 for an unknown name, or where there is no such commit."""
    parser = argparse.ArgumentParser(prog="python -m bench study", description="Time whole commands.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to time ({', '.join(CASES)}); all without")
    parser.add_argument("--base", metavar="COMMIT", help="take turns with the tree of this commit")
    parser.add_argument("--quick", action="store_true", help="a small study, and fewer rounds")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often [study: 1; opening: 5, with --quick 3]")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the .csv files")
    options, rows = parser.parse_args(words), []
    if unknown := [name for name in options.names if name not in CASES]:
        parser.error(f"no {', '.join(unknown)}; there are {', '.join(CASES)}.")
    try:
        with checkout(options.base) if options.base else nullcontext() as tree, TemporaryDirectory() as folder:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            about = records.circumstances(measure_limits(device))
            trees = {f"fastbd at {tree.name}": environment(tree)} if tree else {}
            trees["fastbd"] = environment(ROOT)
            for name in options.names or CASES:
                found = CASES[name](trees, Path(folder), options.quick, options.rounds)
                records.append(options.out / records.file_for(device), [records.rounded(row) | about for row in found])
                rows += found
    except (NoCommit, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, NoCommit) else 1
    print(json.dumps({"rows": rows}))
    return 0


# ---- a study ----


def study(trees: Trees, folder: Path, quick: bool, rounds: int | None) -> list[dict]:
    """The rows of a sweep of the demo study, or of a small one, its data made anew each time."""
    results: dict[str, dict] = {}

    def swept(name: str) -> Taken:
        inside = Path(mkdtemp(dir=folder))
        (inside / "quick.toml").write_text(QUICK)
        words = *FASTBD, "sweep", "--study", "quick.toml" if quick else "demo", "--out", "study"
        taken = processes.run(words, inside, trees[name])
        results[name] = json.loads(said(inside, taken)[-1])
        return taken

    taken = in_turns({name: partial(swept, name) for name in trees}, rounds or 1)
    runs = {result["finished"] for result in results.values()}
    if len(runs) > 1:
        raise Failed(f"the trees did {' and '.join(map(str, runs))} runs")
    rows = table(f"study {'quick' if quick else 'demo'}", "runs/s", runs.pop(), taken)
    best = {name: result["best"] for name, result in results.items()}
    found = list(dict.fromkeys(key for each in best.values() for key in each))
    lines = [[key, *(shown(each[key]) if key in each else "" for each in best.values())] for key in found]
    print(markdown(["best top-1 at ASR <= 5 %", *best], lines), "\n", sep="", flush=True)
    return rows


def shown(best: Mapping[str, float] | None) -> str:
    return f"{best['top1']:.1%}, ASR {best['asr']:.1%}" if best else "none"


# ---- until the first step ----


def opening(trees: Trees, folder: Path, quick: bool, rounds: int | None) -> list[dict]:
    """The rows of a pre-training until the first step is in its log, after one that has made data and caches."""

    def first_step(inside: Path, environment: Mapping[str, str]) -> Taken:
        run = Path(mkdtemp(dir=inside), "run")
        log = run / "log.jsonl"
        words = *PRETRAIN, "--out", str(run)
        taken = processes.run(words, inside, environment, done=lambda: log.exists() and log.stat().st_size > 0)
        if taken.code is not None:
            raise Failed("\n".join(said(inside, taken)[-9:]))
        return taken

    calls = {name: partial(first_step, Path(mkdtemp(dir=folder)), about) for name, about in trees.items()}
    for call in calls.values():
        call()
    calls["import torch"] = partial(processes.run, (sys.executable, "-c", "import torch"), folder, trees["fastbd"])
    taken = in_turns(calls, rounds or (3 if quick else 5))
    rows = table("opening", "starts/s", 1, taken)
    seconds = {row["provider"]: row["seconds"] for row in rows}
    for name in trees:
        print(f"{name}: {seconds[name] - seconds['import torch']:.2f} s more than importing torch", flush=True)
    return rows


CASES = {"study": study, "opening": opening}


# ---- what both need ----


def said(folder: Path, taken: Taken) -> list[str]:
    """The lines that a command has printed. Failed where it did not end well."""
    lines = (folder / "output").read_text().splitlines()
    if taken.code:
        raise Failed("\n".join([f"a command ended with {taken.code}:", *lines[-9:]]))
    return lines


def in_turns(calls: Mapping[str, Callable[[], Taken]], rounds: int) -> dict[str, list[Taken]]:
    """What each call took in each round; every other round goes through them backwards."""
    taken = {name: [] for name in calls}
    for done in range(rounds):
        for name in list(calls)[:: -1 if done % 2 else 1]:
            taken[name].append(calls[name]())
    return taken


def table(name: str, unit: str, units: int, taken: Mapping[str, list[Taken]]) -> list[dict]:
    """Rows as run.run makes them, with CPU seconds; they are printed too."""
    baseline, *_ = taken
    rows = []
    for provider, runs in taken.items():
        seconds = spread([run.seconds for run in runs])
        ratios = spread([a.seconds / b.seconds for a, b in zip(taken[baseline], runs, strict=True)])
        rows.append(
            {
                "name": name,
                "provider": provider,
                "unit": unit,
                "rate": units / seconds.median,
                "rate_p20": units / seconds.high,
                "rate_p80": units / seconds.low,
                "seconds": seconds.median,
                "baseline": baseline,
                "ratio": ratios.median,
                "ratio_p20": ratios.low,
                "ratio_p80": ratios.high,
                "peak_bytes": max(run.peak_bytes for run in runs),
                "cpu_seconds": spread([run.cpu_seconds for run in runs]).median,
            }
        )
    lines = [
        [
            row["provider"],
            f"{row['seconds']:.2f}",
            f"{row['cpu_seconds']:.2f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_p20']:.2f} - {row['ratio_p80']:.2f}",
        ]
        for row in rows
    ]
    print(
        markdown([name, "seconds", "CPU seconds", "peak MB", "ratio", "20 % - 80 %"], lines), "\n", sep="", flush=True
    )
    return rows
