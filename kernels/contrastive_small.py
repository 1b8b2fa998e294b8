"""The contrastive losses for up to 512 columns in two launches: all losses, then all gradients. No atomics, no barrier.

A program of the first launch owns 16 rows of one direction and sees every column, so softmax and gradient of the
logits are local; one of the second owns 16 rows of one tower's gradient.
"""

# Triton's hints fit the inside of a kernel, not its launch.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbd.kernels.constants import table
from fastbd.kernels.contrastive_tile import INTERPRETED, LN2, LOG2E, four, input_precision, pick

STRIP = 16  # rows of a program


@triton.jit
def losses_kernel(
    X0,
    X1,
    X2,
    X3,
    DIRECTIONS,
    WEIGHTS,
    P,
    RN,
    ROW_DOTS,
    COLUMN_DOTS,
    LOSSES,
    LOG_SCALE,
    N,
    D,
    strips,
    BM: tl.constexpr,
    NP: tl.constexpr,
    BK: tl.constexpr,
    IP: tl.constexpr,
):
    """Direction d = DIRECTIONS[d] = (query, key, write the query's norms, write the key's).

    P[d, N, NP]: weighted gradient of the logits (p - onehot); ROW_DOTS[d, N], COLUMN_DOTS[d, strip, N]: its sums
    times the cosine; LOSSES[d, N]; RN[t, N] = 1 / |x|.
    """
    strip = tl.program_id(0)
    d = tl.program_id(1)
    qt = tl.load(DIRECTIONS + 4 * d)
    kt = tl.load(DIRECTIONS + 4 * d + 1)
    q = pick(qt, X0, X1, X2, X3)
    k = pick(kt, X0, X1, X2, X3)
    i = strip * BM + tl.arange(0, BM)
    j = tl.arange(0, NP)
    kk = tl.arange(0, BK)
    products = tl.zeros((BM, NP), tl.float32)
    q_squares = tl.zeros((BM,), tl.float32)
    k_squares = tl.zeros((NP,), tl.float32)
    for d0 in range(0, D, BK):
        c = d0 + kk
        a = tl.load(q + i[:, None] * D + c[None, :], mask=(i[:, None] < N) & (c[None, :] < D), other=0.0)
        b = tl.load(k + j[:, None] * D + c[None, :], mask=(j[:, None] < N) & (c[None, :] < D), other=0.0)
        products = tl.dot(a, tl.trans(b), products, input_precision=IP)
        af = a.to(tl.float32)
        bf = b.to(tl.float32)
        q_squares += tl.sum(af * af, 1)
        k_squares += tl.sum(bf * bf, 1)
    rq = tl.where(q_squares > 1e-24, 1.0 / tl.sqrt(tl.maximum(q_squares, 1e-24)), 0.0)
    rk = tl.where(k_squares > 1e-24, 1.0 / tl.sqrt(tl.maximum(k_squares, 1e-24)), 0.0)
    cosine = products * rq[:, None] * rk[None, :]
    s2 = tl.exp(tl.load(LOG_SCALE).to(tl.float32)) * LOG2E
    l2 = cosine * s2
    own = i[:, None] == j[None, :]
    negative = (j[None, :] < N) & (i[:, None] != j[None, :])
    positive = tl.sum(tl.where(own, l2, 0.0), 1)
    top = tl.max(tl.where(negative, l2, -1e30), 1)
    total = tl.sum(tl.where(negative, tl.exp2(l2 - top[:, None]), 0.0), 1)
    # d2 = log2(sum of negatives / positive); loss = softplus, 1 - p = sigmoid of it, without overflow either way
    d2 = tl.where(total > 0.0, tl.log2(tl.maximum(total, 1e-37)) + top, -1e30) - positive
    u = tl.exp2(-tl.abs(d2))
    log1p = tl.where(u < 1e-4, u * (1.0 - 0.5 * u) * LOG2E, tl.log2(1.0 + u))
    loss = (tl.maximum(d2, 0.0) + log1p) * LN2
    w = tl.load(WEIGHTS + d) / N
    denominator = tl.maximum(d2, 0.0) + positive + log1p
    missed = w * tl.where(d2 > 0.0, 1.0, u) / (1.0 + u)
    p = tl.where(own, -missed[:, None], w * tl.exp2(tl.minimum(l2 - denominator[:, None], 0.0)))
    p = tl.where((i[:, None] < N) & (j[None, :] < N), p, 0.0)
    tl.store(P + (d * N + i[:, None]) * NP + j[None, :], p, mask=(i[:, None] < N) & (j[None, :] < NP))
    dots = p * cosine
    tl.store(ROW_DOTS + d * N + i, tl.sum(dots, 1), mask=i < N)
    tl.store(COLUMN_DOTS + (d * strips + strip) * N + j, tl.sum(dots, 0), mask=j < N)
    tl.store(LOSSES + d * N + i, loss, mask=i < N)
    if tl.load(DIRECTIONS + 4 * d + 2) != 0:
        tl.store(RN + qt * N + i, rq, mask=i < N)
    if (tl.load(DIRECTIONS + 4 * d + 3) != 0) & (strip == 0):
        tl.store(RN + kt * N + j, rk, mask=j < N)


