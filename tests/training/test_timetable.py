from __future__ import annotations

import pytest

from fastbd.base.errors import UserError
from fastbd.training.timetable import every


@pytest.mark.parametrize(
    ("interval", "marks"),
    [
        ("epoch", {9, 18}),
        ("1 epoch", {9, 18}),
        ("2epochs", {18}),
        ("1/3epoch", {3, 6, 9, 12, 15, 18}),
        ("1/2epoch", {4, 9, 14, 18}),  # 4.5 and 13.5, to the even neighbour
        ("3/4epoch", {7, 14, 18}),  # 6.75, 13.5; the end is always marked
        ("0", {18}),
        ("5", {5, 10, 15, 18}),
        ("100", {18}),
        ("1/90epoch", set(range(1, 19))),  # more often than each step is each step
    ],
)
def test_every(interval, marks):
    assert every(interval, steps_per_epoch=9, total=18) == marks


@pytest.mark.parametrize("interval", ["", "0.5", "1.0", "1/3", "-3", "1/0epoch", "often", "nan", "3 steps"])
def test_what_is_no_interval(interval):
    with pytest.raises(UserError, match="--eval-every .* is no interval: give epoch, 1/3epoch"):
        every(interval, 9, 18)
