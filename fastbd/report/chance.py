"""What guessing gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def chance(evaluations: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the top-1, and the ASR, of a model that guesses: 1 / number of classes.

    None where the evaluations differ in their number of classes, or none of them has recorded it, as older ones.
    """
    known = {e["n_classes"] for e in evaluations if e.get("n_classes")}
    return 1 / known.pop() if len(known) == 1 else None
