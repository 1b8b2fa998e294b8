"""95 % intervals: of shares (Wilson), of means over seeds (Student), of differences of means (Welch)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean of n values and the ends of its 95 % interval, which is as wide as can be (infinite) for n = 1."""

    mean: float
    low: float
    high: float
    n: int


def wilson(hits: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson score interval of hits / n (Wilson 1927); (0, 1) when n is 0."""
    if n == 0:
        return 0.0, 1.0
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def interval(hits: int, n: int, population: float | None = None) -> tuple[float, float]:
    """Wilson's interval; with a population N, that of the share among all N of which n >= 1 were drawn.

    It is Wilson's with n (N - 1) / (N - n) in place of n (finite population correction, Cochran 1977, section 3.2).
    """
    if population is None:
        return wilson(hits, n)
    if n >= population:
        return hits / n, hits / n
    growth = (population - 1) / (population - n)
    return wilson(hits * growth, n * growth)


@lru_cache
def t_quantile(freedom: float) -> float:
    """97.5 % quantile of Student's t distribution with `freedom` >= 1 degrees, whole or not, to 1e-3."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    width = 2e-3 / math.sqrt(freedom)
    # With x = sqrt(freedom) tan(a) the density becomes scale * cos(a) ** (freedom - 1), on a finite range.
    angle, mass = 0.0, 0.0
    while mass < 0.475:
        mass += scale * math.cos(angle + width / 2) ** (freedom - 1) * width
        angle += width
    angle -= (mass - 0.475) / (scale * math.cos(angle) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(angle)


def over(values: Sequence[float]) -> Estimate:
    """The mean of one or more values, with its t interval."""
    mean, n = statistics.fmean(values), len(values)
    half = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return Estimate(mean, mean - half, mean + half, n)


def difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of the first minus mean of the second, with Welch's t interval (Welch 1947); n: of the smaller side."""
    mean, n = statistics.fmean(first) - statistics.fmean(second), min(len(first), len(second))
    if n < 2:
        return Estimate(mean, -math.inf, math.inf, n)
    parts = [(statistics.variance(v) / len(v), len(v) - 1) for v in (first, second)]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Estimate(mean, mean, mean, n)
    freedom = variance**2 / sum(part**2 / freedom for part, freedom in parts)
    half = t_quantile(round(freedom, 2)) * math.sqrt(variance)
    return Estimate(mean, mean - half, mean + half, n)
