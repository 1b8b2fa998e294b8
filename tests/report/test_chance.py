from __future__ import annotations

import pytest

from fastbd.report.chance import chance


@pytest.mark.parametrize(
    ("classes", "share"),
    [
        ([20, 20], 0.05),
        ([20, None, 20], 0.05),  # an older line among those of one set
        ([None], None),
        ([20, 1000], None),
        ([], None),
    ],
)
def test_chance_is_one_of_the_classes_of_all_evaluations(classes, share):
    lines = [{"top1": 0.5} | ({"n_classes": n} if n else {}) for n in classes]
    assert chance(iter(lines)) == share
