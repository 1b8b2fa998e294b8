"""What faults led to, counted: each script here injects one kind, docs/reliability.md is written from their counts."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

RESULTS = Path("soak")  # a folder that git ignores
SAME, SENTENCE, UNTOLD = "same bytes", "one sentence", "cannot be told"
"""The ends that are no failures: the result of an undisturbed run; one sentence that names the file, with exit code 2;
and other content of a file whose format has no checksum, which nothing can tell."""


@dataclass
class Tally:
    """The ends of one fault: a row of the page."""

    fault: str
    """What happens, such as 'SIGKILL at a random moment of pretrain, then --resume'."""
    how: str
    """How it is injected, in a few words."""
    ends: Counter[str] = field(default_factory=Counter)
    """How often each end was seen; any but SAME, SENTENCE and UNTOLD is a failure."""
    failures: list[str] = field(default_factory=list)
    """What was seen of each failure, enough to repeat it."""

    def count(self, end: str, detail: str = "") -> None:
        """Add one end; `detail` says what was seen where it is a failure."""
        self.ends[end] += 1
        if end not in (SAME, SENTENCE, UNTOLD):
            self.failures.append(f"{end}: {detail}")


def main(name: str, inject: Callable[[float, int, Path], Iterator[Tally]]) -> None:
    """Run inject(share, seed, folder) from the command line and write soak/NAME.json; exit code 1 after a failure.

    `share` is the part of the full number of injections, 1 for `make soak`; each Tally is printed when it is complete.
    """
    flags = argparse.ArgumentParser()
    flags.add_argument("--share", type=float, default=1.0)
    flags.add_argument("--seed", type=int, default=0)
    given = flags.parse_args()
    began, tallies = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix=f"soak-{name}-") as folder:
        for tally in inject(given.share, given.seed, Path(folder)):
            tallies.append(tally)
            print(f"{tally.fault}: {dict(tally.ends)}", *tally.failures[:5], sep="\n  ", flush=True)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    record = {
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}",
        "seed": given.seed,
        "share": given.share,
        "seconds": round(time.monotonic() - began),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record | {"tallies": [vars(t) for t in tallies]}, indent=1))
    sys.exit(any(tally.failures for tally in tallies))
