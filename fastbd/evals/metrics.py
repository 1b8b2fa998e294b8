"""Metrics as functions of matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson score interval of hits / n (Wilson 1927); (0, 1) when n is 0."""
    if n == 0:
        return 0.0, 1.0
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def topk_hits(logits: Tensor, labels: Tensor, ks: tuple[int, ...]) -> dict[int, int]:
    """How many rows of logits [N, C] have labels [N] among their k largest, for each k (all classes where k > C)."""
    top = logits.topk(min(max(ks), logits.shape[1])).indices
    found = top == labels[:, None]
    return {k: int(found[:, :k].any(1).sum()) for k in ks}


def rate(name: str, hits: int, n: int) -> dict[str, float]:
    """{name, name_low, name_high}: the share and its Wilson interval."""
    low, high = wilson(hits, n)
    return {name: hits / n if n else float("nan"), f"{name}_low": low, f"{name}_high": high}


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 (with interval), top-5 and top-10 accuracy as fractions; logits [N, C], labels [N]."""
    hits = topk_hits(logits, labels, (1, 5, 10))
    return {
        "n": len(labels),
        **rate("top1", hits[1], len(labels)),
        **{f"top{k}": hits[k] / len(labels) for k in (5, 10)},
    }


def attack(logits: Tensor, labels: Tensor, target: int) -> dict[str, float]:
    """Attack success on triggered images: logits [N, C], true labels [N], the target's class index.

    asr excludes images of the target class, as the published evaluation code does; asr_all counts them too, as the
    paper's wording does; recovery is the share of asr's images that are still given their true class.
    """
    other = labels != target
    predicted = logits.argmax(1)
    n = int(other.sum())
    return {
        "n_asr": n,
        **rate("asr", int((predicted[other] == target).sum()), n),
        "asr_all": float((predicted == target).float().mean()),
        **rate("recovery", int((predicted == labels)[other].sum()), n),
    }


def most_successful(attacks: list[dict]) -> dict:
    """The row of the attack with the highest asr; with several, all of them too, under "attacks"."""
    best = max(attacks, key=lambda row: row["asr"], default={})
    return {**best, "attacks": attacks} if len(attacks) > 1 else best


def mean_by_class(embeddings: Tensor, classes: int) -> Tensor:
    """[classes * T, D], the T prompts of a class in a row -> [classes, D]: normalise, average, normalise."""
    embeddings = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    return torch.nn.functional.normalize(embeddings.view(classes, -1, embeddings.shape[-1]).mean(1), dim=-1)
