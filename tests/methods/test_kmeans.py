from __future__ import annotations

import numpy as np
import pytest
import torch

from fastbd.methods import kmeans
from fastbd.methods.kmeans import spherical_kmeans


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("chunk", [7, 8192])
def test_is_lloyds_algorithm_on_directions(chunk, monkeypatch):
    monkeypatch.setattr(kmeans, "CHUNK", chunk)
    points = np.random.default_rng(0).normal(size=(200, 6))
    x, centres = unit(points), unit(points[:5])
    for _ in range(20):
        labels = (x @ centres.T).argmax(1)
        centres = unit(np.stack([x[labels == k].sum(0) for k in range(5)]))
    found, where = spherical_kmeans(torch.from_numpy(points) * 3, torch.from_numpy(points[:5]))
    np.testing.assert_array_equal(found, (x @ centres.T).argmax(1))
    np.testing.assert_allclose(where, centres, atol=1e-5)


def planted(noise: float = 0.05):
    """Eight directions, 25 points around each."""
    rng, label = np.random.default_rng(1), np.arange(200) % 8
    return torch.from_numpy(np.eye(8, 16)[label] + noise * rng.normal(size=(200, 16))), torch.from_numpy(label)


def test_recovers_planted_clusters():
    points, label = planted()
    found, _ = spherical_kmeans(points, points[:8] + 0.3)
    assert torch.equal(found[:8][label], found) and len(found[:8].unique()) == 8


def test_a_cluster_without_points_goes_on_from_those_that_fit_worst():
    """All start on two of the planted directions: six of the eight clusters are empty at once."""
    points, label = planted(noise=0.0)
    found, _ = spherical_kmeans(points, points[[0, 1, 0, 0, 0, 0, 0, 0]])
    assert len(found.unique()) > 2 and torch.equal(found[:8][label], found)
    far = torch.eye(3)[[0, 0, 0, 0, 1, 2]] + 0.1 * torch.eye(3)[[1, 2, 1, 2, 2, 1]]
    found, _ = spherical_kmeans(far, far[[0, 0, 0]])
    assert found[4] != found[5] and found[0] not in (found[4], found[5])
