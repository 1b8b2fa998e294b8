"""Small tables that kernels read."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@cache
def table(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values`, nested tuples, on the device: made once, because a copy from the host cannot be captured in a graph."""
    return torch.tensor(values, dtype=dtype, device=device)


@cache
def normalisation(device: torch.device, width: int = 1) -> Tensor:
    """float32 [2, 3 width]: scale and shift by which a level of 0..255 becomes CLIP's normalised value.

    For a whole row of pixels, as broadcasting over a last axis of 3 is three times slower.
    """
    mean, std = torch.tensor([CLIP_MEAN, CLIP_STD])
    return torch.stack([1 / (255 * std), -mean / std]).repeat(1, width).to(device)


@cache
def noise_levels(device: torch.device) -> Tensor:
    """float32 [65536]: 255 times the standard normal's quantiles, negative ones 0; the same bits on every device."""
    probability = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    return (255 * torch.special.ndtri(probability)).clamp(min=0).float().to(device)
