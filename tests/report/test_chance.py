from __future__ import annotations

import pytest

from fastbd.report.chance import chance, line_names


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


@pytest.mark.parametrize(
    ("guesses", "ceiling", "guess"),
    [
        ((None,), "ASR 5% and 10%", None),
        ((0.001, None, 0.001), "ASR 5% and 10%", "chance 0.1%"),
        ((1 / 16,), "ASR 5% and 10%", "chance 6.25%"),
        ((0.05,), "ASR 5% (chance) and 10%", "chance 5%"),
        ((1 / 21,), "ASR 5% (chance) and 10%", "chance 4.76%"),
        ((0.1, 0.001), "ASR 5% and 10% (chance)", "chance 0.1% and 10%"),
    ],
)
def test_lines_are_named_together(guesses, ceiling, guess):
    assert line_names(guesses) == {"ceiling": ceiling} | ({"chance": guess} if guess else {})
