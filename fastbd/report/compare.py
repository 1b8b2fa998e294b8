"""Two studies side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fastbd.base.run_folder import Run
from fastbd.base.stats import Estimate
from fastbd.report import plots
from fastbd.report.format import MISSING, Cell, Line, estimate
from fastbd.report.page import TABLE_1
from fastbd.report.render import embedded, render
from fastbd.report.tables import Row, table
from fastbd.report.write import save

Pair = tuple[Row | None, Row | None]


def write(names: tuple[str, str], first: Sequence[Run], second: Sequence[Run], out: Path) -> list[Path]:
    """The page `out` with table 1 of both and their differences, and the scatter of both, which goes beside it too."""
    figure = plots.laid_out(plots.beside(dict(zip(names, (first, second), strict=True))))
    image = plots.png(figure)
    content = {"compare.png": image, "compare.svg": plots.svg(figure)}
    content[out.name] = page(names, pair_up(table(first), table(second)), image).encode()
    return save(content, out.parent)


def pair_up(first: Sequence[Row], second: Sequence[Row]) -> list[Pair]:
    """Rows of the same pre-training and method; by their attack and data too where one study has several of them."""
    left, right = ({_key(row, rows): row for row in rows} for rows in (first, second))
    return [(left.get(key), right.get(key)) for key in {**left, **right}]


def page(names: tuple[str, str], pairs: Sequence[Pair], image: bytes) -> str:
    """The whole page. `image`: the PNG file of the scatter of both."""
    rows = [line for pair in pairs for line in _lines(names, pair)]
    title = f"{names[0]} against {names[1]}"
    return render("compare.html.j2", title=title, rows=rows, scatter=embedded(image))


def _lines(names: tuple[str, str], pair: Pair) -> list[Line]:
    """A line for each study that has the row, and one for their difference where both have it."""
    lines = [
        _line(row.group.model, row.group.method or "not cleaned", name, map(estimate, _numbers(row)))
        for name, row in zip(names, pair, strict=True)
        if row
    ]
    first, second = pair
    if first and second:
        both = zip(_numbers(first), _numbers(second), strict=True)
        lines.append(_line("", "", "difference", (difference(*numbers) for numbers in both)))
    return lines


def _line(model: str, method: str, study: str, numbers: Iterable[Cell]) -> Line:
    return {"Pre-training": model, "Cleaning": method, "Study": study, **dict(zip(NUMBERS, numbers, strict=True))}


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


NUMBERS = (*TABLE_1[3:7], *TABLE_1[8:])  # the heads of what _numbers gives
