"""When a training evaluates, saves and logs."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from fastbd.base.errors import UserError


@dataclass(frozen=True)
class Timetable:
    """When the loop does what, in steps (counted from 1, after the step)."""

    steps_per_epoch: int
    total: int
    evaluate_at: Collection[int]
    save_at: Collection[int]
    log_every: int


def every(interval: str, steps_per_epoch: int, total: int) -> set[int]:
    """Steps that end each interval of the run, and the last one; 0 means the last only.

    An interval is in epochs, such as epoch, 3epoch or 1/3epoch, or a number of steps. UserError for anything else.
    """
    found = re.fullmatch(r"(?P<epochs>\d*|\d+/[1-9]\d*)\s*epochs?|(?P<steps>\d+)", interval.strip())
    if not found:
        raise UserError(f"--eval-every {interval} is no interval: give epoch, 1/3epoch, 2epoch, or a number of steps.")
    steps = Fraction(found["steps"] or steps_per_epoch * Fraction(found["epochs"] or 1))
    marks, k = {total}, 1
    while steps and (at := round(k * steps)) < total:
        marks.add(max(1, at))
        k += 1
    return marks
