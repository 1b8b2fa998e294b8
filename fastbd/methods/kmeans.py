"""Spherical k-means (Dhillon and Modha 2001): clusters of directions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

CHUNK = 8192  # points compared with all centres at once


@torch.no_grad()
def spherical_kmeans(points: Tensor, start: Tensor, iterations: int = 20) -> tuple[Tensor, Tensor]:
    """Labels int64 [N], nearest of the centres float32 [K, D], of `points` [N, D], by cosine.

    Lloyd's algorithm from the directions of `start` [K, D]. A cluster that loses all its points goes on from one of
    those that are farthest from their centres. The same on each run: sums are products of matrices, not atomic adds.
    """
    points, centres = normalize(points.float(), dim=-1), normalize(start.float(), dim=-1)
    for _ in range(iterations):
        labels, cosines = _nearest(points, centres)
        sums, counts = centres.new_zeros(centres.shape), torch.zeros(len(centres), device=points.device)
        for part, label in zip(points.split(CHUNK), labels.split(CHUNK), strict=True):
            member = one_hot(label, len(centres)).to(part.dtype)
            sums += member.T @ part
            counts += member.sum(0)
        empty = (counts == 0).nonzero()[:, 0]
        sums[empty] = points[cosines.argsort(stable=True)[: len(empty)]]
        centres = normalize(sums, dim=-1)
    return _nearest(points, centres)[0], centres


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Of each point the number of the nearest centre, the first of several, and their cosine."""
    best = [(part @ centres.T).max(1) for part in points.split(CHUNK)]
    return torch.cat([b.indices for b in best]), torch.cat([b.values for b in best])
