from __future__ import annotations

import math

import numpy as np
import pytest

from fastbd.base.stats import difference, interval, over, t_quantile, wilson


def test_wilson_interval_against_published_values():
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29
    for hits, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(hits, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
        assert interval(hits, n) == wilson(hits, n)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("n", [20_000, 10_000, 5_000])
@pytest.mark.parametrize("share", [0.16, 0.24, 0.05])
def test_interval_of_a_population(n, share):
    """Wald's half-width with the finite population correction (Cochran 1977, section 3.2): alike where n is large."""
    low, high = interval(round(n * share), n, 50_000)
    half = 1.96 * math.sqrt(share * (1 - share) / n * (50_000 - n) / 49_999)
    assert (high - low) / 2 == pytest.approx(half, rel=2e-3)


def test_interval_of_a_population_at_its_ends():
    # 1.96 sqrt(0.16 * 0.84 / 5000 * 45000 / 49999) = 0.00964
    assert np.diff(interval(800, 5_000, 50_000)) / 2 == pytest.approx(0.0096, abs=5e-5)
    assert interval(2, 4, 5) == wilson(8, 16)  # 4 (5 - 1) / (5 - 4) = 16 images
    assert interval(3, 4, 4) == (0.75, 0.75)
    assert interval(3, 4, 10**12) == pytest.approx(wilson(3, 4))


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 7, 10, 20, 30, 100])
def test_quantiles_are_those_of_the_density(freedom):
    """95 % of Student's density, by Simpson's rule, is within the quantile."""
    x, n = np.linspace(0, t_quantile(freedom), 20_001), freedom
    constant = math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2)) / math.sqrt(n * math.pi)
    y = constant * (1 + x**2 / n) ** (-(n + 1) / 2)
    half = x[1] / 3 * (y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum())
    assert half == pytest.approx(0.475, abs=3e-5)


def test_quantiles_between_whole_degrees():
    # Of 2 degrees it is known in closed form: (2 p - 1) sqrt(2 / (4 p (1 - p))).
    assert t_quantile(2) == pytest.approx(0.95 * math.sqrt(2) / math.sqrt(4 * 0.975 * 0.025), abs=1e-3)
    assert t_quantile(3) < t_quantile(2.5) < t_quantile(2)
    assert t_quantile(1e5) == pytest.approx(1.95996, abs=1e-3)


def test_mean_over_seeds_by_hand():
    # The deviation of 1, 2, 3 is 1; 4.303 is the quantile of 2 degrees in printed tables.
    assert over([1, 2, 3]) == pytest.approx((2, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5, 3), abs=1e-3)
    many = over([-1, 1] * 20)
    assert many.mean == 0 and many.high == pytest.approx(2.023 * (40 / 39) ** 0.5 / 40**0.5, abs=1e-3)
    assert over([0.3]) == (0.3, -math.inf, math.inf, 1)


def test_welch_by_hand():
    # Variances 1 and 4 of 3 values each: error sqrt(5 / 3), degrees (5 / 3) ** 2 / (1 / 18 + 16 / 18) = 50 / 17.
    found = difference([1, 2, 3], [10, 12, 14])
    half = t_quantile(round(50 / 17, 2)) * math.sqrt(5 / 3)
    assert found == pytest.approx((-10, -10 - half, -10 + half, 3))
    assert difference([1.0], [0.5, 0.6]).low == -math.inf
    assert difference([1.0, 1.0], [0.0, 0.0]) == (1, 1, 1, 2)