@triton.jit
def _add_product(acc, P, by_row, by_column, RN, x, i, c, N, D, NP, BJ: tl.constexpr, IP: tl.constexpr):
    """acc + (P[by_row, i, :] + P[by_column, :, i]^T) diag(RN) x; a direction of -1 is none."""
    for j0 in range(0, N, BJ):
        j = j0 + tl.arange(0, BJ)
        m = (i[:, None] < N) & (j[None, :] < N)
        p = tl.zeros((i.shape[0], BJ), tl.float32)
        if by_row >= 0:
            p += tl.load(P + (by_row * N + i[:, None]) * NP + j[None, :], mask=m, other=0.0)
        if by_column >= 0:
            p += tl.load(P + (by_column * N + j[None, :]) * NP + i[:, None], mask=m, other=0.0)
        p = p * tl.load(RN + j, mask=j < N, other=0.0)[None, :]
        y = tl.load(x + j[:, None] * D + c[None, :], mask=(j[:, None] < N) & (c[None, :] < D), other=0.0)
        acc = tl.dot(p.to(y.dtype), y, acc, input_precision=IP)
    return acc


@triton.jit
def _add_dots(dots, by_row, by_column, ROW_DOTS, COLUMN_DOTS, i, N, strips):
    """dots + those of the rows of one direction and the columns of another."""
    if by_row >= 0:
        dots += tl.load(ROW_DOTS + by_row * N + i, mask=i < N, other=0.0)
    if by_column >= 0:
        for strip in range(0, strips):
            dots += tl.load(COLUMN_DOTS + (by_column * strips + strip) * N + i, mask=i < N, other=0.0)
    return dots


@triton.jit
def gradients_kernel(
    X0,
    X1,
    X2,
    X3,
    G0,
    G1,
    G2,
    G3,
    TERMS,
    WEIGHTS,
    P,
    RN,
    ROW_DOTS,
    COLUMN_DOTS,
    LOSSES,
    LOG_SCALE,
    LOSS,
    PARTS,
    SCALE_GRADIENT,
    N,
    D,
    start,
    stop,
    strips,
    NP,
    n_terms,
    BM: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    NB: tl.constexpr,
    IP: tl.constexpr,
):
    """Gradients of rows [start, stop) of tower program_id(1); TERMS[t] = query, key, direction of rows, of columns.

    The first program also adds up LOSS, PARTS[t, 2] and SCALE_GRADIENT, always in the same order.
    """
    t = tl.program_id(1)
    i = start + tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(2) * BD + tl.arange(0, BD)
    s = tl.exp(tl.load(LOG_SCALE).to(tl.float32))
    acc = tl.zeros((BM, BD), tl.float32)
    dots = tl.zeros((BM,), tl.float32)
    for term in range(0, n_terms):
        q = tl.load(TERMS + 4 * term)
        k = tl.load(TERMS + 4 * term + 1)
        rows = tl.load(TERMS + 4 * term + 2)
        columns = tl.load(TERMS + 4 * term + 3)
        if q == t:
            acc = _add_product(acc, P, rows, columns, RN + k * N, pick(k, X0, X1, X2, X3), i, c, N, D, NP, BJ, IP)
            dots = _add_dots(dots, rows, columns, ROW_DOTS, COLUMN_DOTS, i, N, strips)
        if k == t:
            acc = _add_product(acc, P, columns, rows, RN + q * N, pick(q, X0, X1, X2, X3), i, c, N, D, NP, BJ, IP)
            dots = _add_dots(dots, columns, rows, ROW_DOTS, COLUMN_DOTS, i, N, strips)
    own = (i[:, None] < stop) & (c[None, :] < D)
    x = tl.load(pick(t, X0, X1, X2, X3) + i[:, None] * D + c[None, :], mask=own, other=0.0).to(tl.float32)
    rn = tl.load(RN + t * N + i, mask=i < N, other=0.0)
    gradient = s * rn[:, None] * (acc - (dots * rn)[:, None] * x)
    g = pick(t, G0, G1, G2, G3)
    tl.store(g + (i - start)[:, None] * D + c[None, :], gradient.to(g.dtype.element_ty), mask=own)
    if (tl.program_id(0) == 0) & (t == 0) & (tl.program_id(2) == 0):
        b = tl.arange(0, NB)
        loss = 0.0
        scale_gradient = 0.0
        for term in range(0, n_terms):
            for side in range(0, 2):
                d = tl.load(TERMS + 4 * term + 2 + side)
                part = 0.0
                if d >= 0:
                    part = tl.sum(tl.load(LOSSES + d * N + b, mask=b < N, other=0.0)) / N
                    loss += part * tl.load(WEIGHTS + d)
                    scale_gradient += s * tl.sum(tl.load(ROW_DOTS + d * N + b, mask=b < N, other=0.0))
                tl.store(PARTS + 2 * term + side, part)
        tl.store(LOSS, loss)
        tl.store(SCALE_GRADIENT, scale_gradient)


