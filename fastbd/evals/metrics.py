"""Metrics as functions of ranks and embeddings. Shares are fractions; `_low` and `_high` are the ends of 95 %."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbd.base.stats import interval, over

CELLS = 1 << 26  # numbers of a matrix that exist at a time
SAMPLE = 10_000


def ranks(scores: Tensor, columns: Tensor | int) -> Tensor:
    """How many columns of scores [N, C] come before the given one of each row, int64 [N]: top-k is rank < k.

    Before it are the larger ones, and of equal ones those with a lower index, as for argmax: lists have classes twice.
    """
    if isinstance(columns, int):
        columns = torch.full((len(scores),), columns, device=scores.device)
    columns = columns[:, None]
    own, places = scores.gather(1, columns), torch.arange(scores.shape[1], device=scores.device)
    # Those that are not before it are counted, so that a NaN has the last rank and not the first.
    return scores.shape[1] - ((scores < own) | ((scores == own) & (places >= columns))).sum(1)


# ---- shares and their intervals ----


def rate(name: str, hits: int, n: int, population: float | None = None) -> dict[str, float | None]:
    """{name, name_low, name_high}: the share and its interval; with a population above n, name_full_low and _high."""
    low, high = interval(hits, n)
    row: dict[str, float | None] = {name: _share(hits, n), f"{name}_low": low, f"{name}_high": high}
    if n and population and population > n:
        low, high = interval(hits, n, population)
        row |= {f"{name}_full_low": low, f"{name}_full_high": high}
    return row


def averaged(rows: list[dict], key: str) -> dict:
    """The mean of each number over the rows of several seeds, and how far the draw of the triggers moves `key`."""
    if len(rows) == 1:
        return rows[0]
    means = {name: statistics.fmean(row[name] for row in rows) for name in rows[0] if isinstance(rows[0][name], float)}
    values = [row[key] for row in rows]
    if None in values:
        return {**rows[0], **means}
    mean = over(values)
    ends = {f"{key}_seeds_low": max(0.0, mean.low), f"{key}_seeds_high": min(1.0, mean.high)}
    return {**rows[0], **means, f"{key}_by_seed": values, **ends}


# ---- classification ----


def accuracy(label_ranks: Tensor, population: int | None = None) -> dict[str, float | None]:
    """Top-1 (with intervals), 3, 5 and 10 from the rank of each image's label [N]; a sample of `population` images."""
    n = len(label_ranks)
    row: dict[str, float | None] = {"n": n, **_top("top1", "top", label_ranks, population)}
    return row | ({"population": population} if population and population > n else {})


def attack(
    label_ranks: Tensor, target_ranks: Tensor, labels: Tensor, target: int, population: int | None = None
) -> dict[str, float | None]:
    """Attack success on triggered images: ranks of their labels and of the target [N], labels [N], the target's label.

    asr: images of the target class left out, as in the code of Verma et al. (arXiv 2311.14948); asr_all: with them, as
    CleanCLIP's paper has it (arXiv 2303.03323) and PAR's code (arXiv 2412.00727). recovery: asr's images that are
    still given their class, BackdoorBench's RA (arXiv 2206.12654). triggered_top1: accuracy on all. The target class is
    taken to have the same share of the population as of the sample.
    """
    n, other = len(labels), labels != target
    kept, right, n_other = torch.stack([(label_ranks == 0) & other, label_ranks == 0, other]).sum(1).tolist()
    others = population * n_other / n if population and n else None
    return {
        "n_asr": n_other,
        **_top("asr", "asr_top", target_ranks[other], others),
        **_top("asr_all", "asr_all_top", target_ranks, population),
        **rate("recovery", kept, n_other, others),
        **rate("triggered_top1", right, n, population),
    }


