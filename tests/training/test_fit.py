"""The largest batch, found by trying."""

from __future__ import annotations

import pytest

from fastbd.training.fit import Shares, largest


@pytest.mark.parametrize("limit", [0, 31, 32, 33, 640, 1000, 4096, 9999])
@pytest.mark.parametrize("unit", [1, 32])
def test_the_largest_multiple_that_fits_is_found_in_few_trials(limit, unit):
    tried = []

    def fits(count: int) -> bool:
        tried.append(count)
        return count <= limit

    assert largest(fits, unit, 4100) == min(limit, 4100) // unit * unit
    assert len(tried) <= 26 and len(set(tried)) == len(tried)


def test_a_share_is_whole_parts_of_whole_groups():
    """Two processes, 4 parts each, groups of 32 images of which a pair has two: multiples of 64 pairs each."""
    shares = Shares(processes=2, parts=4, group=32, views=2, norms=True)
    assert shares.unit == 64 and shares.part(256) == 32
    shares.check(2 * shares.unit, rows=1000)
