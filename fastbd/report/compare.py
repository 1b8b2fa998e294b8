"""Two studies side by side."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from fastbd.base.run_folder import Run
from fastbd.base.stats import Estimate
from fastbd.report import html, plots
from fastbd.report.format import MISSING
from fastbd.report.page import SCATTER, TABLE_1
from fastbd.report.tables import Row, table
from fastbd.report.write import save

Pair = tuple[Row | None, Row | None]


def write(names: tuple[str, str], first: Sequence[Run], second: Sequence[Run], out: Path) -> list[Path]:
    """The page `out` with table 1 of both and their differences, and the scatter of both, which goes beside it too."""
    figure = plots.beside(dict(zip(names, (first, second), strict=True)))
    image = plots.png(figure)
    content = {"compare.png": image, "compare.svg": plots.svg(figure)}
    content[out.name] = page(names, pair_up(table(first), table(second)), image).encode()
    return save(content, out.parent)


def pair_up(first: Sequence[Row], second: Sequence[Row]) -> list[Pair]:
    """Rows of the same pre-training and method; by their attack and data too where one study has several of them."""
    left, right = ({_key(row, rows): row for row in rows} for rows in (first, second))
    return [(left.get(key), right.get(key)) for key in {**left, **right}]


def page(names: tuple[str, str], pairs: Sequence[Pair], image: bytes) -> str:
    """The whole page."""
    rows = [line for pair in pairs for line in _lines(names, pair)]
    title = f"{names[0]} against {names[1]}"
    return (
        html.head()
        + f"<h1>{escape(title)}</h1>"
        + html.section("Table 1 of both", html.grid(COLUMNS, rows), NOTE)
        + html.section("Accuracy against attack success rate", html.picture("methods", image, title), SCATTER)
        + "</main></body></html>\n"
    )


def _lines(names: tuple[str, str], pair: Pair) -> list[list[html.Cell]]:
    """A line for each study that has the row, and one for their difference where both have it."""
    lines = [
        [row.group.model, row.group.method or "not cleaned", name, *map(html.estimate, _numbers(row))]
        for name, row in zip(names, pair, strict=True)
        if row
    ]
    if all(pair):
        both = zip(*map(_numbers, pair), strict=True)
        lines.append(["", "", "difference", *(difference(*numbers) for numbers in both)])
    return lines


def _numbers(row: Row) -> list[Estimate | None]:
    strict, loose = row.best
    return [row.top1, row.asr, strict.top1, strict.kept if strict.reached else None, loose.top1, row.area]


def difference(first: Estimate | None, second: Estimate | None) -> str:
    """Second less first in points; without an interval, for the two may share models and images."""
    return MISSING if first is None or second is None else f"{100 * (second.mean - first.mean):+.1f} points"


def _key(row: Row, rows: Sequence[Row]) -> tuple:
    own = (row.group.objective, row.group.method)
    alone = sum((r.group.objective, r.group.method) == own for r in rows) == 1
    return own if alone else (*own, row.group.variant, *row.group.place)


COLUMNS = ("Pre-training", "Cleaning", "Study", *TABLE_1[3:7], *TABLE_1[8:])
NOTE = (
    "Difference: of the means, the second study less the first. Where the 95% intervals below two numbers do not "
    "overlap, they differ by more than chance; where they overlap, nothing follows. The two may share models or seeds."
)
