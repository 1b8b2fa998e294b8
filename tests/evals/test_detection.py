"""Against loops over float64, hand-made rankings, and a scene with a small far cluster."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastbd.base.errors import UserError
from fastbd.evals import detection as d


def cloud(n: int = 50, dim: int = 6) -> torch.Tensor:
    """Points of which 8 are one, and 2 another."""
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(3))
    x[10:17], x[30] = 2 * x[9], x[29]
    return x


def by_loops(x: torch.Tensor, k: int) -> dict[str, np.ndarray]:
    x = np.float64(x) / np.linalg.norm(np.float64(x), axis=1, keepdims=True)
    n = len(x)
    apart = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
    nearest = [sorted((j for j in range(n) if j != i), key=lambda j: apart[i, j])[:k] for i in range(n)]
    reach = np.array([apart[i, nearest[i][-1]] for i in range(n)])
    lid = np.empty(n)
    for i in range(n):
        logs = [np.log(max(apart[i, j], 1e-6) / max(reach[i], 1e-6)) for j in nearest[i]]
        lid[i] = -1 / min(np.mean(logs), -1e-4)
    floor = np.maximum(reach, 1e-6)
    slof = [np.mean([floor[i] / floor[j] for j in nearest[i]]) for i in range(n)]
    powers = [[lid[j] * np.log(floor[i] / floor[j]) for j in nearest[i]] for i in range(n)]  # their exp may overflow
    dao = np.logaddexp.reduce(powers, axis=1) - np.log(k)
    return {"k_distance": reach, "slof": np.array(slof), "dao": dao, "lid": lid}


@pytest.mark.parametrize("k", [3, 12])
@pytest.mark.parametrize(("rows", "columns"), [(1024, 16_384), (7, 13)])
def test_scores_are_those_of_loops_also_with_duplicates(monkeypatch, k, rows, columns):
    monkeypatch.setattr(d, "ROWS", rows)
    monkeypatch.setattr(d, "COLUMNS", max(columns, k + 1))
    near, expected = d.neighbours(cloud(), k), by_loops(cloud(), k)
    assert not (near.places == torch.arange(50)[:, None]).any()
    np.testing.assert_allclose(d.k_distance(near), expected["k_distance"], atol=1e-6)
    np.testing.assert_allclose(d.dimensionality(near), expected["lid"], rtol=1e-4)
    np.testing.assert_allclose(d.slof(near), expected["slof"], rtol=1e-4)
    np.testing.assert_allclose(d.dao(near), expected["dao"], rtol=1e-4, atol=1e-4)


def test_points_that_are_all_one_are_no_outliers():
    near = d.neighbours(torch.ones(20, 4), 5)
    assert (d.k_distance(near) == 0).all() and (d.slof(near) == 1).all() and d.dao(near).abs().max() < 1e-5


def test_dimensionality_is_that_of_the_surface_that_points_lie_on():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))  # on a sphere, of 2 dimensions
    assert d.dimensionality(d.neighbours(x, 100)).mean() == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("score", [d.k_distance, d.slof, d.dao])
def test_a_cluster_of_more_than_k_points_is_found_in_batches(score):
    draw = torch.Generator().manual_seed(1)
    x, truth = torch.randn(400, 8, generator=draw) * 0.2, torch.zeros(400, dtype=torch.bool)
    x[:, 0] += 1
    truth[:20] = True
    x[:20, :2] = torch.tensor([0.0, 1.0]) + torch.randn(20, 2, generator=draw) * 0.2
    x[:20, 2:] *= 0.1  # closer to one another than the others are
    whole, batched = (score(d.neighbours(x, 12, batch=batch)) for batch in (0, 100))
    assert d.roc_auc(batched, truth) > 0.95 > d.roc_auc(whole, truth)


def test_batches_are_drawn_from_the_seed_and_neighbours_stay_inside():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    first, again, other = (d.neighbours(x, 3, batch=16, seed=seed).places for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    linked = torch.eye(50).index_put((torch.arange(50)[:, None], first), torch.tensor(1.0))
    reached = (torch.linalg.matrix_power(linked + linked.T, 50) > 0).sum(1)
    assert set(reached.tolist()) <= {16, 17}  # three batches of 50
    with pytest.raises(UserError, match="16 pairs have no 16 others each to compare with: lower --k"):
        d.neighbours(x, 16, batch=16)


def test_clip_score_is_the_cosine():
    score = d.clip_score(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [-2.0, 0.0]]))
    assert score.tolist() == pytest.approx([0.96, -1.0])


@pytest.mark.parametrize(
    ("scores", "truth", "roc", "pr", "tpr"),
    [
        # Of 2 x 3 pairs of a true and a false row 5 are right; precision 1 at the first true row, 2/3 at the second.
        ([5, 4, 3, 2, 1], [1, 0, 1, 0, 0], 5 / 6, 1 / 2 + 2 / 3 / 2, 1 / 2),
        # The tie of a true and a false row counts 1/2; the threshold takes both: precision 1 at 4, 2/3 at 3.
        ([4, 3, 3, 1], [1, 1, 0, 0], 3.5 / 4, 1 / 2 + 2 / 3 / 2, 1 / 2),
        ([7, 7, 7, 7], [1, 0, 0, 0], 1 / 2, 1 / 4, 0),  # all tied: chance
        ([1, 2, 3], [1, 0, 0], 0, 1 / 3, 0),
        ([3, 2, 1], [1, 0, 0], 1, 1, 1),
    ],
)
def test_figures_of_merit_by_hand(scores, truth, roc, pr, tpr):
    numbers = d.detection(torch.tensor(scores), torch.tensor(truth, dtype=torch.bool))
    assert numbers == {"roc_auc": pytest.approx(roc), "pr_auc": pytest.approx(pr), "tpr_at_1_fpr": pytest.approx(tpr)}


def test_false_alarms_up_to_the_share_are_allowed():
    scores, truth = torch.arange(110, 0, -1), torch.zeros(110, dtype=torch.bool)
    truth[[0, 2, 4, 5, 6, 7, 8, 9, 10, 11]] = True  # the first false row is second, the next one fourth
    assert d.tpr_at_fpr(scores, truth, 0.01) == 0.2 and d.tpr_at_fpr(scores, truth, 0.02) == 1


def test_without_a_poisoned_pair_there_is_nothing_to_tell_apart():
    with pytest.raises(UserError, match="0 of the 3 pairs are poisoned"):
        d.detection(torch.arange(3), torch.zeros(3, dtype=torch.bool))
