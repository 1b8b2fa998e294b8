"""Contrastive loss with a fixed maximum and atomic sums: the idea of MemoryEfficientCLIP (b0nce), in our words.

No cosine exceeds 1, so exp(scale * (cosine - 1)) never overflows and no row maximum is looked for: every tile adds
its row and column sums, and later its share of the gradients, with atomics. Near scale 100 the sums underflow.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, DEPTH = 128, 64  # rows and columns of a tile; embedding numbers taken at once, a divisor of D
DTYPE = torch.bfloat16


@triton.jit
def _tile(a, b, scale, i, j, n, D: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """exp(scale * (cosine - 1)) of one tile; 0 outside of the matrix."""
    k = tl.arange(0, DEPTH)
    cosine = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, D, DEPTH):
        rows = tl.load(a + i[:, None] * D + (start + k)[None, :], mask=i[:, None] < n, other=0.0)
        columns = tl.load(b + j[:, None] * D + (start + k)[None, :], mask=j[:, None] < n, other=0.0)
        cosine = tl.dot(rows, tl.trans(columns), cosine)
    inside = (i[:, None] < n) & (j[None, :] < n)
    return tl.where(inside, tl.exp(tl.load(scale) * (cosine - 1.0)), 0.0)


@triton.jit
def _sums(a, b, scale, row_sums, column_sums, n, D: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    e = _tile(a, b, scale, i, j, n, D, TILE, DEPTH)
    tl.atomic_add(row_sums + i, tl.sum(e, 1), mask=i < n)
    tl.atomic_add(column_sums + j, tl.sum(e, 0), mask=j < n)


@triton.jit
def _gradients(
    a, b, scale, row_weights, column_weights, by_a, by_b, n, D: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr
):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    e = _tile(a, b, scale, i, j, n, D, TILE, DEPTH)
    weights = tl.load(row_weights + i, mask=i < n, other=0.0)[:, None]
    weights = weights + tl.load(column_weights + j, mask=j < n, other=0.0)[None, :]
    g = (e * weights).to(a.dtype.element_ty)
    for start in range(0, D, DEPTH):
        k = start + tl.arange(0, DEPTH)
        at_i, at_j = i[:, None] * D + k[None, :], j[:, None] * D + k[None, :]
        columns = tl.load(b + at_j, mask=j[:, None] < n, other=0.0)
        tl.atomic_add(by_a + at_i, tl.dot(g, columns), mask=i[:, None] < n)
        rows = tl.load(a + at_i, mask=i[:, None] < n, other=0.0)
        tl.atomic_add(by_b + at_j, tl.dot(tl.trans(g), rows), mask=j[:, None] < n)


def launch(kernel: Any, grid: tuple, *arguments: Any, **options: Any) -> None:
    """Start a Triton kernel, whose own hints know neither numbers for its constants nor options such as num_warps."""
    kernel[grid](*arguments, **options)


class FixedMaximum(torch.autograd.Function):
    """(normalised a, b [B, D], scale, both directions) -> sum of the mean cross-entropies."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, scale: Tensor, both: bool) -> Tensor:
        a, b = a.to(DTYPE).contiguous(), b.to(DTYPE).contiguous()
        n, depth = a.shape
        row_sums, column_sums = torch.zeros(2, n, device=a.device)
        tiles = triton.cdiv(n, TILE)
        launch(_sums, (tiles, tiles), a, b, scale, row_sums, column_sums, n, depth, TILE, DEPTH, num_warps=8)
        ctx.save_for_backward(a, b, scale, row_sums, column_sums)
        ctx.both = both
        matched = scale * (a.float() * b.float()).sum(-1)
        loss = (row_sums.log() + scale - matched).mean()
        return loss + (column_sums.log() + scale - matched).mean() if both else loss

    @staticmethod
    def backward(ctx, by_loss: Tensor):
        a, b, scale, row_sums, column_sums = ctx.saved_tensors
        n, depth = a.shape
        row_weights, column_weights = 1 / (n * row_sums), ctx.both / (n * column_sums)
        by_a, by_b = (torch.zeros(n, depth, device=a.device) for _ in range(2))
        tiles = triton.cdiv(n, TILE)
        inputs, outputs = (a, b, scale, row_weights, column_weights), (by_a, by_b)
        launch(_gradients, (tiles, tiles), *inputs, *outputs, n, depth, TILE, DEPTH, num_warps=8)
        by_a = by_loss * scale * (by_a - (1 + ctx.both) / n * b)
        by_b = by_loss * scale * (by_b - (1 + ctx.both) / n * a)
        return by_a, by_b, (by_a * a).sum() / scale, None


pair_loss = FixedMaximum.apply
