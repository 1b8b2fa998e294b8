"""Detection of poisoned pairs by their embeddings, and how well it goes.

Every score ranks pairs: higher is more suspicious.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastbd.base import random
from fastbd.base.console import progress
from fastbd.base.errors import UserError

ROWS, COLUMNS = 1024, 16_384  # similarities that are in memory at once
LEAST = 1e-6  # distances below are float32's rounding: duplicates
FLAT = 1e-4  # mean log ratio of distances that are all one: 10,000 is the highest dimension


class Neighbours(NamedTuple):
    """The k nearest others of N points: distances float32 [N, k], ascending, and the places of those points [N, k]."""

    distances: Tensor
    places: Tensor


def neighbours(x: Tensor, k: int = 16, *, batch: int = 0, seed: int = 0) -> Neighbours:
    """By Euclidean distance between the rows of x [N, D], brought to length 1.

    With `batch`, only those of the same batch count: N / batch of them, drawn from the seed, of sizes that differ by
    at most one. Points whose distances differ by less than some 1e-3 may change places among the nearest; the distances
    are exact. UserError where a batch holds fewer than k others.
    """
    x = F.normalize(x.float(), dim=-1)
    distances = x.new_empty(len(x), k)
    places = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    with progress("neighbours", len(x)) as advance:
        for members in _batches(len(x), batch, seed):
            if len(members) <= k:
                raise UserError(f"{len(members)} pairs have no {k} others each to compare with: lower --k.")
            members = torch.from_numpy(members).to(x.device)
            points = x[members]
            for first in range(0, len(members), ROWS):
                rows = points[first : first + ROWS]
                near = _most_similar(rows, points, first, k)
                apart, order = (rows[:, None] - points[near]).norm(dim=-1).sort()
                mine = members[first : first + ROWS]
                distances[mine], places[mine] = apart, members[near.gather(1, order)]
                advance(len(rows))
    return Neighbours(distances, places)


def _batches(n: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    order = random.generator(seed, "detect-batches").permutation(n) if batch else np.arange(n)
    return iter(np.array_split(order, max(1, round(n / batch)) if batch else 1))


def _most_similar(rows: Tensor, points: Tensor, first: int, k: int) -> Tensor:
    """Places [B, k] of the points nearest to each of the rows, which are the points from place `first` on."""
    best = rows.new_empty(len(rows), 0)
    places = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    for start in range(0, len(points), COLUMNS):
        similar = rows @ points[start : start + COLUMNS].T
        similar.diagonal(first - start).fill_(-math.inf)  # a point is no neighbour of its own
        found, where = similar.topk(min(k, similar.shape[1]))
        best, order = torch.cat([best, found], 1).topk(k)
        places = torch.cat([places, where + start], 1).gather(1, order)
    return places


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine of each pair's embeddings, [N, D] each.

    Early in training a model matches the poisoned pairs better than the others, hence the sign. Later it may match them
    less well, and to a model without the backdoor they are mismatches: the ROC-AUC is then below 1/2.
    """
    parts = zip(images.split(COLUMNS), texts.split(COLUMNS), strict=True)
    return torch.cat([F.cosine_similarity(image.float(), text.float(), dim=-1) for image, text in parts])


def k_distance(near: Neighbours) -> Tensor:
    """Distance to the k-th nearest neighbour, [N] (Ramaswamy et al. 2000)."""
    return near.distances[:, -1]


def slof(near: Neighbours) -> Tensor:
    """Simplified local outlier factor [N]: mean ratio of the k-distance to each neighbour's (Schubert et al. 2014)."""
    return _ratios(near).mean(1)


def dao(near: Neighbours) -> Tensor:
    """Dimensionality-aware outlierness [N], its logarithm: SLOF with each ratio to the power of the local intrinsic
    dimensionality at the neighbour (Anderberg et al., arXiv 2401.05453)."""
    exponents = dimensionality(near)[near.places]
    return (exponents * _ratios(near).log()).logsumexp(1) - math.log(near.places.shape[1])


def dimensionality(near: Neighbours) -> Tensor:
    """Local intrinsic dimensionality [N] by the maximum-likelihood estimator (Amsaleg et al. 2015, Hill's)."""
    distances = near.distances.clamp(min=LEAST)
    return 1 / (distances[:, -1:] / distances).log().mean(1).clamp(min=FLAT)


def _ratios(near: Neighbours) -> Tensor:
    """Of the k-distance to each neighbour's, [N, k]; 1 among duplicates."""
    reach = k_distance(near).clamp(min=LEAST)
    return reach[:, None] / reach[near.places]


def detection(scores: Tensor, truth: Tensor) -> dict[str, float]:
    """How scores [N] rank what is true, bool [N]: areas under the curves, and the share found at 1 % false alarms.

    UserError where all are true, or none.
    """
    found = int(truth.sum())
    if found in (0, len(truth)):
        raise UserError(f"{found} of the {len(truth)} pairs are poisoned, so there is nothing to tell apart.")
    return {
        "roc_auc": roc_auc(scores, truth),
        "pr_auc": pr_auc(scores, truth),
        "tpr_at_1_fpr": tpr_at_fpr(scores, truth, 0.01),
    }


def roc_auc(scores: Tensor, truth: Tensor) -> float:
    """Share of the pairs of a true and a false row that are ranked right; ties count one half."""
    hits, alarms = _above(scores, truth)
    return float(torch.trapezoid(hits, alarms) / (hits[-1] * alarms[-1]))


def pr_auc(scores: Tensor, truth: Tensor) -> float:
    """Average precision: the precision at each threshold, weighted by the share of the true rows that it adds."""
    hits, alarms = _above(scores, truth)
    return float((hits.diff() * hits[1:] / (hits + alarms)[1:]).sum() / hits[-1])


def tpr_at_fpr(scores: Tensor, truth: Tensor, fpr: float) -> float:
    """The largest share of the true rows that a threshold finds with at most a share `fpr` of the false ones."""
    hits, alarms = _above(scores, truth)
    return float(hits[alarms <= fpr * alarms[-1]].max() / hits[-1])


def _above(scores: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """True and false rows at or above each distinct score, from none to all, float64 [T + 1]."""
    place = (-scores.double()).unique(return_inverse=True)[1]
    counts = torch.stack([torch.bincount(place, side.double()) for side in (truth, ~truth)])
    hits, alarms = F.pad(counts.cumsum(1), (1, 0))
    return hits, alarms
