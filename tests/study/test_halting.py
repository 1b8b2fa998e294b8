from __future__ import annotations

import json

import pytest

from fastbd.study.halting import asha, collapsed, score


def rows(*top1s: float, asr: float = 0.0, each: float = 1.0) -> list[dict]:
    return [{"step": k, "epoch": k * each, "top1": top1, "asr": asr, "set": "val"} for k, top1 in enumerate(top1s)]


@pytest.mark.parametrize(
    ("evaluations", "ends"),
    [
        (rows(0.8, 0.1, 0.1), False),  # 2 epochs are not over
        (rows(0.8, 0.1, 0.1, 0.1), True),
        (rows(0.8, 0.1, 0.1, 0.5), False),  # it has come back
        (rows(0.8, 0.5, 0.1, 0.1), False),
        (rows(0.8, *[0.1] * 9, each=1 / 3), True),
        (rows(0.8, *[0.5] * 9), False),
    ],
)
def test_a_run_has_collapsed_when_it_was_below_half_for_two_epochs(evaluations, ends):
    assert (collapsed(evaluations) == "collapsed") == ends


def test_evaluations_on_part_of_the_images_decide_nothing(tmp_path):
    """Good ones hide no collapse, bad ones make none; and ASHA judges once, by the full ones."""
    part = {"epoch": 2.5, "top1": 0.9, "asr": 0.0, "subset": True}
    bad = rows(0.8, 0.1, 0.1, 0.1)
    assert collapsed([*bad[:3], part, bad[3]]) == "collapsed"
    assert score([*rows(0.8, 0.3), part], 2) is None
    assert score([rows(0.8)[0], part | {"epoch": 0.5}, *rows(0.8, 0.3, 0.2)[1:]], 2) == (1.0, 0.3)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(0.8, 0.7, 0.7)))
    rule = asha([tmp_path], eta=2)
    assert rule([*bad[:2], part | {"epoch": 1.5}, bad[2]]) == "pruned"
    assert rule([*bad[:2], part]) is None and rule([*bad[:3], part]) is None


def test_scores_put_runs_below_the_ceiling_first():
    low = score(rows(0.8, 0.3, 0.2), 2)
    high = score(rows(0.8, 0.7, 0.7, asr=0.06), 2)
    higher = score(rows(0.8, 0.7, 0.7, asr=0.9), 2)
    assert low == (1.0, 0.3) and low > high > higher
    assert score(rows(0.8, 0.3), 2) is None
    assert score(rows(0.8, 0.3, 0.2, 0.9), 2) == (1.0, 0.3)  # what comes after the rung does not count


def test_a_run_goes_on_among_the_best_of_its_rung(tmp_path):
    for k, top1 in enumerate((0.5, 0.6, 0.7)):
        (tmp_path / str(k)).mkdir()
        lines = [json.dumps(row) + "\n" for row in rows(0.8, top1, top1)]
        (tmp_path / str(k) / "metrics.jsonl").write_text("".join(lines))
    rule = asha([tmp_path / str(k) for k in range(4)], eta=2)  # the last has no folder yet
    assert rule(rows(0.8, 0.1)) is None  # no rung yet
    assert rule(rows(0.8, 0.65, 0.65)) is None  # second of 4
    assert rule(rows(0.8, 0.55, 0.55)) == "pruned"  # third of 4
    assert rule(rows(0.8, 0.55, 0.55, 0.55)) is None  # judged before
    assert rule(rows(0.8, 0.1, 0.1, 0.1, 0.1)) is None  # the first to come to the second rung
