"""python -m bench [NAMES]: check what each way of doing the same work computes, then time them in turn. And
python -m bench codegen, which counts (bench/codegen.py).

A ratio is measured within one run; times of different runs or machines do not compare. The last line of the output
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench import records
from bench.case import Case
from bench.limits import Limits, measure_limits
from bench.run import Outcome, reason, run

# name -> module with cases(device, quick); imported when asked for, so that a missing package skips one bench only
BENCHES = {
    "step": "bench.step", "text": "bench.text", "eval": "bench.eval", "loss": "bench.loss", "augment": "bench.augment",
    "data": "bench.data",
}  # fmt: skip
SECONDS_A_CASE = {True: 1.0, False: 4.0}  # of timing, by --quick


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure, and add the rows to bench/results.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which benches ({', '.join(BENCHES)}); all without")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, shorter timing")
    parser.add_argument("--json", action="store_true", help="print the last line only, one JSON object")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the .csv files")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    return parser.parse_args(words)


@dataclass
class Report:
    """What all cases gave."""

    rows: list[dict] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    limits: dict[str, Limits] = field(default_factory=dict)  # by device, measured once
    about: dict[str, dict] = field(default_factory=dict)  # likewise: writing rows changes the tree that a commit names

    def add(self, case: Case, outcome: Outcome, device: str) -> None:
        self.rows += [row | {"device": device} for row in outcome.rows]
        self.skipped |= {f"{case.name}: {way}": why for way, why in outcome.skipped.items()}
        self.refused |= {f"{case.name}: {way}": why for way, why in outcome.refused.items()}


def main(words: list[str] | None = None) -> int:
    """Exit code 0; 1 when a provider was refused; 2 for an unknown name."""
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["codegen"]:  # counts, and times nothing
        return import_module("bench.codegen").main(words[1:])
    options = arguments(words)
    if unknown := [name for name in options.names if name not in BENCHES]:
        print(f"error: no bench {', '.join(unknown)}; there are {', '.join(BENCHES)}.", file=sys.stderr)
        return 2
    width = None if sys.stdout.isatty() else 120
    console = Console(quiet=options.json, highlight=False, width=width)
    report, end = Report(), time.monotonic() + options.seconds
    for name in dict.fromkeys(options.names or BENCHES):
        try:
            run_bench(name, options, end, report, console)
        except ImportError as error:
            report.skipped[name] = reason(error)
            console.print(f"{name} is skipped: {reason(error)}", soft_wrap=True)
    console.print(f"{len(report.rows)} rows added to {options.out}", soft_wrap=True)
    print(json.dumps({"rows": report.rows, "skipped": report.skipped, "refused": report.refused}))
    return 1 if report.refused else 0


def run_bench(name: str, options: argparse.Namespace, end: float, report: Report, console: Console) -> None:
    """Run the cases of one bench, and write the rows of each at once: a run that is stopped keeps them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for case in import_module(BENCHES[name]).cases(device, options.quick):
        if time.monotonic() > end:
            report.skipped[case.name] = f"the {options.seconds:.0f} seconds of this run were over"
            continue
        if case.device not in report.limits:
            report.limits[case.device] = measure_limits(case.device)
            report.about[case.device] = records.circumstances(report.limits[case.device])
        limits, about = report.limits[case.device], report.about[case.device]
        outcome = run(case, limits, SECONDS_A_CASE[options.quick])
        show(console, case, outcome, limits, about["device"])
        records.append(options.out / records.file_for(case.device), [rounded(row) | about for row in outcome.rows])
        report.add(case, outcome, about["device"])


def show(console: Console, case: Case, outcome: Outcome, limits: Limits, device: str) -> None:
    """One table a case; what was not timed is listed below it with the reason."""
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in limits.matmul.items())
    table = Table("provider", "ms", "20 % - 80 %", case.unit, "ratio", "of limit", "peak MB", "error", title=case.name)
    for column in table.columns:
        column.no_wrap = True
    table.caption = f"{device}: {rates}, copy {limits.bandwidth / 1e9:.3g} GB/s"
    for row in outcome.rows:
        low, high = (1e3 * case.units / row[key] for key in ("rate_p80", "rate_p20"))
        share, peak = row["limit_share"], row["peak_bytes"]
        table.add_row(
            row["provider"], f"{1e3 * row['seconds']:.4g}", f"{low:.4g} - {high:.4g}", f"{row['rate']:,.0f}",
            f"{row['ratio']:.2f}", "" if share is None else f"{share:.1%}",
            "" if peak is None else f"{peak / 1e6:,.1f}", f"{row['error']:.1e}",
        )  # fmt: skip
    console.print(table)
    for row in outcome.rows:
        if row["note"]:
            console.print(f"  {row['provider']}: {row['note']}", soft_wrap=True)
    for verdict, reasons in (("skipped", outcome.skipped), ("REFUSED", outcome.refused)):
        for why in dict.fromkeys(reasons.values()):
            ways = ", ".join(way for way, other in reasons.items() if other == why)
            console.print(f"  {verdict}: {ways}: {why}", soft_wrap=True, markup=False)


def rounded(row: dict) -> dict:
    """Five digits are more than a time is good for."""
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()}


if __name__ == "__main__":
    sys.exit(main())
