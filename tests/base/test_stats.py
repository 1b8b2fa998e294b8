from __future__ import annotations

import math

import pytest

from fastbd.base.stats import difference, over, t_quantile
from fastbd.evals.metrics import T_QUANTILES, over_seeds


@pytest.mark.parametrize("freedom", [1, 2, 3, 10, 30])
def test_quantiles_are_those_of_the_table(freedom):
    assert t_quantile(freedom) == pytest.approx(T_QUANTILES[freedom - 1], abs=1e-3)


def test_quantiles_between_whole_degrees():
    # Of 2 degrees it is known in closed form: (2 p - 1) sqrt(2 / (4 p (1 - p))).
    assert t_quantile(2) == pytest.approx(0.95 * math.sqrt(2) / math.sqrt(4 * 0.975 * 0.025), abs=1e-3)
    assert t_quantile(3) < t_quantile(2.5) < t_quantile(2)
    assert t_quantile(1e5) == pytest.approx(1.95996, abs=1e-3)


def test_mean_over_seeds_is_that_of_the_evaluation():
    values = [0.5, 0.62, 0.57]
    assert over(values)[:3] == pytest.approx(over_seeds(values), abs=1e-4)
    assert over([0.3]) == (0.3, -math.inf, math.inf, 1)


def test_welch_by_hand():
    # Variances 1 and 4 of 3 values each: error sqrt(5 / 3), degrees (5 / 3) ** 2 / (1 / 18 + 16 / 18) = 50 / 17.
    found = difference([1, 2, 3], [10, 12, 14])
    half = t_quantile(round(50 / 17, 2)) * math.sqrt(5 / 3)
    assert found == pytest.approx((-10, -10 - half, -10 + half, 3))
    assert difference([1.0], [0.5, 0.6]).low == -math.inf
    assert difference([1.0, 1.0], [0.0, 0.0]) == (1, 1, 1, 2)
