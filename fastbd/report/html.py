"""Parts of a page that needs nothing else, neither scripts nor the network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from fastbd.base.stats import Estimate
from fastbd.report.format import MISSING, between, share

Cell = str | tuple[str, str]  # what it says, and a smaller line below it


def grid(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table; empty without rows."""
    shown = ""
    for row in rows:
        # the data-label is what a narrow screen shows in place of the head
        pairs = zip(columns, row, strict=True)
        shown += "<tr>" + "".join(f'<td data-label="{escape(c)}">{_value(cell)}</td>' for c, cell in pairs) + "</tr>"
    header = "".join(f"<th>{escape(column)}</th>" for column in columns)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{shown}</tbody></table>" if shown else ""


def _value(cell: Cell) -> str:
    value, detail = (cell, "") if isinstance(cell, str) else cell
    return f"<span>{escape(value)}{f' <small>{escape(detail)}</small>' if detail else ''}</span>"


def section(title: str, content: str, note: str) -> str:
    """Nothing without content."""
    text = f"<p class=note>{escape(note)}</p>" if note else ""
    return f"<section><h2>{escape(title)}</h2>{content}{text}</section>" if content else ""


def folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def image(png: bytes, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def picture(kind: str, png: bytes, text: str) -> str:
    return f'<div class="plot {kind}">{image(png, text)}</div>'


def head(refresh: int = 0) -> str:
    """Everything up to the content; the style is part of it."""
    return HEAD.replace("REFRESH", f'<meta http-equiv="refresh" content="{refresh}">' if refresh else "")


def estimate(value: Estimate | None) -> Cell:
    """A mean share, and its interval below it."""
    if value is None:
        return MISSING
    return share(value.mean), between(value).strip(" ()")


def split(text: str) -> Cell:
    """A number with its interval in brackets, the interval below it."""
    value, _, interval = text.partition(" (")
    return value, interval.rstrip(")")


HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">REFRESH
<title>Backdoor cleaning report</title><style>
body { margin: 0; color: #1a1a1a; background: #fff; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { margin: 0; font-size: 1.8rem; line-height: 1.2; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.25rem; }
.question { margin: .5rem 0 1.5rem; color: #555; font-size: 1.1rem; }
.answer { padding: .25rem 1.25rem; background: #f3f6f9; border-left: 4px solid #0072b2; }
.answer p { max-width: 60rem; margin: .75rem 0; }
.answer strong { font-weight: 600; }
.note, figcaption, small { color: #555; }
.note, figcaption { max-width: 60rem; font-size: .875rem; }
small { display: block; font-size: .75rem; white-space: nowrap; }
td:first-child small { white-space: normal; overflow-wrap: anywhere; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
th { vertical-align: bottom; font-size: .8rem; border-bottom: 2px solid #1a1a1a; }
figure { margin: 0; }
img { max-width: 100%; height: auto; }
.plot { overflow-x: auto; }
.scatter img { max-width: min(100%, 46rem); }
.sheets { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem; }
details { border-bottom: 1px solid #ddd; }
summary { padding: .4rem 0; cursor: pointer; }
pre { margin: 0 0 1rem; padding: .75rem; overflow-x: auto; background: #f7f7f7; font-size: .8rem; }
@media screen and (max-width: 50rem) {
  thead { display: none; }
  tr { display: block; margin-bottom: 1rem; border-top: 2px solid #1a1a1a; }
  td { display: flex; justify-content: space-between; gap: 1rem; padding: .3rem 0; }
  td::before { content: attr(data-label); color: #555; }
  td span { text-align: right; }
  .trajectories img, .curves img { width: 44rem; max-width: none; }
}
@media print {
  body { font-size: 10pt; }
  table { font-size: 7.5pt; }
  th, small { font-size: 6.5pt; }
  th, td { padding: .25rem .3rem; }
  .plot, figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
</style></head><body><main>
"""
