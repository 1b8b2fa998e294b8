"""What a verb shows: the console, a progress bar, tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)


@contextmanager
def said_aside(aside: bool) -> Iterator[None]:
    """Send what the console says within the block to stderr, where `aside`: stdout is for a result alone then."""
    before, console.stderr = console.stderr, aside
    try:
        yield
    finally:
        console.stderr = before


@contextmanager
def progress(label: str, total: int, done: int = 0, quiet: bool = False):
    """A progress bar; yields advance(n, text)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task(label, total=total, completed=done, text="")

        def advance(n: int = 1, text: str | None = None) -> None:
            fields: dict[str, Any] = {} if text is None else {"text": text}
            bar.update(task, advance=n, **fields)

        yield advance


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, to be pasted: the first column to the left, the others to the right."""
    cells = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    return "\n".join(map(line, [cells[0], rule, *cells[1:]]))


def duration(seconds: float) -> str:
    """Return a time as a reader takes it in, such as 45 s, 12 min, 3.4 h or 5.2 days."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1g} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 3 * 86400 else f"{seconds / 86400:.1f} days"
