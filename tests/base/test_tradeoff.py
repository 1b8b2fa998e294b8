from __future__ import annotations

import random

import pytest

from fastbd.base.tradeoff import area, best, front, is_near_chance


def points(*pairs):
    """Evaluations from (top-1, ASR) in %."""
    return [{"top1": top1 / 100, "asr": asr / 100} for top1, asr in pairs]


# Top-1 and ASR after epochs 1 and 20 of CC3M models cleaned with CleanCLIP at five rates (result files of arXiv
# 2311.14948), and the best top-1 at ASR <= 5, 10 and 50 % over all its rates and epochs, of which these are some.
CC3M = {
    "mmcl": points(
        (11.6, 1.2),
        (11.6, 0.05),
        (14.1, 0.2),
        (14.5, 0.07),
        (16.2, 0.5),
        (16.3, 0.5),
        (17.4, 19.4),
        (17.2, 9.3),
        (17.6, 56.5),
        (17.3, 34.7),
    ),
    "mmcl_ssl": points(
        (13.1, 3.3),
        (14.0, 1.7),
        (15.7, 58.9),
        (16.4, 55.7),
        (17.1, 87.8),
        (17.8, 70.1),
        (18.1, 95.2),
        (18.4, 86.2),
        (17.8, 98.4),
        (18.2, 96.8),
    ),
}
PUBLISHED = {"mmcl": {0.05: 0.1649, 0.10: 0.1722, 0.50: 0.1752}, "mmcl_ssl": {0.05: 0.1416, 0.10: 0.1511, 0.50: 0.1614}}


@pytest.mark.parametrize("objective", CC3M)
def test_best_on_published_runs(objective):
    for ceiling, published in PUBLISHED[objective].items():
        found = best(CC3M[objective], ceiling)["top1"]
        assert found <= published + 0.0005  # the shapes are rounded to 0.1 %
    assert best(CC3M[objective], 0.05)["top1"] == pytest.approx(PUBLISHED[objective][0.05], abs=0.002)


def test_best():
    three = points((10, 1), (20, 5), (30, 50))
    assert best(three, 0.05) == three[1]  # the ceiling itself counts
    assert best(three, 0.049) == three[0]
    assert best(three, 0.009) is None
    assert best([], 1.0) is None
    tie = points((20, 4), (20, 2), (20, 3))
    assert best(tie, 0.05) == tie[1]


def test_front():
    mixed = points((10, 1), (20, 5), (15, 5), (20, 7), (9, 0.5), (30, 50), (29, 60))
    assert front(mixed) == points((9, 0.5), (10, 1), (20, 5), (30, 50))
    assert front(mixed[::-1]) == front(mixed)
    assert front([]) == []


def test_front_by_the_definition():
    rng = random.Random(0)
    cloud = points(*((rng.randrange(60), rng.randrange(60)) for _ in range(200)))
    beaten = [any(o["top1"] >= e["top1"] and o["asr"] <= e["asr"] and o != e for o in cloud) for e in cloud]
    undominated = {(e["asr"], e["top1"]) for e, b in zip(cloud, beaten, strict=True) if not b}
    assert [(e["asr"], e["top1"]) for e in front(cloud)] == sorted(undominated)


def test_area_is_the_mean_of_best_over_ceilings():
    assert area(points((50, 0))) == pytest.approx(0.5)
    assert area(points((20, 10), (40, 60))) == pytest.approx(0.2 * 0.5 + 0.4 * 0.4)
    assert area([]) == 0
    ceilings = [(i + 0.5) / 10_000 for i in range(10_000)]
    for runs in CC3M.values():
        mean = sum((best(runs, c) or {"top1": 0})["top1"] for c in ceilings) / len(ceilings)
        assert area(runs) == pytest.approx(mean, abs=1e-4)


def test_near_chance_is_below_twice_what_guessing_gives():
    assert is_near_chance(0.09, 1 / 20) and not is_near_chance(0.11, 1 / 20)
    assert is_near_chance(0.7, 1 / 2) and not is_near_chance(0.8, 1 / 2)  # twice a half would be all
    assert is_near_chance(0.0015, 1 / 1000) and not is_near_chance(0.16, 1 / 1000)
