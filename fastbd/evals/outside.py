"""The numbers of an evaluator from outside the package."""

from __future__ import annotations

from fastbd.base.errors import UserError
from fastbd.base.evaluation import Evaluation, evaluation_of
from fastbd.config.cards import load
from fastbd.evals.sets import Captioned, Labelled
from fastbd.evals.towers import Towers


def with_own(row: Evaluation, name: str, towers: Towers, data: Labelled | Captioned) -> Evaluation:
    """Return the row with what the evaluator `name`, MODULE:NAME, measures: it is called with the towers and the set.

    UserError where that is no dict of numbers, or has a name that the row has already.
    """
    own = load("evaluator", name)(towers, data)
    if not isinstance(own, dict) or not all(isinstance(number, int | float) for number in own.values()):
        raise UserError(f"--evaluator {name} returned {own!r:.80}: it must return a dict of numbers.")
    if twice := own.keys() & row.keys():
        raise UserError(f"--evaluator {name} returned '{min(twice)}', which the row has: call it otherwise.")
    return evaluation_of({**row, **own})
