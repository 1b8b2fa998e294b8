"""What is searched, in the light of what; and that processes which search at once do not tread on one another."""

from __future__ import annotations

import json
from dataclasses import replace

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
        {"method": ("finetune", "cleanclip"), "lr": (1e-4, 1e-3, 1e-2), "rows": (1_000, 2_000)},
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


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([(0.5, 0.3), (0.4, 0.05), (0.3, 0.0)], (0.4, 0.05)),
        ([(0.5, 0.3), (0.4, 0.06), (0.45, 0.06)], (0.45, 0.06)),
        ([], (0.0, 1.0)),
    ],
    ids=["within 5 %", "the lowest ASR", "diverged"],
)
def test_scores(after, expected):
    """The start counts for nothing, however good."""
    rows = [evaluation(0, 0.9, 0.0), *(evaluation(k, *pair) for k, pair in enumerate(after, 1))]
    assert search.scores(rows) == expected


def test_evaluations_on_part_of_the_images_score_nothing():
    rows = [evaluation(0, 0.9, 0.9), evaluation(1, 0.8, 0.0) | {"subset": True}, evaluation(2, 0.5, 0.04)]
    assert search.scores(rows) == (0.5, 0.04)


def test_a_space_is_a_model_and_a_cleaning_at_several_rates(ledger):
    """2 objectives x 2 seeds x 2 methods x 2 cleaning sets, which are compared; the second entry has one rate."""
    spaces = search.spaces(ledger)
    assert len(spaces) == 16
    for space in spaces:
        assert (space.low, space.high) == (1e-4, 1e-2)
        assert [run for run in ledger.runs if space.holds(run)] == list(space.grid) and len(space.grid) == 3


def test_trials_are_shared_out_evenly_and_end(ledger):
    pytest.importorskip("optuna")
    other = Ledger(ledger.folder)
    assert all(search.extend(each, 1) for each in (ledger, other) * 8)
    assert not search.extend(ledger, 1) and not search.extend(other, 1)
    added = [run for run in Ledger(ledger.folder, STUDY).runs if "-search" in run.name]
    assert len({(run.config.run, run.config.method, run.config.rows) for run in added}) == 16
    for run in added:
        assert 1e-4 <= run.config.lr <= 1e-2
        assert sum(space.holds(run) for space in search.spaces(ledger)) == 1
    assert [run.id for run in ledger.runs if "-search" in run.name] == [run.id for run in added]


def test_another_that_adds_meanwhile_is_not_overwritten(ledger):
    """The choice is made again, knowing the other's."""
    pytest.importorskip("optuna")
    other, seen = Ledger(ledger.folder), []

    def choose():
        seen.append(len(ledger.study.searched))
        if len(seen) == 1:
            assert search.extend(other, 1)
        return {"method": "finetune", "lr": 5e-3, "model": "mmcl-s0", "seed": 0}

    assert ledger.add(choose) and seen == [0, 1]
    assert len(Ledger(ledger.folder).study.searched) == 2


def test_a_choice_follows_the_scores(tmp_path):
    """Where all that was made at small rates is hopeless, and good near 0.01, draws are near 0.01."""
    pytest.importorskip("optuna")
    rates = tuple(10 ** (-5 + k / 6) for k in range(19))
    study = replace(STUDY, seeds=(0,), pretrain=({"objective": "mmcl"},), clean=({"method": "finetune", "lr": rates},))
    ledger = Ledger(tmp_path / "s", study)
    for run in ledger.runs:
        good = run.verb == "clean" and run.config.lr > 3e-3
        finish(run, [evaluation(0, 0.5, 0.9), evaluation(1, 0.6 if good else 0.1, 0.0 if good else 0.9)])
    drawn = []
    for _ in range(5):
        assert search.extend(ledger, 5)
        (row,) = [row for row in ledger.table() if row.status.state == "waiting"]
        finish(row.run, [])
        drawn.append(row.run.config.lr)
    assert sorted(drawn)[2] > 1e-3


def test_what_is_left_to_search_may_be_nothing(ledger):
    """Between two rates that are next to one another."""
    pytest.importorskip("optuna")
    clean = ({"method": "finetune", "lr": (1e-4, 1.01e-4)},)
    small = Ledger(ledger.folder.parent / "small", replace(STUDY, clean=clean))
    for run in small.runs:
        if run.verb == "pretrain":
            finish(run, [])
    assert not search.extend(small, 3)
