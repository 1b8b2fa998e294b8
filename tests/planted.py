"""A training whose embeddings are given, for methods that look at those of all pairs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F


def training(images: torch.Tensor, texts: torch.Tensor, rows: np.ndarray | None = None, flagged=()) -> SimpleNamespace:
    """Of the `rows` of a file, to which images and texts [N, D] belong [all]."""
    rows = np.arange(len(images)) if rows is None else rows

    def of(embeddings: torch.Tensor):
        return lambda wanted: embeddings[np.searchsorted(rows, wanted)]

    return SimpleNamespace(
        rows=rows,
        flagged=np.array(flagged, np.int64),
        seed=0,
        device=torch.device("cpu"),
        model=SimpleNamespace(embed_dim=images.shape[1]),
        embed_images=of(images),
        embed_texts=of(texts),
    )


def pairs_of(cosine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw embeddings [N, 2] of images and texts with these cosines, of any length."""
    angle, lengths = cosine.acos(), torch.arange(1.0, len(cosine) + 1)[:, None]
    images = torch.tensor([1.0, 0.0]).expand(len(cosine), 2)
    return images * lengths, torch.stack([angle.cos(), angle.sin()], 1) / lengths


def cross_entropy(a: torch.Tensor, b: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Of rows a with the columns b, each belonging to the one of its place."""
    logits = log_scale.exp() * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    return F.cross_entropy(logits, torch.arange(len(logits)))


def both_ways(a: torch.Tensor, b: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """MMCL."""
    return (cross_entropy(a, b, log_scale) + cross_entropy(b, a, log_scale)) / 2
