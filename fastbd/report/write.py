"""A report's folder: the page, figures/ and tables/, written so that a reader never meets half of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastbd.base.errors import UserError
from fastbd.base.files import check_out, replacing
from fastbd.base.run_folder import Run
from fastbd.report import export, interactive, page, plots
from fastbd.report.head import TITLE, head

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "index.html"
MARK = b'<meta name="generator" content="fastbd report">'  # in the head of every page, of base.html.j2
INTERACTIVE = "figures/interactive.html"
WITHOUT = "An interactive figure is drawn where Bokeh is installed: pip install bokeh"
DRAWN = ("scatter", "methods", "trajectories", "curves", "compare")
OWN = {
    INTERACTIVE,
    *(f"figures/{name}.{kind}" for name in DRAWN for kind in ("png", "svg")),
    *(f"tables/{name}.{kind}" for name in (*export.TABLES, "compared") for kind in export.WRITERS),
}
"""All that any report may have beside its page."""


def check(folder: Path) -> None:
    """Raise a UserError where a report cannot be written to `folder`, or would take the place of something else."""
    if folder.suffix == ".html" and not folder.is_dir():
        raise UserError(f"--out {folder} is a page, and a report is a folder: give one, as --out {folder.stem}.")
    check_out(folder)
    if folder.is_dir() and not _is_report(folder):
        raise UserError(f"--out {folder} has other files than a report in it: choose another --out.")


def _is_report(folder: Path) -> bool:
    """Whether all in the folder may be a report's, be it one whose writing was cut short."""
    if (folder / PAGE).is_file():
        with (folder / PAGE).open("rb") as file:
            return MARK in file.read(1000)
    return {path.name for path in folder.iterdir()} <= {"figures", "tables", f"{PAGE}.tmp"}


def older(folder: Path) -> list[Path]:
    """Return the files of a report by an older version, which had no folder, beside this one; none without its page."""
    page_then = folder.with_name(f"{folder.name}.html")
    if not page_then.is_file() or TITLE not in page_then.read_text(errors="replace"):
        return []
    names = [
        *(f"{name}.{kind}" for name in DRAWN for kind in ("png", "svg")),
        *(f"{name}.csv" for name in export.TABLES),
    ]
    return [page_then, *(path for name in names if (path := folder.with_name(name)).is_file())]


def write(runs: Sequence[Run], folder: Path, kind: str = "csv", refresh: int = 0) -> list[Path]:
    """The page, each figure as PNG and SVG, and the tables as `kind`, csv or parquet; their paths, the page last.

    With `refresh`, while runs go on, a browser loads the page again after so many seconds, and there are PNG alone.
    """
    figures = {draw.__name__: plots.laid_out(draw(runs)) for draw in shown(runs)}
    images = {name: plots.png(figure) for name, figure in figures.items()}
    content = {f"figures/{name}.png": png for name, png in images.items()}
    content |= {f"tables/{name}": table for name, table in export.files(runs, kind).items()}
    moving = ""
    if not refresh:
        content |= {f"figures/{name}.svg": plots.svg(figure) for name, figure in figures.items()}
        moving = "" if "scatter" not in figures else INTERACTIVE if interactive.installed() else WITHOUT
        content |= {INTERACTIVE: interactive.page(runs, head(runs)["title"])} if moving == INTERACTIVE else {}
    content[PAGE] = page.page(runs, images, list(content), moving, refresh).encode()
    return save(content, folder)


def shown(runs: Sequence[Run]) -> list[Callable[[Sequence[Run]], Figure]]:
    """The figures that have something to show: no panels of a single cleaning method, no course of one point.

    Without a measured ASR there is no scatter; the page's answer says so.
    """
    moved = any(sum("top1" in e for e in run.metrics) > 1 for run in runs)
    wanted = {
        plots.scatter: any(run.attacks for run in runs),
        plots.methods: len(plots.panelled(runs)) > 1,  # else the scatter shows it all
        plots.trajectories: moved,
        plots.curves: any(len(run.log) > 1 for run in runs),
    }
    return [draw for draw, wish in wanted.items() if wish]


def save(content: Mapping[str, bytes], folder: Path) -> list[Path]:
    """Write each file whole, by a rename, in this order; then what an earlier report has left goes, and nothing else.

    Keys are names in the folder, with "/" where they are in a folder of it.
    """
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(data)
    written = [folder / name for name in content]
    for left in OWN - content.keys():
        (folder / left).unlink(missing_ok=True)
    return written
