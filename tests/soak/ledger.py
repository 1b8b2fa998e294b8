"""Four processes on one ledger that are killed at random, while its files are damaged, removed and dated ahead."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from soak.tally import SAME, Tally, main

from fastbd.study.grid import Study
from fastbd.study.ledger import Ledger

WORKER = Path(__file__).parents[1] / "study" / "ledger_worker.py"
SECONDS, LEASE, PROCESSES, STEPS = 600.0, 5.0, 4, 10
STUDY = Study(
    name="soak",
    about="",
    attacks=({"trigger": "badnet"},),
    pretrain=({"objective": ("mmcl", "mmcl_ssl")},),
    clean=({"method": "cleanclip", "lr": tuple(k * 1e-4 for k in range(1, 16))},),
)


def inject(share: float, seed: int, folder: Path) -> Iterator[Tally]:
    """Studies of 33 runs one after the other, for ten minutes; an end is counted for each run."""
    kills = Tally("4 processes on one ledger, one killed every half second", "SIGKILL or SIGTERM, at random")
    faults = Tally("the same, and a claim damaged with each kill", "cut, overwritten, removed or dated ahead")
    draw, until, number = random.Random(seed), time.monotonic() + SECONDS * share, 0
    while number < 2 or time.monotonic() < until:
        place, tally = folder / str(number), (kills, faults)[number % 2]
        work_through(place, draw, spoil if tally is faults else lambda place, draw: None)
        for run in Ledger(place).runs:
            count(tally, run, place, seed)
        number += 1
    yield from (kills, faults)


def work_through(place: Path, draw: random.Random, fault: Callable[[Path, random.Random], None]) -> None:
    """A study until nothing is left of it; what processes say that end with an error is in FOLDER/said."""
    ledger, workers, until = Ledger(place, STUDY, lease=LEASE), [], time.monotonic() + 300
    (place / "journals").mkdir()
    said = open(place / "said", "a")  # noqa: SIM115
    while ledger.left() and time.monotonic() < until:
        while len(workers) < PROCESSES:
            workers.append(subprocess.Popen([sys.executable, WORKER, place, str(LEASE)], stderr=said))
        time.sleep(draw.uniform(0.1, 1.0))
        victim = workers.pop(draw.randrange(PROCESSES))
        victim.send_signal(draw.choice((signal.SIGKILL, signal.SIGTERM)))
        victim.wait()
        fault(place, draw)
    for worker in workers:
        worker.wait()
    said.close()


def spoil(place: Path, draw: random.Random) -> None:
    """Damage a claim."""
    path = draw.choice(sorted((place / "claims").glob("*/claim.json")) or [place / "none"])
    with suppress(FileNotFoundError):
        match draw.randrange(4):
            case 0:
                os.truncate(path, draw.randrange(path.stat().st_size + 1))
            case 1:
                path.write_bytes(draw.randbytes(draw.randrange(200)))
            case 2:
                path.unlink()
            case 3:
                os.utime(path, (time.time() + 1e6,) * 2)


def count(tally: Tally, run, place: Path, seed: int) -> None:
    """How one run has ended: its ten steps once each, in order, and nobody had anything to say."""
    said, journal = (place / "said").read_text(), place / "journals" / run.id
    steps = [line.split()[0] for line in journal.read_text().splitlines()] if journal.exists() else []
    if said:
        tally.count("an error", f"{place.name} of seed {seed}: {said[-2000:]}")
    elif not run.finished or steps != [str(step) for step in range(STEPS)]:
        tally.count("lost or done twice", f"{run.name} of {place.name}, seed {seed}: steps {steps}")
    else:
        tally.count(SAME)


if __name__ == "__main__":
    main("ledger", inject)
