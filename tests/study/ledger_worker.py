"""Does the runs of a ledger, as a sweep does, but each is only ten lines: ledger_worker.py FOLDER [LEASE]."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from pathlib import Path

from fastbd.base.errors import UserError
from fastbd.study.ledger import Claim, Ledger

STEPS = 10


def work(claim: Claim, journal: Path) -> None:
    """Go on after the last line of the journal; what should never be raises."""
    with open(journal, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where another living process is at the same run
        file.seek(0)
        for step in range(len(file.readlines()), STEPS):
            print(step, os.getpid(), file=file, flush=True)
            time.sleep(0.01)
        product = claim.run.product
        product.parent.mkdir(parents=True, exist_ok=True)
        made = product.with_name(f"{product.name}.{os.getpid()}")
        made.write_text(json.dumps({"seconds": STEPS * 0.01}))
        os.link(made, product)  # fails where the run has finished before


def main(folder: Path, lease: float = 600.0) -> None:
    ledger = Ledger(folder, lease=lease)
    while ledger.left():
        if claim := ledger.take():
            with claim:
                assert all(run.product.exists() for run in ledger.runs if run.id in claim.run.needs)
                work(claim, folder / "journals" / claim.run.id)
        else:
            time.sleep(0.02)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), *map(float, sys.argv[2:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
