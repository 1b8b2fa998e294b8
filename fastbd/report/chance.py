"""What guessing gives, and the lines that figures draw there and at the ceilings of ASR."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastbd.base.tradeoff import CEILINGS

HAIR = 0.01  # shares that are no further apart are one line of a figure


def chance(evaluations: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the top-1, and the ASR, of a model that guesses: 1 / number of classes.

    None where the evaluations differ in their number of classes, or none of them has recorded it, as older ones.
    """
    known = {e["n_classes"] for e in evaluations if e.get("n_classes")}
    return 1 / known.pop() if len(known) == 1 else None


def near(guess: float | None, ceiling: float) -> bool:
    """Return whether a line at what guessing gives would hide that at a ceiling of ASR."""
    return guess is not None and abs(guess - ceiling) <= HAIR


def line_names(guesses: Iterable[float | None]) -> dict[str, str]:
    """Return what the lines of a figure mean: {"ceiling": "ASR 5% (chance) and 10%", "chance": "chance 5%"}."""
    known = sorted({guess for guess in guesses if guess is not None})
    also = {c: " (chance)" if any(near(guess, c) for guess in known) else "" for c in CEILINGS}
    names = {"ceiling": "ASR " + " and ".join(f"{ceiling:.0%}{told}" for ceiling, told in also.items())}
    if known:
        names["chance"] = "chance " + " and ".join(f"{100 * guess:.3g}%" for guess in known)
    return names
