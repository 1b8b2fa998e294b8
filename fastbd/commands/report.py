"""fastbd report: run folders in, a folder with a page, its figures and its tables out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from fastbd.base.console import console
from fastbd.base.errors import UserError
from fastbd.base.run_folder import find, on_common_set
from fastbd.config.flags import ReportConfig
from fastbd.report import compare, export, interactive, tables, write
from fastbd.report.format import MISSING, rate
from fastbd.report.groups import cleaning_of, place_of
from fastbd.report.page import BEST_WITHIN, answer, rates

SECONDS = 5  # between two looks of --watch
WATCHED = ("config.json", "metrics.jsonl", "result.json")


def run(config: ReportConfig) -> int:
    """Write the report and print table 1; with --watch again and again."""
    out = config.out or Path("compared" if config.compare else "report")
    write.check(out)
    export.check(config.tables)
    if config.watch:
        return watch(config, out)
    if config.compare:
        first, second = (on_common_set(find([folder])) for folder in config.compare)
        if {run.path.resolve() for run in first} == {run.path.resolve() for run in second}:
            names = " ".join(map(str, config.compare))
            raise UserError(f"--compare {names}: both are the same runs; give the folders of two studies.")
        compared = compare.write(_names(*config.compare), first, second, out, config.tables)
        for line in compare.told(compared):
            console.print(line, markup=False)
        console.print(compared_rows(compared), soft_wrap=False)
    else:
        runs = on_common_set(find(config.runs))
        write.write(runs, out, config.tables)
        table = tables.table(runs)
        for claim, ground in answer(table):
            console.print(f"{claim} {ground}".strip(), markup=False)
        console.print(table_1(table))
    if not config.compare and not interactive.installed():
        console.print(write.WITHOUT, markup=False)
    console.print(f"wrote {out / write.PAGE}, with its figures and tables beside it", markup=False)
    if left := write.older(out):
        names = ", ".join(path.name for path in left)
        console.print(f"of an older report, not of this one, are in {out.absolute().parent}: {names}", markup=False)
    return 0


def watch(config: ReportConfig, out: Path) -> int:
    """Write the page again whenever something was evaluated or has ended, until Ctrl-C; one line on the terminal."""
    if config.compare:
        raise UserError("--watch follows one study: give --runs, not --compare.")
    seen = None
    with console.status("looking") as line, suppress(KeyboardInterrupt):
        while True:
            began, now = time.perf_counter(), _stamp(config.runs)
            if now != seen:
                line.update(escape(_draw(config, out)))
                seen = now
            time.sleep(max(SECONDS, 3 * (time.perf_counter() - began)))  # to leave the machine to the runs
    return 0


def _draw(config: ReportConfig, out: Path) -> str:
    """Write the report; what there is to say, which may be that there is nothing yet."""
    clock = time.strftime("%H:%M:%S")
    try:
        runs = on_common_set(find(config.runs))
    except UserError as nothing_yet:
        return f"{clock}  waiting: {nothing_yet}"
    write.write(runs, out, config.tables, refresh=SECONDS)
    ended = sum(bool(run.result) for run in runs)
    evaluations = sum(len(run.metrics) for run in runs)
    return f"{clock}  {len(runs):,} runs, {ended:,} ended, {evaluations:,} evaluations: {out / write.PAGE}"


def _stamp(paths: Sequence[Path]) -> set[tuple[str, int]]:
    """Changes when a run was begun, evaluated or ended."""
    found = set()
    for file in (file for path in paths for name in WATCHED for file in path.rglob(name)):
        with suppress(FileNotFoundError):  # a folder that has just got its name
            found.add((str(file), file.stat().st_mtime_ns))
    return found


def _names(first: Path, second: Path) -> tuple[str, str]:
    """As short as tells them apart."""
    names = first.resolve().name, second.resolve().name
    return names if len(set(names)) == 2 else (str(first), str(second))


def compared_rows(compared: compare.Sides) -> Table:
    """Return the page's table without intervals, to fit 80 columns: what was cleaned, and how, above its studies."""
    caption = "In %, differences in points, of the second study less the first. Guess: the top-1 of a model that "
    caption += "guesses; Top-1, ASR: before cleaning; ASR≤: best top-1 at most at that ASR; Kept: the first as a share "
    caption += "of top-1 before, 0 where none; Area: under the best top-1 against the ASR that is allowed."
    shown = Table(box=box.SIMPLE, collapse_padding=True, caption=caption)
    shown.add_column("Study", overflow="fold")
    for name in ("Guessing", *compare.NUMBERS):
        shown.add_column(SHORT.get(name, name), no_wrap=True, justify="right")
    last = ""
    for line in compare.lines(compared):
        model, method, study, *numbers = (cell if isinstance(cell, str) else cell[0] for cell in line.values())
        cleaned = ": ".join(filter(None, (model, method)))
        if cleaned not in ("", last):
            shown.add_row(escape(cleaned))
            last = cleaned
        shown.add_row(f"  {escape(study)}", *(text.removesuffix(" points").removesuffix("%") for text in numbers))
    return shown


def table_1(table: Sequence[tables.Row]) -> Table:
    """The page's table without intervals, to fit 80 columns."""
    columns = (
        "Pre-training",
        "Cleaning",
        "Seeds",
        "Top-1",
        "ASR",
        *CEILINGS,
        "Kept",
        "lr",
    )
    caption = "In %. Top-1, ASR: before cleaning; ASR≤: best top-1 at most at that ASR; Kept: the first as a"
    caption += " share of top-1 before, 0 where none; lr: the rates that reached it."
    shown = Table(*columns, box=box.SIMPLE, collapse_padding=True, caption=caption)
    for row in table:
        strict, loose = row.best
        numbers = [row.top1, row.asr, strict.top1, loose.top1, strict.kept]
        place = place_of(row.group, [other.group for other in table])
        shown.add_row(
            escape(row.group.model + (f" ({place})" if place else "")),
            escape(cleaning_of(row.group)),
            str(row.replicates),
            *(MISSING if value is None else f"{100 * value.mean:.1f}" for value in numbers),
            ", ".join(map(rate, rates(strict))) or MISSING,
        )
    return shown


CEILINGS = [f"ASR≤{ceiling:.0%}" for ceiling in tables.CEILINGS]
SHORT = {
    "Guessing": "Guess",
    "Top-1 before": "Top-1",
    "ASR before": "ASR",
    "Accuracy kept": "Kept",
    "Trade-off": "Area",
}
SHORT |= dict(zip(BEST_WITHIN, CEILINGS, strict=True))
