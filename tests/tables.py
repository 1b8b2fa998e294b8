"""Tables of cases: what stands for the others is always run, the others by CI."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def table(values: Iterable, *usual) -> list:
    """Return the values of a parameter, or tuples of those of several, all but the usual ones marked `full`."""
    values = list(values)
    assert all(value in values for value in usual), "a usual case is none of the table's"
    tuples = [value if isinstance(value, tuple) else (value,) for value in values]
    return [
        pytest.param(*one, marks=() if value in usual else pytest.mark.full)
        for one, value in zip(tuples, values, strict=True)
    ]
