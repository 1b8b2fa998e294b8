"""Blocks one after the other, whose activations can be computed again in the backward pass instead of being kept.

And average pools that compiled code can merge with what is around them.
"""

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


class AvgPool(nn.AvgPool2d):
    """Mean of each window of `stride` x `stride` pixels, as in nn.AvgPool2d: [B, C, H, W] -> [B, C, H / s, W / s].

    With `fused`, compiled training writes it as a mean over dimensions, which Inductor can merge with the layers before
    it. A higher realize_reads_threshold would merge more, but the sums of a residual network's gradients too: each
    kernel would read those of several blocks, and more memory would move (bench codegen counts it).
    """

    fused: bool = False
    kernel_size: int

    def forward(self, x: Tensor) -> Tensor:
        if self.fused and self.training and torch.compiler.is_compiling():
            side = self.kernel_size
            return x.unflatten(3, (-1, side)).unflatten(2, (-1, side)).mean((3, 5))
        return super().forward(x)


def fuse_pools(model: nn.Module) -> None:
    """Let compiled training merge a model's average pools with the layers around them; eager code stays as it is."""
    for module in model.modules():
        if isinstance(module, AvgPool):
            module.fused = True


def _second_unrecorded():
    return nullcontext(), unrecorded()


def recompute(model: nn.Module) -> None:
    """Keep only the inputs of a model's blocks from the forward pass to the backward pass."""
    for module in model.modules():
        if isinstance(module, Blocks):
            module.recompute = True
