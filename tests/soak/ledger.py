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
from functools import partial
from pathlib import Path

from soak.tally import SAME, SENTENCE, Tally, main

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
    """Studies of 33 runs one after the other, for ten minutes; an end is counted for each run and each damaged file."""
    kinds = (
        (
            lambda *_: None,
            Tally("4 processes on one ledger, one killed every half second", "SIGKILL or SIGTERM, at random"),
        ),
        (spoil, Tally("the same, and a claim damaged with each kill", "cut, overwritten, removed or dated ahead")),
        (cut_study, Tally("the same, and study.json damaged with each kill, then put back", "cut")),
        (spoil_failure, Tally("the same, and a damaged failed/ID.json with each kill, then --retry", "random bytes")),
    )
    draw, until, number = random.Random(seed), time.monotonic() + SECONDS * share, 0
    while number < 2 or time.monotonic() < until:
        place, (fault, tally) = folder / str(number), kinds[number % len(kinds)]
        work_through(place, draw, partial(fault, place, draw, tally))
        for run in Ledger(place).runs:
            count(tally, run, place, seed)
        number += 1
    yield from (tally for _, tally in kinds if tally.ends)


def work_through(place: Path, draw: random.Random, fault: Callable[[], None]) -> None:
    """A study until nothing is left of it; what processes say that end with an error is in FOLDER/said."""
    ledger, workers, until = Ledger(place, STUDY, lease=LEASE), [], time.monotonic() + 300
    (place / "journals").mkdir()
    said = open(place / "said", "a")  # noqa: SIM115
    while ledger.left() and time.monotonic() < until:
        while len(workers) < PROCESSES:
            workers.append(subprocess.Popen(worker(place), stderr=said))
        time.sleep(draw.uniform(0.1, 1.0))
        victim = workers.pop(draw.randrange(PROCESSES))
        victim.send_signal(draw.choice((signal.SIGKILL, signal.SIGTERM)))
        victim.wait()
        fault()
    for each in workers:
        each.wait()
    said.close()


def worker(place: Path) -> list[str]:
    """Return the command of a process that does what is left."""
    return [sys.executable, str(WORKER), str(place), str(LEASE)]


def spoil(place: Path, draw: random.Random, tally: Tally) -> None:
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


def cut_study(place: Path, draw: random.Random, tally: Tally) -> None:
    """Cut study.json off while one more process starts, and count what that says."""
    path = place / "study.1" / "study.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: draw.randrange(len(whole))])
    done = subprocess.run(worker(place), capture_output=True, text=True)
    path.write_bytes(whole)
    lines = done.stderr.splitlines()
    named = done.returncode == 2 and len(lines) == 1 and is_named(lines[0], place)
    tally.count(SENTENCE if named else "no sentence", f"exit code {done.returncode}: {done.stderr}")


def is_named(line: str, place: Path) -> bool:
    """Whether a process said that study.json is damaged, as also one of the others may that starts meanwhile."""
    return line.startswith(f"error: {place / 'study.1' / 'study.json'} is damaged")


def spoil_failure(place: Path, draw: random.Random, tally: Tally) -> None:
    """Let a run have failed for a reason that cannot be read, count what is told of it, and try it again."""
    ledger = Ledger(place, lease=LEASE)
    left = [run for run in ledger.runs if not run.finished]
    if not left:
        return
    path = place / "failed" / f"{draw.choice(left).id}.json"
    path.write_bytes(draw.randbytes(draw.randrange(200)))
    said = {f"{row.run.id}.json": row.status for row in ledger.table()}[path.name]
    ledger.retry()
    if said.state != "finished":
        named = said.reason == f"{path} cannot be read: try the run again with --retry"
        tally.count(SENTENCE if named else "no sentence", str(said))


def count(tally: Tally, run, place: Path, seed: int) -> None:
    """How one run has ended: its ten steps once each, in order, and nobody had anything to say."""
    journal = place / "journals" / run.id
    said = [line for line in (place / "said").read_text().splitlines() if not is_named(line, place)]
    steps = [line.split()[0] for line in journal.read_text().splitlines()] if journal.exists() else []
    if said:
        tally.count("an error", f"{place.name} of seed {seed}: {said[-10:]}")
    elif not run.finished or steps != [str(step) for step in range(STEPS)]:
        tally.count("lost or done twice", f"{run.name} of {place.name}, seed {seed}: steps {steps}")
    else:
        tally.count(SAME)


if __name__ == "__main__":
    main("ledger", inject)
