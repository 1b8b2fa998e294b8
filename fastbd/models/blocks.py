"""Blocks one after the other, whose activations can be computed again in the backward pass instead of being kept."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbd.models.batchnorm import unrecorded


class Blocks(nn.Sequential):
    """x -> block(x, *more) for each block; of a recomputed one only the input is kept (arXiv 1604.06174)."""

    recompute: bool = False

    def forward(self, x: Tensor, *more) -> Tensor:
        for block in self:
            if not self.recompute or not torch.is_grad_enabled():
                x = block(x, *more)
            elif torch.compiler.is_compiling():  # what a compiled function writes it writes once
                x = checkpoint(block, x, *more, use_reentrant=False)
            else:
                x = checkpoint(block, x, *more, use_reentrant=False, context_fn=_second_unrecorded)
        return x


def _second_unrecorded():
    return nullcontext(), unrecorded()


def recompute(model: nn.Module) -> None:
    """Keep only the inputs of a model's blocks from the forward pass to the backward pass."""
    for module in model.modules():
        if isinstance(module, Blocks):
            module.recompute = True
