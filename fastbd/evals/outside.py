"""The numbers of an evaluator from outside the package."""

from __future__ import annotations

import math
from numbers import Real

import torch

from fastbd.base.errors import UserError
from fastbd.base.evaluation import Evaluation, RecordedEvaluation, evaluation_of
from fastbd.config.cards import load
from fastbd.evals.sets import Captioned, Labelled
from fastbd.evals.towers import Towers

ENDINGS = ("_low", "_high", "_by_seed")
"""Of names that tell how sure another number is."""


def with_own(row: Evaluation, name: str, towers: Towers, data: Labelled | Captioned) -> Evaluation:
    """Return the row with what the evaluator `name`, MODULE:NAME, measures: it is called with the towers and the set.

    UserError where that is no dict of finite numbers, has a name that rows have already, or the images were changed.
    """
    held = [*vars(data).values(), *(one.images for one in data.attacked)]
    versions = [_version(each) for each in held]
    with torch.set_grad_enabled(torch.is_grad_enabled()):  # which an evaluator may change
        own = load("evaluator", name)(towers, data)
    if not isinstance(own, dict) or not all(isinstance(key, str) and _is_finite(own[key]) for key in own):
        said = " ".join(repr(own).split())[:80]  # a tensor takes lines
        raise UserError(f"--evaluator {name} returned {said}: it must return a dict of finite numbers by name.")
    known = row.keys() | RecordedEvaluation.__annotations__.keys()
    if taken := [key for key in own if key in known or key.endswith(ENDINGS)]:
        raise UserError(f"--evaluator {name} returned '{taken[0]}', which a row has: call it otherwise.")
    if [_version(each) for each in held] != versions:
        raise UserError(f"--evaluator {name} has written into the set's images or labels: let it write into a copy.")
    return evaluation_of({**row, **{key: _plain(number) for key, number in own.items()}})


def _version(images: object) -> int:
    """Return how often a tensor has been written to; 0 for all else, as for images that are read anew each time."""
    return getattr(images, "_version", 0)


def _is_finite(number: object) -> bool:
    try:
        return isinstance(number, Real) and math.isfinite(number)
    except OverflowError:  # a whole number beyond all floats
        return False


def _plain(number: Real) -> float | int:
    """Return a number as JSON has it, also one of NumPy's."""
    return number if isinstance(number, int) else float(number)
