"""Numbers as a reader sees them, and the cells of a table that hold them."""

from __future__ import annotations

import math

from fastbd.base.evaluation import Evaluation
from fastbd.base.stats import Estimate
from fastbd.base.tradeoff import is_near_chance

Cell = str | tuple[str, str]  # a text, or (a text, a smaller one below it)
Line = dict[str, Cell]  # a row of a table, by the heads of its columns


def share(value: float) -> str:
    """0.1649 -> "16.5%"."""
    return f"{number(100 * value)}%"


def number(value: float, digits: int = 1) -> str:
    """-0.04 -> "0.0", -1.25 -> "−1.2", with a minus sign and no sign at what is rounded to nothing."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "" if float(text) == 0 else MINUS)


def percent(value: float | None, evaluation: Evaluation | None = None, key: str = "") -> str:
    """0.1649 -> "16.5%", with the interval of the evaluation's `key` where it has one."""
    if value is None:
        return MISSING
    if evaluation and f"{key}_low" in evaluation:
        return share(value) + f" ({100 * evaluation[key + '_low']:.1f}–{100 * evaluation[key + '_high']:.1f})"
    return share(value)


def between(estimate: Estimate) -> str:
    """The interval of a share, within 0 and infinity; empty where there is none."""
    if not math.isfinite(estimate.low):
        return ""
    return f" ({100 * max(0.0, estimate.low):.1f}–{100 * estimate.high:.1f})"


def points(estimate: Estimate, sign: int = 1) -> str:
    """A difference of shares in points, with its interval."""
    mean, *ends = (100 * sign * value for value in estimate[:3])
    text = f"{number(mean)} points"
    return text + (f" ({number(min(ends))} to {number(max(ends))})" if math.isfinite(estimate.low) else "")


def estimate(value: Estimate | None, guess: float | None = None) -> Cell:
    """A mean share, with its interval below it, and that a top-1 is near `guess`, the share of guessing."""
    if value is None:
        return MISSING
    least = value.low if math.isfinite(value.low) else value.mean
    chance = NEAR_CHANCE if guess is not None and is_near_chance(least, guess) else ""
    return share(value.mean), "; ".join(filter(None, (between(value).strip(" ()"), chance)))


def split(text: str) -> Cell:
    """A number that has its interval in brackets after it, with the interval below it."""
    value, _, interval = text.partition(" (")
    return value, interval.rstrip(")")


def rate(value: float) -> str:
    """A learning rate as one types it: 0.0003 -> "3e-4"."""
    digits, _, exponent = f"{value:.3e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}" if value else "0"


NEAR_CHANCE = "near chance"
MISSING, MINUS = "–", "\N{MINUS SIGN}"
