"""The trade-off of accuracy (more is better) against ASR (less is better)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypedDict, TypeVar

if TYPE_CHECKING:
    from typing_extensions import ReadOnly  # Python 3.13 has it in typing

CEILINGS = (0.05, 0.10)  # ASR up to which a model counts as cleaned: as in arXiv 2311.14948, and a looser one
LANDED = 0.5  # ASR from which the attack counts as landed


class Point(TypedDict):
    """What is known of a model, as far as the trade-off goes: shares, as fractions."""

    top1: ReadOnly[float]
    asr: ReadOnly[float]


P = TypeVar("P", bound=Point)


def best(evaluations: Iterable[P], ceiling: float) -> P | None:
    """The evaluation of highest top-1 among those of ASR <= ceiling (a fraction); on a tie, the one of lower ASR."""
    within = [e for e in evaluations if e["asr"] <= ceiling]
    return max(within, key=lambda e: (e["top1"], -e["asr"]), default=None)


def front(evaluations: Iterable[P]) -> list[P]:
    """The Pareto front: evaluations that no other beats in both top-1 and ASR, by rising ASR and so rising top-1."""
    chosen: list[P] = []
    for evaluation in sorted(evaluations, key=lambda e: (e["asr"], -e["top1"])):
        if not chosen or evaluation["top1"] > chosen[-1]["top1"]:
            chosen.append(evaluation)
    return chosen


def area(evaluations: Iterable[Point]) -> float:
    """Area under the front: the best top-1 within an ASR ceiling, averaged over ceilings from 0 to 1."""
    corners = front(evaluations)
    ends = [e["asr"] for e in corners[1:]] + [1.0]
    return sum((end - e["asr"]) * e["top1"] for e, end in zip(corners, ends, strict=False))


def is_near_chance(top1: float, guess: float) -> bool:
    """Return whether a top-1, the lower end of its interval where it has one, is hardly above that of guessing.

    That is below twice the share of guessing, or below halfway from it to all, which is less with two classes.
    """
    return top1 < min(2 * guess, (1 + guess) / 2)
