"""A run that follows another in the same memory, with another seed and so other rows, ends as it does alone."""

from __future__ import annotations

import pytest
from cleanings import cleaning, same, start, state
from tables import table

from fastbd.training.reuse import Kept

METHODS = {
    "shrink_perturb": (),
    "deep_cluster": ("--clusters", 8),
    "supervised": ("--data", "val.beton"),
}


@pytest.mark.parametrize("method", table(METHODS, "deep_cluster"))
def test_the_second_of_two_runs_is_as_alone(method, study, monkeypatch, tmp_path):
    monkeypatch.chdir(study)
    start(study)
    flags = ("--method", method, *METHODS[method], "--rows", 48, "--seed")
    alone = cleaning(tmp_path / "alone", *flags, 1)
    alone.train()
    kept = Kept()
    before = cleaning(tmp_path / "before", *flags, 0, kept=kept)
    before.train()
    second = cleaning(tmp_path / "second", *flags, 1, kept=kept)
    assert second.opened.step is before.opened.step and second.opened.method is before.opened.method
    second.train()
    assert same(state(alone), state(second)) and not same(state(alone), state(before))
