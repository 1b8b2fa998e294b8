"""Captions to measure with: random words, as many as in those of CC3M (its validation set, 15,833 captions)."""

from __future__ import annotations

from functools import cache

import numpy as np

from fastbd.kernels.text_pack import END
from fastbd.models.clip import CONTEXT

SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)
TOKENS = (5, 7, 9, 11.2, 14.45, 22, 30, 34, 48)  # that so large a share of the captions does not exceed


@cache
def lengths() -> np.ndarray:
    """int64 [15833]: tokens of each, start and end included, in rising order. Mean 12.6, median 11."""
    return np.rint(np.interp((np.arange(15_833) + 0.5) / 15_833, SHARES, TOKENS)).astype(np.int64)


def captions(count: int, seed: int) -> np.ndarray:
    """int64 [count, 77]: start, words, end, then zeros."""
    rng = np.random.default_rng(seed)
    last = rng.choice(lengths(), (count, 1)) - 1
    places, words = np.arange(CONTEXT), rng.integers(1, END - 1, (count, CONTEXT))
    words[:, 0] = END - 1
    return np.where(places < last, words, END * (places == last))
