"""Embeddings of training pairs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastbd.base.console import progress
from fastbd.data.pairs import Pairs
from fastbd.evals.towers import Towers
from fastbd.kernels.augment import Ragged, render
from fastbd.kernels.views import plain

CHUNK = 2048  # pairs decoded at once


def embed(
    towers: Towers, pairs: Pairs, rows: np.ndarray, *, images: bool = True, texts: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Embeddings of the base views and of the captions of some rows, float32 [N, D] each, raw, on the device."""
    parts = [rows[first : first + CHUNK] for first in range(0, len(rows), CHUNK)]
    of_images, of_texts = [], []
    with progress("embedding", len(rows) * (images + texts)) as advance:
        if images:
            for sources in pairs.sources(parts, host=towers.device.type != "cuda"):
                of_images.append(towers.images(_squares(pairs, sources)))
                advance(len(of_images[-1]))
        for ids in parts if texts else ():
            of_texts.append(towers.captions(pairs.tokens(ids)))
            advance(len(ids))
    return torch.cat(of_images) if images else None, torch.cat(of_texts) if texts else None


def _squares(pairs: Pairs, sources) -> Tensor:
    """Their base views, uint8 [B, S, S, 3], where they are."""
    if isinstance(sources, Ragged):
        return render(sources, plain(sources.sizes, pairs.size), pairs.size, torch.uint8)
    return pairs.squares(sources)
