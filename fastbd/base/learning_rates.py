"""Learning rates of all steps of a training."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def learning_rates(peak: float, *, warmup: int, total: int) -> Tensor:
    """float32 [total]: linear warm-up over `warmup` steps, then half a cosine to 0 at `total`."""
    step = torch.arange(total, dtype=torch.float64)
    cosine = 0.5 * (1 + torch.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    return (peak * torch.where(step < warmup, (step + 1) / max(1, warmup), cosine)).float()
