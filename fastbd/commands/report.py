"""fastbd report: run folders in, one page and its figures out."""

from __future__ import annotations

import os
from pathlib import Path

from rich import box
from rich.table import Table

from fastbd import log
from fastbd.config import ReportConfig
from fastbd.errors import UserError
from fastbd.study import html, pareto, plots
from fastbd.study import runs as folders


def run(config: ReportConfig) -> int:
    """Write the page and scatter.png, trajectories.png and curves.png beside it, and print the table."""
    if config.out.is_dir():
        raise UserError(f"--out {config.out} is a folder; name the page in it, such as {config.out / 'report.html'}.")
    runs = folders.on_common_set(folders.find(config.runs))
    figures = {draw.__name__: plots.png(draw(runs)) for draw in (plots.scatter, plots.trajectories, plots.curves)}
    written = {config.out.with_name(f"{name}.png"): png for name, png in figures.items()}
    written[config.out] = html.page(runs, figures).encode()
    config.out.parent.mkdir(parents=True, exist_ok=True)
    for path, content in written.items():
        _write(path, content)

    table = pareto.outcomes(runs)
    for model, text in html.answers(table):
        log.console.print(f"{model}: {text}", markup=False)
    log.console.print(_table(table))
    for path in written:
        log.console.print(f"wrote {path}", markup=False)
    return 0


def _table(table: list[pareto.Outcome]) -> Table:
    """The page's table without intervals, to fit 80 columns."""
    columns = ("Model", "Cleaning", "Top-1", "ASR", "Recovery", *(f"ASR≤{ceiling:.0%}" for ceiling in pareto.CEILINGS))
    caption = "All in %. Arrows: before → after cleaning. Last columns: best top-1 within that ASR."
    shown = Table(*columns, box=box.SIMPLE, collapse_padding=True, caption=caption)
    for outcome in table:
        plain = [cell.split(" (")[0].removesuffix("%") for cell in html.cells(outcome)]
        model, top1, asr, method, top1_after, asr_after, recovery, *best, _ = plain
        shown.add_row(model, method, f"{top1} → {top1_after}", f"{asr} → {asr_after}", recovery, *best)
    return shown


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".tmp")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
