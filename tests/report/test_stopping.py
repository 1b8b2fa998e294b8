from __future__ import annotations

import pytest

from fastbd.base.run_folder import find
from fastbd.report.stopping import RULES, by_group, by_run, choose, farthest, last, lowest_loss, most_agreement, summary


@pytest.fixture
def runs(write_run, evaluation, tmp_path):
    """Two runs from a start of validation loss 1: (top-1, ASR, loss, drift of images and of captions, agreement)."""
    made = {
        "a": [(60, 90, 1.0, 0, 0, 0.5), (58, 40, 0.9, 0.3, 0.1, 0.6), (55, 4, 1.0, 0.5, 0.1, 0.7)],
        "b": [(60, 90, 1.0, 0, 0, 0.5), (50, 2, 0.8, 0.3, 0.2, 0.9), (57, 20, 1.1, 0.9, 0.9, 0.8)],
    }
    for name, points in made.items():
        rows = [
            evaluation(10 * k, k, top1 / 100, asr / 100)
            | {"val_loss": loss, "drift_image": image, "drift_text": text, "agreement": agreement}
            for k, (top1, asr, loss, image, text, agreement) in enumerate(points)
        ]
        config = {"verb": "clean", "method": "par", "objective": "mmcl", "pretrain_objective": "mmcl", "start": "/base"}
        write_run(tmp_path / name, config | {"config": {"seed": 0}}, rows, [])
    return find([tmp_path])


@pytest.mark.parametrize(
    ("rule", "chosen", "alone"),
    [
        (lowest_loss, (50, 2), (58, 40)),
        (farthest, (55, 4), (55, 4)),
        (most_agreement, (50, 2), (55, 4)),
        (last, (57, 20), (55, 4)),
    ],
)
def test_rules_by_hand(runs, rule, chosen, alone):
    for some, (top1, asr) in ((runs, chosen), (runs[:1], alone)):
        choice = choose(rule, some)
        assert (choice.chosen["top1"], choice.chosen["asr"]) == pytest.approx((top1 / 100, asr / 100))
        assert choice.known["top1"] == 0.55 and choice.cost == pytest.approx(0.55 - top1 / 100)


def test_a_sweep_is_one_choice_a_rule(runs):
    found = by_group(runs)
    assert [(name, len(choices)) for _, name, choices in found] == [(name, 1) for name in RULES]
    assert len(by_run(runs)) == 2 * len(RULES)
    both = summary([choice for _, _, choices in found for choice in choices])
    assert (both.choices, both.clean, both.possible) == (4, 3, 4)
    assert both.asr == pytest.approx((2 + 4 + 2 + 20) / 400) and both.cost == pytest.approx((5 + 0 + 5 - 2) / 400)


def test_older_runs_leave_only_the_last(fake_runs):
    found = {name: choices for group, name, choices in by_group(find([fake_runs])) if group.method == "CleanCLIP"}
    assert [len(found[name]) for name in RULES] == [0, 0, 0, 1]
    assert found["last evaluation"][0].known is None and found["last evaluation"][0].cost is None
    assert summary([]) is None
