"""What is searched, in the light of what; and that processes which search at once do not tread on one another."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fastbd.study import search
from fastbd.study.grid import Study
from fastbd.study.ledger import Ledger

STUDY = Study(
    name="s",
    about="",
    seeds=(0, 1),
    pretrain=({"objective": ("mmcl", "mmcl_ssl")},),
    clean=(
        {"method": ("finetune", "cleanclip"), "lr": (1e-4, 1e-3, 1e-2)},
        {"method": "finetune", "objective": "ssl", "lr": 1e-3},
    ),
)


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    """All models are there, nothing is cleaned."""
    ledger = Ledger(tmp_path / "s", STUDY)
    for run in ledger.runs:
        if run.verb == "pretrain":
            finish(run, [])
    return ledger


def finish(run, rows: list[dict]) -> None:
    run.config.out.mkdir(parents=True)
    (run.config.out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.product.write_text("{}")


def evaluation(step: int, top1: float, asr: float | None) -> dict:
    return {"step": step, "epoch": step / 10, "top1": top1, "asr": asr}


def of_rates(folder: Path, *rates: float) -> Ledger:
    """One model, which is there, to be cleaned at these rates."""
    study = replace(STUDY, seeds=(0,), pretrain=({"objective": "mmcl"},), clean=({"method": "finetune", "lr": rates},))
    ledger = Ledger(folder / "s", study)
    finish(ledger.runs[0], [])
    return ledger


def cleaned(ledger: Ledger, after: dict[float, list[dict]]) -> None:
    """End the cleanings at some rates, with these evaluations after that of the start, which is good."""
    for run in Ledger(ledger.folder).runs:
        if run.verb == "clean" and run.config.lr in after:
            finish(run, [evaluation(0, 0.9, 0.0), *after[run.config.lr]])


def chosen(ledger: Ledger) -> float | None:
    """The rate that is searched next, which is planned then."""
    return Ledger(ledger.folder).runs[-1].config.lr if search.extend(ledger, 1_000) else None


GOOD, LEAKY, WORSE = [evaluation(1, 0.5, 0.05)], [evaluation(1, 0.6, 0.06)], [evaluation(1, 0.7, 0.3)]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ({1e-4: GOOD, 1e-3: LEAKY, 1e-2: WORSE}, 3.16e-4),  # the root of 1e-4 * 1e-3
        ({1e-4: LEAKY, 1e-3: WORSE, 1e-2: GOOD}, 3.16e-3),
        ({1e-4: [evaluation(1, 0.51, 0.05)], 1e-2: GOOD}, 3.16e-4),
        ({1e-4: [evaluation(1, 0.5, 0.04)], 1e-2: GOOD}, 3.16e-4),
        ({1e-4: LEAKY, 1e-2: WORSE}, 3.16e-4),
        ({1e-4: GOOD + WORSE, 1e-2: LEAKY}, 3.16e-4),
        ({1e-4: LEAKY, 1e-2: [evaluation(1, 0.9, 0.0) | {"subset": True}, *WORSE]}, 3.16e-4),
        ({1e-4: LEAKY, 1e-2: []}, 3.16e-4),
        ({1e-4: LEAKY, 1e-2: [evaluation(1, 0.9, None)]}, 3.16e-4),
        ({}, 3.16e-3),
    ],
    ids=[
        "within 5 %",
        "so at the other end",
        "more top-1",
        "less ASR",
        "the lowest ASR",
        "not its last one",
        "on part of the images",
        "diverged",
        "without ASR",
        "nothing yet: of equal gaps the upper",
    ],
)
def test_the_best_rate_is_that_of_the_best_evaluation(tmp_path, after, expected):
    """Of 1e-4 and 1e-2, beside each of which there is one gap."""
    ledger = of_rates(tmp_path, 1e-4, 1e-3, 1e-2)
    cleaned(ledger, after)
    assert chosen(ledger) == expected


def test_gaps_are_halved_towards_the_best(tmp_path):
    """Top-1 falls by a point for each decade from 2e-3. By hand, with the best rate so far before each choice:

    1e-2: its one gap, from 1e-4. 1e-3: both gaps are a decade. 3.16e-3: above, 1e-2 is 3.165 times as much, and below
    it is 3.160 times 1e-3; then below. 1.78e-3: above, 3.16e-3 is 1.775 times as much, and below it is 1.78 times 1e-3;
    then above. 2.37e-3 is 0.07 decades off, and so 1.78e-3 remains the best, with 1.33e-3 below and 2.37e-3 above it,
    of which the first is farther.
    """
    ledger, found = of_rates(tmp_path, 1e-4, 1e-2), []

    def finish_at(*rates: float) -> None:
        cleaned(ledger, {lr: [evaluation(1, 0.9 - abs(math.log10(lr / 2e-3)) / 100, 0.0)] for lr in rates})

    finish_at(1e-4, 1e-2)
    for _ in range(7):
        found.append(chosen(ledger))
        finish_at(found[-1])
    assert found == [1e-3, 3.16e-3, 5.62e-3, 1.78e-3, 1.33e-3, 2.37e-3, 1.54e-3]


def test_those_who_search_together_choose_different_rates(tmp_path):
    """What is planned is a border, though it has not ended; at last 1e-3 / 3.16e-4 is wider than 3.16e-3 / 1e-3."""
    ledger = of_rates(tmp_path, 1e-4, 1e-3, 1e-2)
    cleaned(ledger, {1e-3: GOOD})
    assert [chosen(ledger), chosen(Ledger(ledger.folder)), chosen(ledger)] == [3.16e-3, 3.16e-4, 5.62e-4]


def test_where_the_best_rates_gaps_are_too_narrow_the_widest_is_halved(tmp_path):
    ledger = of_rates(tmp_path, 1e-4, 1.01e-4, 1e-3, 1.03e-2)
    cleaned(ledger, {1e-4: GOOD})
    assert chosen(ledger) == 3.21e-3  # the root of 1.03e-5


def test_a_gap_from_0_is_halved_too(tmp_path):
    ledger = of_rates(tmp_path, 0.0, 1e-3, 3e-3)
    assert [chosen(ledger), chosen(ledger)] == [5e-4, 2.5e-4]


def test_a_space_is_a_model_and_a_cleaning_at_several_rates(ledger):
    """2 objectives x 2 seeds x 2 methods, which are compared; the second entry has one rate."""
    spaces = search.spaces(ledger)
    assert len(spaces) == 8
    for space in spaces:
        assert (space.low, space.high) == (1e-4, 1e-2)
        assert [run for run in ledger.runs if space.holds(run)] == list(space.grid) and len(space.grid) == 3


def test_trials_are_shared_out_evenly_and_end(ledger):
    other = Ledger(ledger.folder)
    assert all(search.extend(each, 1) for each in (ledger, other) * 4)
    assert not search.extend(ledger, 1) and not search.extend(other, 1)
    added = [run for run in Ledger(ledger.folder, STUDY).runs if "-search" in run.name]
    assert len({(run.config.run, run.config.method) for run in added}) == len(added) == 8
    spaces = search.spaces(ledger)
    for run in added:
        assert 1e-4 <= run.config.lr <= 1e-2
        assert sum(space.holds(run) for space in spaces) == 1
    assert [run.id for run in ledger.runs if "-search" in run.name] == [run.id for run in added]


def test_another_that_adds_meanwhile_is_not_overwritten(ledger):
    """The choice is made again, knowing the other's."""
    other, seen = Ledger(ledger.folder), []

    def choose():
        seen.append(len(ledger.study.searched))
        if len(seen) == 1:
            assert search.extend(other, 1)
        return {"method": "finetune", "lr": 5e-3, "model": "mmcl-s0", "seed": 0}

    assert ledger.add(choose) and seen == [0, 1]
    assert len(Ledger(ledger.folder).study.searched) == 2


def test_what_is_left_to_search_may_be_nothing(ledger):
    """Between two rates that are next to one another."""
    clean = ({"method": "finetune", "lr": (1e-4, 1.01e-4)},)
    small = Ledger(ledger.folder.parent / "small", replace(STUDY, clean=clean))
    for run in small.runs:
        if run.verb == "pretrain":
            finish(run, [])
    assert not search.extend(small, 3)
