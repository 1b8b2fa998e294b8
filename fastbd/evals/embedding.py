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


def embed_images(towers: Towers, pairs: Pairs, rows: np.ndarray) -> Tensor:
    """Return raw embeddings of the base views of some rows, float32 [N, D], on the device."""
    embedded, parts = [], _parts(rows)
    with progress("embedding images", len(rows)) as advance:
        for sources in pairs.sources(parts, host=towers.device.type != "cuda"):
            embedded.append(towers.images(_squares(pairs, sources)))
            advance(len(embedded[-1]))
    return torch.cat(embedded)


def embed_texts(towers: Towers, pairs: Pairs, rows: np.ndarray) -> Tensor:
    """Return raw embeddings of the captions of some rows, float32 [N, D], on the device."""
    embedded = []
    with progress("embedding captions", len(rows)) as advance:
        for ids in _parts(rows):
            embedded.append(towers.captions(pairs.tokens(ids)))
            advance(len(ids))
    return torch.cat(embedded)


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[first : first + CHUNK] for first in range(0, len(rows), CHUNK)]


def _squares(pairs: Pairs, sources) -> Tensor:
    """Their base views, uint8 [B, S, S, 3], where they are."""
    if isinstance(sources, Ragged):
        return render(sources, plain(sources.sizes, pairs.size), pairs.size, torch.uint8)
    return pairs.squares(sources)
