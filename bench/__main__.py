"""python -m bench [NAMES]: each comparison checks equality first, then times its ways in turn.

The rows go to results/. A ratio is measured within one run; times from different runs or machines do not compare.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.comparisons import COMPARISONS
from fastbd.log import environment

RESULTS = Path(__file__).parent / "results"
ROUNDS = 15


def measure(ways: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float, float]]:
    """Seconds of each way as (median, 20 %, 80 % quantile) over ROUNDS interleaved calls, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(ROUNDS + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if round_:
                times[name].append(time.perf_counter() - began)
    quantiles = {name: statistics.quantiles(seconds, n=5) for name, seconds in times.items()}
    return {name: (statistics.median(times[name]), q[0], q[3]) for name, q in quantiles.items()}


def main(names: list[str]) -> int:
    """Run the named comparisons, all without names; exit code 1 when a check fails."""
    if unknown := set(names) - set(COMPARISONS):
        print(
            f"error: no comparison {', '.join(sorted(unknown))}; there are {', '.join(COMPARISONS)}.", file=sys.stderr
        )
        return 2
    console, about = Console(), environment()
    table = Table("comparison", "way", "units/s", "20 % - 80 %", "ratio to the first")
    rows = []
    for name in names or COMPARISONS:
        comparison = COMPARISONS[name]()
        if not comparison.equal():
            print(f"error: the ways of {name} do not agree; nothing was timed.", file=sys.stderr)
            return 1
        seconds = measure(comparison.ways)
        first = next(iter(seconds.values()))[0]
        for way, (median, low, high) in seconds.items():
            rate, slow, fast = (comparison.units / s for s in (median, high, low))
            table.add_row(
                name, way, f"{rate:,.0f} {comparison.unit}", f"{slow:,.0f} - {fast:,.0f}", f"{first / median:.2f}"
            )
            rows.append({"comparison": name, "way": way, "unit": comparison.unit, "rate": round(rate, 1),
                         "rate_p20": round(slow, 1), "rate_p80": round(fast, 1), "ratio": round(first / median, 3),
                         **about})  # fmt: skip
    console.print(table)
    write(RESULTS / "cpu.csv", rows)  # no comparison uses a GPU yet
    return 0


def write(path: Path, rows: list[dict]) -> None:
    """Append rows to a .csv, with a header when it is new."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows added to {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
