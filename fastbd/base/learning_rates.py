"""Learning rates of all steps of a training."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def learning_rates(peak: float, *, warmup: int, total: int, ahead: int = 0) -> Tensor:
    """float32 [total]: linear warm-up over `warmup` steps, then half a cosine to 0 at `total`.

    Those of the steps from `ahead` on: past `total` the cosine rises again.
    """
    step = ahead + torch.arange(total, dtype=torch.float64)
    cosine = 0.5 * (1 + torch.cos(math.pi * (step - warmup) / (total - warmup or 1)))
    return (peak * torch.where(step < warmup, (step + 1) / max(1, warmup), cosine)).float()
