"""Attention within packed captions in Triton: same functions as the reference in text_pack, by one launch each.

A program owns a head of a caption, and the gradients of its queries, keys and values: no atomics, the same bits each
time. Where captions begin is read on the device, so that a captured graph serves any lengths. Exponents are of 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbd.kernels.contrastive_tile import LOG2E, input_precision

TILE = 16  # tokens: the fewest that tl.dot takes


@triton.jit
def _rows(X, i, length, stride, D: tl.constexpr, DP: tl.constexpr):
    """Rows i of a caption's matrix whose first element is at X; zeros behind its end and its D columns."""
    c = tl.arange(0, DP)
    return tl.load(X + i[:, None] * stride + c[None, :], mask=(i < length)[:, None] & (c < D)[None, :], other=0.0)


@triton.jit
def _store_rows(X, i, length, stride, x, D: tl.constexpr, DP: tl.constexpr):
    c = tl.arange(0, DP)
    mask = (i < length)[:, None] & (c < D)[None, :]
    tl.store(X + i[:, None] * stride + c[None, :], x.to(X.dtype.element_ty), mask=mask)


@triton.jit
def _clear_room(X, STARTS, captions, T, stride: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in the rows behind the last caption, in equal shares for all programs."""
    end = tl.load(STARTS + captions).to(tl.int64)
    for at in range(tl.program_id(0) * BLOCK, (T - end) * stride, tl.num_programs(0) * BLOCK):
        o = at + tl.arange(0, BLOCK)
        tl.store(X + end * stride + o, tl.zeros((BLOCK,), X.dtype.element_ty), mask=o < (T - end) * stride)


@triton.jit(do_not_specialize=["captions", "T"])
def attention_kernel(
    QKV,
    STARTS,
    OUT,
    LSE,
    captions,
    T,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    B: tl.constexpr,
    IP: tl.constexpr,
):
    """OUT[T, HEADS D] and LSE[T, HEADS], log2 of the sum of the scores' powers."""
    b = tl.program_id(0) // HEADS
    h = tl.program_id(0) % HEADS
    W: tl.constexpr = HEADS * D
    first = tl.load(STARTS + b).to(tl.int64)
    length = tl.load(STARTS + b + 1) - first.to(tl.int32)
    _clear_room(OUT, STARTS, captions, T, W, 256)
    _clear_room(LSE, STARTS, captions, T, HEADS, 256)
    x = QKV + first * 3 * W + h * D
    lse = LSE + first * HEADS + h
    for i0 in range(0, length, B):
        i = i0 + tl.arange(0, B)
        q = _rows(x, i, length, 3 * W, D, DP)
        top = tl.full((B,), -float("inf"), tl.float32)
        total = tl.zeros((B,), tl.float32)
        acc = tl.zeros((B, DP), tl.float32)
        for j0 in range(0, i0 + B, B):
            j = j0 + tl.arange(0, B)
            k = _rows(x + W, j, length, 3 * W, D, DP)
            v = _rows(x + 2 * W, j, length, 3 * W, D, DP)
            s = tl.dot(q, tl.trans(k), input_precision=IP) * (LOG2E * D**-0.5)
            s = tl.where(j[None, :] <= i[:, None], s, -float("inf"))  # keys behind the end are ahead of every query
            higher = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=IP)
            top = higher
        _store_rows(OUT + first * W + h * D, i, length, W, acc / total[:, None], D, DP)
        tl.store(lse + i * HEADS, top + tl.log2(total), mask=i < length)


@triton.jit
def _pair(q, g, k, v, lse, delta, i, j, D: tl.constexpr, IP: tl.constexpr):
    """Probabilities of queries i for keys j, and the gradients of their scores before the scale."""
    s = tl.dot(q, tl.trans(k), input_precision=IP) * (LOG2E * D**-0.5)
    p = tl.where(j[None, :] <= i[:, None], tl.exp2(s - lse[:, None]), 0.0)
    return p.to(q.dtype), (p * (tl.dot(g, tl.trans(v), input_precision=IP) - delta[:, None])).to(q.dtype)


