"""Contrastive loss by rows with a running maximum: the idea of Inf-CL (DAMO-NLP-SG), in our words.

One program owns 64 rows and passes over all columns, in float32 with TF32 products; each direction is a call of its
own, and the gradients of rows and of columns are two more passes that compute the logits again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.fixed_maximum import launch

TILE, DEPTH = 64, 64  # rows of a program and columns of a step; embedding numbers taken at once, a divisor of D


@triton.jit
def _logits(a, b, scale, i, j, n, D: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """scale * cosine of rows i with columns j; -inf outside of the matrix."""
    k = tl.arange(0, DEPTH)
    cosine = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, D, DEPTH):
        rows = tl.load(a + i[:, None] * D + (start + k)[None, :], mask=i[:, None] < n, other=0.0)
        columns = tl.load(b + j[:, None] * D + (start + k)[None, :], mask=j[:, None] < n, other=0.0)
        cosine = tl.dot(rows, tl.trans(columns), cosine, input_precision="tf32")
    return tl.where(j[None, :] < n, tl.load(scale) * cosine, float("-inf"))


@triton.jit
def _row_sums(a, b, scale, log_sums, n, D: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    largest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, n, TILE):
        logits = _logits(a, b, scale, i, start + tl.arange(0, TILE), n, D, TILE, DEPTH)
        larger = tl.maximum(largest, tl.max(logits, 1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger[:, None]), 1)
        largest = larger
    tl.store(log_sums + i, largest + tl.log(total), mask=i < n)


@triton.jit
def _row_gradients(
    a, b, scale, log_sums, by_a, n, OWN: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr
):
    """by_a[i] = sum over j of p[i, j] b[j]; log_sums are those of the rows of a (OWN) or of b."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    for start in range(0, n, TILE):
        j = start + tl.arange(0, TILE)
        logits = _logits(a, b, scale, i, j, n, D, TILE, DEPTH)
        if OWN:
            logits = logits - tl.load(log_sums + i, mask=i < n, other=0.0)[:, None]
        else:
            logits = logits - tl.load(log_sums + j, mask=j < n, other=0.0)[None, :]
        p = tl.exp(logits)
        for depth in range(0, D, DEPTH):
            k = depth + tl.arange(0, DEPTH)
            columns = tl.load(b + j[:, None] * D + k[None, :], mask=j[:, None] < n, other=0.0)
            at = by_a + i[:, None] * D + k[None, :]
            before = tl.load(at, mask=i[:, None] < n, other=0.0)
            tl.store(at, before + tl.dot(p, columns, input_precision="tf32"), mask=i[:, None] < n)


class OnlineRows(torch.autograd.Function):
    """(normalised a, b [B, D], scale) -> mean cross-entropy of the rows."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        n, depth = a.shape
        log_sums = torch.empty(n, device=a.device)
        launch(_row_sums, (triton.cdiv(n, TILE),), a, b, scale, log_sums, n, depth, TILE, DEPTH)
        ctx.save_for_backward(a, b, scale, log_sums)
        return (log_sums - scale * (a * b).sum(-1)).mean()

    @staticmethod
    def backward(ctx, by_loss: Tensor):
        a, b, scale, log_sums = ctx.saved_tensors
        n, depth = a.shape
        programs = (triton.cdiv(n, TILE),)
        by_a, by_b = torch.zeros_like(a), torch.zeros_like(b)
        launch(_row_gradients, programs, a, b, scale, log_sums, by_a, n, True, depth, TILE, DEPTH)
        launch(_row_gradients, programs, b, a, scale, log_sums, by_b, n, False, depth, TILE, DEPTH)
        by_a = by_loss * scale / n * (by_a - b)
        by_b = by_loss * scale / n * (by_b - a)
        return by_a, by_b, (by_a * a).sum() / scale


def pair_loss(a: Tensor, b: Tensor, scale: Tensor, both: bool) -> Tensor:
    """Sum of the mean cross-entropies of the rows and, with `both`, of the columns."""
    loss = OnlineRows.apply(a, b, scale)
    return loss + OnlineRows.apply(b, a, scale) if both else loss
