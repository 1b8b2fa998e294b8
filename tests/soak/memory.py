"""Memory along a long training: the real loop, loader, evaluations and checkpoints, of a tiny model."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from soak.tally import SAME, Tally, main

from fastbd import cli
from fastbd.base.dist import World
from fastbd.commands import pretrain
from fastbd.data.demo import write_demo_set
from fastbd.training.run import Run

SUITE_SHARE = 0  # memory that is flat for a few steps tells nothing
STEPS, EVERY, WARM = 20_000, 500, 2_000
BOUND = 4  # MiB that the memory may have grown by from the end of the warm-up to the end


def held() -> float:
    """MiB that this process holds for itself; pages of files, such as libraries, come and go with what others do."""
    status = Path("/proc/self/status").read_text()
    return sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status))) / 1024


def run_of(steps: int) -> Run:
    """A training of at least so many steps, 27 an epoch, each of which ends with a checkpoint."""
    list(write_demo_set(Path(), 216, 40, seed=1))
    build = ["build", "--text-views", "1", "--workers", "1"]
    assert cli.main([*build, "--source", "train.csv", "--out", "train.beton"]) == 0
    assert cli.main([*build, "--source", "val.csv", "--class-key", "class", "--out", "val.beton"]) == 0
    flags = ["--objective", "mmcl_ssl", "--data", "train.beton", "--eval-data", "val.beton", "--templates", "demo",
             "--model", "tiny-rn", "--batch-size", "8", "--device", "cpu", "--epochs", str(-(-steps // 27)),
             "--eval-every", "500", "--save-every", "0", "--log-every", str(min(EVERY, steps // 8))]  # fmt: skip
    config = cli.parse("pretrain", [*flags, "--out", "run"])
    world = World(0, 1, torch.device("cpu"))
    return Run(config, pretrain.task(config, world), world, quiet=True)


def inject(share: float, seed: int, folder: Path) -> Iterator[Tally]:
    """Train for `share` of the steps and compare the memory with that after the warm-up."""
    steps = max(400, round(share * STEPS))
    seen = []
    with contextlib.chdir(folder), open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        run = run_of(steps)
        record = run.record

        def note(row: dict) -> None:
            record(row)
            seen.append((row["step"], round(held(), 1)))

        run.record = note
        run.train()
    warm = [mib for step, mib in seen if step > min(WARM, steps // 2)]
    end, growth = max(warm[-3:]), max(warm[-3:]) - warm[0]
    memory = f"{warm[0]} MiB after the warm-up, {end} at the end, at most {max(warm)}"
    tally = Tally(f"{run.opened.total:,} steps of training", f"its own memory, read at {len(seen)} of them: {memory}")
    tally.count(SAME if growth <= BOUND else "memory grows", f"{memory}; each: {seen}")
    yield tally


if __name__ == "__main__":
    main("memory", inject)
