"""AdamW with CLIP's two groups, the cosine schedule, the temperature's bounds."""

from __future__ import annotations

import math

import torch
from torch import nn

MAX_LOG_SCALE = math.log(100)


def make_optimizer(model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float):
    """AdamW; biases, norm gains and the temperature (every parameter below 2 dimensions) are not decayed."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    exempt = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Linear warm-up over `warmup` steps, then half a cosine to 0 at `total`; steps count from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@torch.no_grad()
def clamp_log_scale(log_scale: torch.Tensor) -> None:
    """Keep the temperature's factor within 1 and 100, as CLIP does."""
    log_scale.clamp_(0, MAX_LOG_SCALE)
