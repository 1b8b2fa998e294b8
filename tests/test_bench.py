import csv

import pytest

from bench.__main__ import measure, write
from bench.comparisons import COMPARISONS


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_ways_of_a_comparison_do_the_same(name):
    comparison = COMPARISONS[name]()
    assert len(comparison.ways) >= 2 and comparison.equal()


def test_ways_are_called_in_turn_and_rows_are_added(tmp_path):
    calls = []
    seconds = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert calls == ["a", "b"] * 16
    assert all(low <= median <= high for median, low, high in seconds.values())
    for rate in (1, 2):
        write(tmp_path / "cpu.csv", [{"way": "a", "rate": rate}])
    with open(tmp_path / "cpu.csv") as file:
        assert [row["rate"] for row in csv.DictReader(file)] == ["1", "2"]