@triton.jit
def _queries(x, gradient, out, lse, i, length, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Queries, the gradients of their outputs, their log-sum-exp, and the mean of their probabilities' gradients."""
    W: tl.constexpr = HEADS * D
    g = _rows(gradient, i, length, W, D, DP)
    delta = tl.sum(g.to(tl.float32) * _rows(out, i, length, W, D, DP).to(tl.float32), 1)
    return _rows(x, i, length, 3 * W, D, DP), g, tl.load(lse + i * HEADS, mask=i < length, other=0.0), delta


@triton.jit(do_not_specialize=["captions", "T"])
def attention_backward_kernel(
    GRADIENT,
    QKV,
    OUT,
    LSE,
    STARTS,
    OF_QKV,
    captions,
    T,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    B: tl.constexpr,
    IP: tl.constexpr,
):
    """OF_QKV[T, 3 HEADS D]: of each tile first what it asked of those up to it, then what those from it on asked of it.

    Probabilities are computed for both: keeping them takes more registers than there are.
    """
    b = tl.program_id(0) // HEADS
    h = tl.program_id(0) % HEADS
    W: tl.constexpr = HEADS * D
    first = tl.load(STARTS + b).to(tl.int64)
    length = tl.load(STARTS + b + 1) - first.to(tl.int32)
    _clear_room(OF_QKV, STARTS, captions, T, 3 * W, 256)
    x = QKV + first * 3 * W + h * D
    gradient = GRADIENT + first * W + h * D
    out = OUT + first * W + h * D
    lse = LSE + first * HEADS + h
    to = OF_QKV + first * 3 * W + h * D
    for t0 in range(0, length, B):
        t = t0 + tl.arange(0, B)
        q, g, own_lse, delta = _queries(x, gradient, out, lse, t, length, HEADS, D, DP)
        of_q = tl.zeros((B, DP), tl.float32)
        for j0 in range(0, t0 + B, B):
            j = j0 + tl.arange(0, B)
            k = _rows(x + W, j, length, 3 * W, D, DP)
            v = _rows(x + 2 * W, j, length, 3 * W, D, DP)
            _, of_s = _pair(q, g, k, v, own_lse, delta, t, j, D, IP)
            of_q = tl.dot(of_s, k, of_q, input_precision=IP)
        _store_rows(to, t, length, 3 * W, of_q * D**-0.5, D, DP)
        k = _rows(x + W, t, length, 3 * W, D, DP)
        v = _rows(x + 2 * W, t, length, 3 * W, D, DP)
        of_k = tl.zeros((B, DP), tl.float32)
        of_v = tl.zeros((B, DP), tl.float32)
        for i0 in range(t0, length, B):
            i = i0 + tl.arange(0, B)
            q, g, own_lse, delta = _queries(x, gradient, out, lse, i, length, HEADS, D, DP)
            p, of_s = _pair(q, g, k, v, own_lse, delta, i, t, D, IP)
            of_k = tl.dot(tl.trans(of_s), q, of_k, input_precision=IP)
            of_v = tl.dot(tl.trans(p), g, of_v, input_precision=IP)
        _store_rows(to + W, t, length, 3 * W, of_k * D**-0.5, D, DP)
        _store_rows(to + 2 * W, t, length, 3 * W, of_v, D, DP)


def attention(qkv: Tensor, starts: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """-> output [T, width] and log-sum-exp in log2 units, fp32 [T, heads]; zeros for tokens of no caption."""
    out, lse = qkv.new_empty(len(qkv), qkv.shape[1] // 3), qkv.new_empty(len(qkv), heads, dtype=torch.float32)
    captions = len(starts) - 1
    with torch.cuda.device_of(qkv):  # Triton starts a kernel on the thread's device, wherever the tensors are
        attention_kernel[(captions * heads,)](
            qkv.contiguous(), starts, out, lse, captions, len(qkv), **arguments(out, heads)
        )
    return out, lse


def attention_backward(gradient: Tensor, qkv: Tensor, starts: Tensor, out: Tensor, lse: Tensor, heads: int) -> Tensor:
    """Of `attention`, with its results: the gradient of qkv."""
    of_qkv, captions = qkv.new_empty(qkv.shape), len(starts) - 1
    with torch.cuda.device_of(qkv):
        attention_backward_kernel[(captions * heads,)](
            gradient.contiguous(),
            qkv.contiguous(),
            out,
            lse,
            starts,
            of_qkv,
            captions,
            len(qkv),
            **arguments(out, heads),
        )
    return of_qkv


def arguments(out: Tensor, heads: int) -> dict:
    """The compile-time arguments that both kernels share."""
    dim = out.shape[1] // heads
    padded = max(16, triton.next_power_of_2(dim))
    warps = max(1, padded * out.element_size() // 128)  # more would wait for each other; fewer spill registers
    return dict(HEADS=heads, D=dim, DP=padded, B=TILE, IP=input_precision(), num_warps=warps, num_stages=1)
