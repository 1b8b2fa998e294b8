"""A study while it goes on: the table on the terminal, and lines where there is none."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from fastbd.base.console import duration
from fastbd.base.errors import UserError
from fastbd.study.grid import Planned
from fastbd.study.ledger import Ledger, Row, seconds_left

ENDED = 8  # runs that ended of which the table shows the last


def opening(ledger: Ledger) -> str:
    """What the study is, and how much of it is left."""
    counts = Counter(run.verb for run in ledger.runs)
    kinds = ", ".join(f"{n} {name}{'s' * (n != 1)}" for verb, name in KINDS.items() if (n := counts[verb]))
    about = f": {ledger.study.about}" if ledger.study.about else ""
    return f"study '{ledger.study.name}'{about}\n{kinds}; in {ledger.folder}"


def ending(ledger: Ledger, run: Planned, how: str) -> str:
    """A line about a run that has just ended."""
    table = ledger.table()
    row = next(row for row in table if row.run.id == run.id)
    done = sum(row.status.state not in ("waiting", "running") for row in table)
    return f"[{done}/{len(table)}] {run.name}: {how}{_scores(row)}{_left(table)}"


def view(ledger: Ledger) -> Table | Text:
    """The runs that are under way and those that ended last, with what is left; why, where they cannot be read."""
    try:
        rows = ledger.table()
    except (OSError, UserError) as error:  # the processes at work will find out for themselves
        return Text(str(error))
    states = Counter(row.status.state for row in rows)
    title = ", ".join(f"{states[state]} {state}" for state in STATES if states[state]) + _left(rows)
    numbers = (Column(name, justify="right") for name in ("Epoch", "Top-1", "ASR", "Time"))
    table = Table("Run", "State", *numbers, title=title, title_justify="left", box=box.SIMPLE)
    ended = [row for row in rows if row.status.state in ("finished", "failed")]
    for row in ended[-ENDED:] + [row for row in rows if row.status.state == "running"]:
        numbers = (_number(row.epoch, "{:.1f}"), _number(row.top1, "{:.1%}"), _number(row.asr, "{:.1%}"))
        table.add_row(
            escape(row.run.name), row.status.state, *numbers, "" if row.seconds is None else duration(row.seconds)
        )
    return table


def _scores(row: Row) -> str:
    return "" if row.top1 is None else f", top-1 {row.top1:.1%}" + ("" if row.asr is None else f", ASR {row.asr:.1%}")


def _left(rows: list[Row]) -> str:
    left = seconds_left(rows)
    return f"; about {duration(left)} left" if left else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


KINDS = {"poison": "plan", "pretrain": "pre-training", "clean": "cleaning"}
STATES = ("running", "waiting", "finished", "failed", "blocked")