def losses_and_gradients(
    towers: list[Tensor], log_scale: Tensor, weights: Tensor, terms: list[int], start: int, stop: int
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Towers [N, D], weights [n, 2], terms flat (query, key, both directions) -> loss, parts [n, 2], gradients.

    The gradients are those of rows [start, stop) of each tower, and that of log_scale.
    """
    towers, (count, dim), device = [x.contiguous() for x in towers], towers[0].shape, towers[0].device
    directions, term_table, places = plan(tuple(terms))
    n, padded = len(directions), max(16, triton.next_power_of_2(count))
    strips = triton.cdiv(count, STRIP)
    new = log_scale.float().new_empty
    p, rn, losses = new(n, count, padded), new(len(towers), count), new(n, count)
    row_dots, column_dots = new(n, count), new(n, strips, count)
    w, ip = weights.take(table(places, torch.int64, device)), input_precision()
    low = towers[0].dtype == torch.bfloat16
    losses_kernel[(strips, n)](
        *four(towers),
        table(directions, torch.int32, device),
        w,
        p,
        rn,
        row_dots,
        column_dots,
        losses,
        log_scale,
        count,
        dim,
        strips,
        BM=STRIP,
        NP=padded,
        BK=64 if low else 32,
        IP=ip,
        num_warps=8 if padded > 128 else 4,
        num_stages=2 if padded > 256 else 3,
    )
    gradients = [torch.empty(stop - start, dim, dtype=x.dtype, device=device) for x in towers]
    loss, parts, of_scale = new(()), new(len(term_table), 2), new(())
    wide = 32 if INTERPRETED else 128
    gradients_kernel[(triton.cdiv(stop - start, STRIP), len(towers), triton.cdiv(dim, wide))](
        *four(towers),
        *four(gradients),
        table(term_table, torch.int32, device),
        w,
        p,
        rn,
        row_dots,
        column_dots,
        losses,
        log_scale,
        loss,
        parts,
        of_scale,
        count,
        dim,
        start,
        stop,
        strips,
        padded,
        len(term_table),
        BM=STRIP,
        BJ=32 if INTERPRETED or not low else 64,
        BD=wide,
        NB=padded,
        IP=ip,
        num_warps=8,
        num_stages=3,
    )
    return loss, parts, gradients, of_scale


def plan(terms: tuple[int, ...]) -> tuple[tuple, tuple, tuple]:
    """-> the kernels' DIRECTIONS and TERMS, and the place of each direction's weight among those of all terms."""
    directions, entries, places, normed = [], [], [], set()

    def add(query: int, key: int, place: int) -> int:
        writes = []
        for tower in (query, key):
            writes.append(int(tower not in normed))
            normed.add(tower)
        directions.append((query, key, *writes))
        places.append(place)
        return len(directions) - 1

    for t in range(len(terms) // 3):
        query, key, both = terms[3 * t : 3 * t + 3]
        rows = add(query, key, 2 * t)
        entries.append((query, key, rows, add(key, query, 2 * t + 1) if both else -1))
    return tuple(directions), tuple(entries), tuple(places)
