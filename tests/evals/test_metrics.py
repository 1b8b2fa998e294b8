import math

import numpy as np
import pytest
import torch

from fastbd.base.stats import interval, wilson
from fastbd.evals import metrics
from fastbd.evals.metrics import (
    accuracy,
    alignment,
    attack,
    mean_by_class,
    modality_gap,
    most_successful,
    per_class,
    ranks,
    uniformity,
)

NAN = float("nan")


def test_ranks_on_a_matrix_done_by_hand():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.3, 0.8], [0.7, 0.6, 0.1], [0.1, 0.9, 0.4]])
    assert ranks(scores, torch.tensor([0, 1, 1, 0])).tolist() == [0, 1, 1, 2]
    assert ranks(scores, 2).tolist() == [2, 0, 2, 1]


def test_equal_scores_are_in_the_order_of_their_columns():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0]] * 4)
    assert ranks(scores, torch.arange(4)).tolist() == [3, 0, 1, 2]
    random = torch.randint(0, 5, (50, 20), generator=torch.manual_seed(0))
    order = np.argsort(-random.numpy(), axis=1, kind="stable")
    for column in range(20):
        assert ranks(random, column).tolist() == (order == column).argmax(1).tolist()
    assert torch.equal(ranks(random, random.argmax(1)), torch.zeros(50, dtype=torch.int64))


def test_a_nan_is_never_first():
    assert ranks(torch.tensor([[NAN, 0.0], [0.0, NAN], [NAN, NAN]]), 0).tolist() == [2, 1, 2]


def test_accuracy_by_hand():
    row = accuracy(torch.tensor([0, 2, 3, 4, 5, 9, 10, 0, 12]))
    assert {name: row[name] for name in ("n", "top1", "top3", "top5", "top10")} == {
        "n": 9,
        "top1": 2 / 9,
        "top3": 3 / 9,
        "top5": 5 / 9,
        "top10": 7 / 9,
    }
    assert (row["top1_low"], row["top1_high"]) == wilson(2, 9)
    assert accuracy(torch.tensor([0, 1, 1, 2]), population=4).keys() == row.keys()
    more = accuracy(torch.tensor([0, 1, 1, 2]), population=40)
    assert more.keys() - row.keys() == {"population", "top1_full_low", "top1_full_high"}
    assert (more["top1_full_low"], more["top1_full_high"]) == interval(1, 4, 40)
    assert more["top1_low"] < more["top1_full_low"] < 0.25 < more["top1_full_high"] < more["top1_high"]


LABELS = torch.tensor([0, 1, 1, 2, 2])
LABEL_RANKS = torch.tensor([0, 0, 1, 0, 7])
TARGET_RANKS = torch.tensor([0, 1, 0, 4, 0])  # of class 0


def test_attack_by_hand():
    row = attack(LABEL_RANKS, TARGET_RANKS, LABELS, 0)
    # Images 1 to 4 are not of class 0: their target is at 1, 0, 4, 0, and images 1 and 3 keep their class.
    expected = {"n_asr": 4, "asr": 2 / 4, "asr_top3": 3 / 4, "asr_top5": 1, "asr_top10": 1, "recovery": 2 / 4}
    expected |= {"asr_all": 3 / 5, "asr_all_top3": 4 / 5, "asr_all_top5": 1, "asr_all_top10": 1, "triggered_top1": 0.6}
    for name, (hits, n) in {"asr": (2, 4), "asr_all": (3, 5), "recovery": (2, 4), "triggered_top1": (3, 5)}.items():
        expected |= dict(zip((f"{name}_low", f"{name}_high"), wilson(hits, n), strict=True))
    assert row == expected


def test_attack_of_a_population():
    row = attack(LABEL_RANKS, TARGET_RANKS, LABELS, 0, population=50)
    more = row.keys() - attack(LABEL_RANKS, TARGET_RANKS, LABELS, 0).keys()
    assert more == {
        f"{name}_full_{end}" for name in ("asr", "asr_all", "recovery", "triggered_top1") for end in ("low", "high")
    }
    assert (row["asr_all_full_low"], row["asr_all_full_high"]) == interval(3, 5, 50)
    assert (row["asr_full_low"], row["asr_full_high"]) == interval(2, 4, 40)  # 4/5 of the population


@pytest.mark.parametrize("population", [None, 50])
def test_attack_on_images_of_the_target_class_alone(population):
    row = attack(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([3, 3]), 3, population)
    assert row["n_asr"] == 0 and (row["asr_low"], row["asr_high"]) == (0, 1)
    assert row["asr"] is row["asr_top10"] is row["recovery"] is None
    assert row["asr_all"] == row["triggered_top1"] == 0.5


def test_each_class():
    rows = per_class(LABELS, LABEL_RANKS == 0, ["a", "b", "c"], TARGET_RANKS == 0)
    assert rows == [
        {"class": "a", "n": 1, "top1": 1, "asr": 1},
        {"class": "b", "n": 2, "top1": 0.5, "asr": 0.5},
        {"class": "c", "n": 2, "top1": 0.5, "asr": 0.5},
    ]
    more = per_class(LABELS, LABEL_RANKS == 0, ["a", "b", "c", "c"])  # of the fourth there is no image
    assert [(row["class"], row["n"], "asr" in row) for row in more] == [
        ("a", 1, False),
        ("b", 2, False),
        ("c", 2, False),
    ]


def test_the_most_successful_attack():
    weak, strong = {"asr": 0.1, "target": "a"}, {"asr": 0.9, "target": "b"}
    assert most_successful([weak, strong]) == {**strong, "attacks": [weak, strong]}
    assert most_successful([weak]) == weak and most_successful([]) == {}


def test_classifier_normalises_before_and_after_the_mean():
    prompts = torch.tensor([[2.0, 0.0], [0.0, 7.0], [3.0, 0.0], [5.0, 0.0]])
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]])
    assert torch.allclose(mean_by_class(prompts, 2), expected)


def test_gap_and_alignment_by_hand():
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    # Means (1/2, 1/2) and (-1/2, -1/2); then squared distances 2 and 0.
    assert modality_gap(images, -5 * images) == pytest.approx(2**0.5)
    assert alignment(images, torch.tensor([[0.0, 5.0], [0.0, 1.0]])) == pytest.approx(1)


@pytest.mark.parametrize("cells", [metrics.CELLS, 5, 1])
def test_uniformity_by_hand(monkeypatch, cells):
    monkeypatch.setattr(metrics, "CELLS", cells)
    assert uniformity(torch.tensor([[0.0, 2.0], [0.0, -1.0]])) == pytest.approx(-8)  # squared distance 4
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6)
    # Four points on a circle: from each two at squared distance 2 and one at 4.
    square = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, -4.0]])
    assert uniformity(square) == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3))


def test_uniformity_of_points_spread_over_a_circle():
    """Its limit is the mean of exp(4 cos - 4) over all angles: log I0(4) - 4, I0(4) = sum of 4^k / k!^2."""
    angles = torch.arange(4000) * (2 * math.pi / 4000)
    bessel = sum(4**k / math.factorial(k) ** 2 for k in range(30))
    points = torch.stack([angles.cos(), angles.sin()], 1)
    assert uniformity(points) == pytest.approx(math.log(bessel) - 4, abs=1e-3)