def per_class(labels: Tensor, right: Tensor, classes: list[str], taken: Tensor | None = None) -> list:
    """{class, n, top1, asr} of each class with images: the mean over them of `right` and of `taken` [N].

    Whether, or how often, an image is given its class, and with the trigger the target.
    """

    def total(values: Tensor | None) -> list[float]:
        weights = None if values is None else values.double()
        return torch.bincount(labels, weights, minlength=len(classes)).tolist()

    rows = [{"class": name, "n": int(n)} for name, n in zip(classes, total(None), strict=True)]
    for key, values in (("top1", right), ("asr", taken)):
        if values is not None:
            for row, hits in zip(rows, total(values), strict=True):
                row[key] = _share(hits, row["n"])
    return [row for row in rows if row["n"]]


def most_successful(attacks: Sequence[Mapping[str, Any]], key: str = "asr") -> dict[str, Any]:
    """The row of the attack with the highest `key`; with several, all of them too, under "attacks"."""
    best = max(attacks, key=lambda row: -1.0 if row[key] is None else row[key], default={})
    return {**best, "attacks": attacks} if len(attacks) > 1 else {**best}


def _share(hits: float, n: int) -> float | None:
    return hits / n if n else None


def _top(first: str, more: str, ranked: Tensor, population: float | None = None) -> dict[str, float | None]:
    """{first (with intervals), more3, more5, more10}: shares of the ranks [N] that are below 1, 3, 5, 10."""
    one, *wider = torch.stack([(ranked < k).sum() for k in (1, 3, 5, 10)]).tolist()
    shares = {f"{more}{k}": _share(hits, len(ranked)) for k, hits in zip((3, 5, 10), wider, strict=True)}
    return rate(first, one, len(ranked), population) | shares


# ---- embeddings ----


def unit(x: Tensor) -> Tensor:
    """float32, each row of length 1."""
    return F.normalize(x.float(), dim=-1)


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Cut [rows, width] into blocks of rows with up to CELLS numbers each."""
    step = max(1, CELLS // max(1, width))
    return (slice(start, start + step) for start in range(0, rows, step))


def mean_by_class(embeddings: Tensor, classes: int) -> Tensor:
    """[classes * T, D], the T prompts of a class in a row -> [classes, D]: normalise, average, normalise."""
    return unit(unit(embeddings).view(classes, -1, embeddings.shape[-1]).mean(1))


def modality_gap(images: Tensor, texts: Tensor) -> float:
    """Distance of the means of the normalised embeddings [N, D] (Liang et al. 2022, arXiv 2203.02053)."""
    return (unit(images).mean(0) - unit(texts).mean(0)).norm().item()


def alignment(images: Tensor, texts: Tensor) -> float:
    """Mean squared distance of normalised pairs [N, D] (Wang and Isola 2020, arXiv 2005.10242, 4.1, alpha 2)."""
    return (unit(images) - unit(texts)).square().sum(1).mean().item()


def uniformity(x: Tensor) -> float:
    """log of the mean of exp(-2 |x - y|^2) over distinct pairs of normalised rows of [N, D] (as above, t 2)."""
    x = unit(x)
    sums = []
    for here in blocks(len(x), len(x)):
        exponents = (x[here] @ x.T).mul_(4).sub_(4)  # |x - y|^2 = 2 - 2 cos
        exponents.diagonal(here.start).fill_(-math.inf)
        sums.append(exponents.flatten().logsumexp(0))
    return torch.stack(sums).logsumexp(0).item() - math.log(len(x) * (len(x) - 1))


def geometry(images: Tensor, texts: Tensor) -> dict[str, float]:
    """Of pairs [N, D]: modality gap, alignment, uniformity of the images; of up to SAMPLE of them, evenly spread."""
    some = slice(None, None, -(-len(images) // SAMPLE))
    images, texts = images[some], texts[some]
    row = {"modality_gap": modality_gap(images, texts), "alignment": alignment(images, texts)}
    return row | ({"uniformity": uniformity(images)} if len(images) > 1 else {})
