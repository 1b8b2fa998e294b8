"""python -m bench [NAMES]: check what each way of doing the same work computes, then time it in turns with the first.
And python -m bench codegen, which counts (bench/codegen.py), and study, which times whole commands (bench/study.py).

A ratio is measured within one run; times of different runs or machines do not compare. Each row is written and printed
as soon as it is there. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from bench import records
from bench.base import NoCommit, against, asked, checkout
from bench.case import Case, Cases
from bench.limits import Limits, measure_limits
from bench.run import Effort, Result, reason, release, run

# name -> module with cases(device, quick); imported when asked for, so that a missing package costs one bench only
BENCHES = {
    "step": "bench.step",
    "text": "bench.text",
    "eval": "bench.eval",
    "loss": "bench.loss",
    "augment": "bench.augment",
    "data": "bench.data",
}
COMMANDS = {"codegen": "bench.codegen", "study": "bench.study"}  # name -> module with main(words), of other options
SECONDS, ROUNDS = {True: 0.5, False: 2.0}, {True: 3, False: 5}  # of timing a provider, by --quick; and rounds at least


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure, and add the rows to bench/results.")
    several = "several separated by commas, without a space behind"  # as some names hold a comma and a space
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which benches ({', '.join(BENCHES)}); all without")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, shorter timing, nothing slow")
    chosen = {"type": listed, "default": []}
    parser.add_argument("--cases", metavar="PART", help=f"cases with this in their names, {several}", **chosen)
    parser.add_argument("--providers", metavar="START", help=f"providers whose names begin so, {several}", **chosen)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--kernels", type=int, default=0, metavar="N", help="list the N largest kernels of a call")
    either.add_argument("--base", metavar="COMMIT", help="time our ways in turns with those of the tree of this commit")
    parser.add_argument("--rounds", type=int, metavar="N", help="time each provider so often at least")
    parser.add_argument("--json", action="store_true", help="print the last line only, one JSON object")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the .csv files")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    return parser.parse_args(words)


def listed(words: str) -> list[str]:
    """The names between commas; a comma before a space belongs to a name."""
    return [word for word in re.split(",(?! )", words) if word]


@dataclass
class Report:
    """What all cases gave. `failed` are benches and cases that could not be run, or measured nothing."""

    rows: list[dict] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def main(words: list[str] | None = None) -> int:
    """Exit code 0; 1 when a provider was refused, or a bench or a case failed; 2 for an unknown name.

    A provider that cannot run here is skipped, which is no failure as long as its bench measures another one.
    """
    words = sys.argv[1:] if words is None else words
    if words and words[0] in COMMANDS:
        return import_module(COMMANDS[words[0]]).main(words[1:])
    options = arguments(words)
    unknown = [name for name in options.names if name not in BENCHES]
    if unknown:
        return unknown_names("bench", unknown, BENCHES)
    session = Session(options)
    report = session.report
    modules = session.imported(dict.fromkeys(options.names or BENCHES))
    cases = [case for module in modules.values() for case, _ in module.cases(session.device, options.quick)]
    unknown = [part for part in options.cases if not any(part in case for case in cases)]
    if unknown and not report.failed:
        return unknown_names("case", unknown, cases)
    try:
        session.run_all(modules)
    except NoCommit as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    session.say(f"{len(report.rows)} rows added to {options.out}")
    print(json.dumps({key: getattr(report, key) for key in ("rows", "skipped", "refused", "failed")}), flush=True)
    unknown = [start for start in options.providers if not any(name.startswith(start) for name in session.providers)]
    if unknown and session.complete:
        return unknown_names("provider", unknown, sorted(session.providers))
    return 1 if report.refused or report.failed else 0


def unknown_names(kind: str, names: Iterable[str], there: Iterable[str]) -> int:
    """Exit code 2, after a sentence that names those there are."""
    print(f"error: no {kind} {', '.join(names)}; there are {', '.join(there)}.", file=sys.stderr)
    return 2


class Session:
    """Runs benches with the options of the command line, and keeps what they give.

    `providers` are those of all cases that were built; these are all cases asked for where it is `complete`.
    """

    def __init__(self, options: argparse.Namespace):
        self.options, self.report, self.end = options, Report(), time.monotonic() + options.seconds
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.effort = Effort(
            seconds=SECONDS[options.quick],
            rounds=options.rounds or ROUNDS[options.quick],
            only=options.providers,
            slow=not options.quick,
            kernels=options.kernels,
        )
        self.providers, self.complete, self.headed = set(), True, ""

    def say(self, text: str) -> None:
        if not self.options.json:
            print(text, flush=True)

    def imported(self, names: Iterable[str]) -> dict[str, ModuleType]:
        """The modules of the benches that can be imported; the others have failed."""
        found = {}
        for name in names:
            try:
                found[name] = import_module(BENCHES[name])
            except Exception as error:
                self.fail(name, error)
        return found

    def fail(self, name: str, error: Exception | None = None) -> None:
        why = reason(error) if error else "nothing was measured"
        self.report.failed[name], self.complete = why, False
        trace = "".join(traceback.format_exception(error)) if error else ""
        self.say(f"FAILED: {name}: {why}\n{trace}")

    def run_all(self, modules: dict[str, ModuleType]) -> None:
        """Run the benches; with --base what they have in the tree of that commit too. NoCommit where there is none."""
        if not self.options.base:
            for name, module in modules.items():
                self.run(name, module.cases)
            return
        with checkout(self.options.base) as tree:
            for name, module in modules.items():
                about = module.__name__, self.options.cases, self.effort, self.say
                try:
                    with against(tree, *about) as cases:
                        self.run(name, cases)
                except Exception as error:  # of a process of one of the trees
                    self.fail(name, error)

    def run(self, name: str, cases: Callable[[str, bool], Cases]) -> None:
        """Run the cases of one bench. It fails where it was asked for something and measured nothing."""
        before, wanted = len(self.report.rows), False
        for case, build in cases(self.device, self.options.quick):
            if not asked(case, self.options.cases):
                continue
            if time.monotonic() > self.end:
                wanted, self.complete = True, False
                self.report.skipped[case] = f"the {self.options.seconds:.0f} seconds of this run were over"
                self.say(f"{case} is skipped: {self.report.skipped[case]}")
                continue
            try:
                wanted |= self.run_case(build)
            except Exception as error:
                wanted = True
                self.fail(case, error)
            release(self.device)
        if wanted and len(self.report.rows) == before:
            self.fail(name)

    def run_case(self, build: Callable[[], Case]) -> bool:
        """Write and print each row as it comes. False where the case has none of the providers asked for."""
        case = build()
        self.providers |= set(case.providers)
        if not any(map(self.effort.takes, case.providers)):
            return False
        limits, about = circumstances(case.device)
        if case.name != self.headed:
            self.say(heading(case, limits, about["device"]))
            self.headed = case.name
        for result in run(case, limits, self.effort):
            if result.row:
                path = self.options.out / records.file_for(case.device)
                records.append(path, [records.rounded(result.row) | about])
                self.report.rows.append(result.row | {"device": about["device"]})
            elif result.skipped:
                self.report.skipped[f"{case.name}: {result.provider}"] = result.skipped
            elif result.refused:
                self.report.refused[f"{case.name}: {result.provider}"] = result.refused
            self.say(line(case, result))
        return True


@cache
def circumstances(device: str) -> tuple[Limits, dict]:
    """The limits of a device, and what its rows say of where they come from; measured once, as writing rows changes the
    tree that a commit names."""
    limits = measure_limits(device)
    return limits, records.circumstances(limits)


# ---- what is printed ----


def heading(case: Case, limits: Limits, device: str) -> str:
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in limits.matmul.items())
    spread = "20 % - 80 %"
    columns = "provider", "ms", spread, case.unit, "ratio", spread, "of limit", "peak MB", "error", "built in s"
    return f"\n{case.name}\n{device}: {rates}, copy {limits.bandwidth / 1e9:.3g} GB/s\n{table_row(*columns)}"


def table_row(name: str, *values: str) -> str:
    widths = 9, 19, 11, 6, 13, 8, 9, 8, 10
    return f"{name:<40}" + "".join(f" {value:>{width}}" for value, width in zip(values, widths, strict=True))


def line(case: Case, result: Result) -> str:
    """One provider's result: a row of the table, or its kernels, or why it has none."""
    if result.kernels:
        return "\n".join(
            f"    {share.seconds * 1e3:9.3f} ms {share.share:6.1%} {share.count:5d} x {share.name[:160]}"
            for share in result.kernels
        )
    if result.row is None:
        verdict = f"REFUSED: {result.refused}" if result.refused else f"skipped: {result.skipped}"
        return f"{result.provider}: {verdict}" + f"\n{result.trace}" * bool(result.trace)
    row = result.row
    low, high = (1e3 * case.units / row[key] for key in ("rate_p80", "rate_p20"))
    share, peak = row["limit_share"], row["peak_bytes"]
    text = table_row(
        row["provider"],
        f"{1e3 * row['seconds']:.4g}",
        f"{low:.4g} - {high:.4g}",
        f"{row['rate']:,.0f}",
        f"{row['ratio']:.2f}",
        f"{row['ratio_p20']:.2f} - {row['ratio_p80']:.2f}",
        "" if share is None else f"{share:.1%}",
        "" if peak is None else f"{peak / 1e6:,.1f}",
        f"{row['error']:.1e}",
        f"{row['build_seconds']:.1f}",
    )
    return f"{text}\n    ({row['note']})" if row["note"] else text


if __name__ == "__main__":
    sys.exit(main())
