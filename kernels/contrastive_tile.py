"""The contrastive losses in Triton, tile of logits by tile: same functions as contrastive_reference.

Forward: a tile is computed, its row and column sums are stored (one writer each, no atomics) and merged in a fixed
order. Backward: the tiles of a block of rows are computed again, their gradient goes to a bounded workspace, and
cuBLAS multiplies it. Operands stay raw: 1 / |x| is folded in after the product, which is up to 5 times more accurate
in bf16 than rounding unit vectors. Logits are in log2 units inside the kernels.
"""

# Triton's hints fit the inside of a kernel, not its launch, and let nobody loop over a range.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbd.kernels.constants import table
from fastbd.kernels.contrastive_reference import Term

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TOP = tl.constexpr(104.0)  # largest exponent of 2 in a tile's sums: 2^23 of them still fit fp32
SMALLEST_UNIFORM = tl.constexpr(115.0)  # up to this scale, in log2, one shift for all tiles loses nothing (s <= 79)
WORKSPACE = 128 << 20  # bytes of logit gradients at a time


@triton.jit
def pick(t, X0, X1, X2, X3):
    """The t-th of four pointers."""
    x = X0
    if t == 1:
        x = X1
    if t == 2:
        x = X2
    if t == 3:
        x = X3
    return x


@triton.jit
def inverse_norms_kernel(X0, X1, X2, X3, RN, M, D, BR: tl.constexpr, DP: tl.constexpr):
    """RN[t, M] = 1 / |x|, 0 for a zero vector."""
    t = tl.program_id(1)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, DP)
    x = pick(t, X0, X1, X2, X3)
    m = (r[:, None] < M) & (c[None, :] < D)
    v = tl.load(x + r[:, None].to(tl.int64) * D + c[None, :], mask=m, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(v * v, 1))
    tl.store(RN + t * M + r, tl.where(norm > 1e-12, 1.0 / tl.maximum(norm, 1e-12), 0.0), mask=r < M)


@triton.jit
def _place(rest, blocks_m, blocks_n, GROUP: tl.constexpr):
    """Tile of a program: down GROUP rows of tiles before going right, so that their operands stay in cache."""
    in_group = GROUP * blocks_n
    first = (rest // in_group) * GROUP
    size = tl.minimum(blocks_m - first, GROUP)
    return first + (rest % in_group) % size, (rest % in_group) // size


@triton.jit
def _logits(
    q,
    k,
    rq,
    rk,
    i0,
    j0,
    M,
    N,
    s2,
    S,
    l0,
    rows,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    IP: tl.constexpr,
    STORED: tl.constexpr,
):
    """s2 rq_i rk_j <q_i, k_j> of a tile. Rows past the end are clamped, for the caller to mask.

    Offsets are 32 bits beside a base that moves along D: registers are scarce. STORED: the products are rows of S
    [rows, N].
    """
    if STORED:
        o = tl.minimum(tl.arange(0, BM), rows - 1 - l0)[:, None] * N + tl.minimum(tl.arange(0, BN), N - 1 - j0)[None, :]
        return tl.load(S + l0.to(tl.int64) * N + j0 + o) * (rq * s2)[:, None] * rk[None, :]
    kk = tl.arange(0, BK)
    qo = tl.minimum(tl.arange(0, BM), M - 1 - i0)[:, None] * D + kk[None, :]
    ko = tl.minimum(tl.arange(0, BN), N - 1 - j0)[:, None] * D + kk[None, :]
    qb = q + i0.to(tl.int64) * D
    kb = k + j0.to(tl.int64) * D
    products = tl.zeros((BM, BN), tl.float32)
    for d in range(0, D, BK):
        if D % BK == 0:
            a = tl.load(qb + qo)
            b = tl.load(kb + ko)
        else:
            a = tl.load(qb + qo, mask=kk[None, :] < D - d, other=0.0)
            b = tl.load(kb + ko, mask=kk[None, :] < D - d, other=0.0)
        products = tl.dot(a, tl.trans(b), products, input_precision=IP)
        qb += BK
        kb += BK
    return products * (rq * s2)[:, None] * rk[None, :]


@triton.jit
def sums_kernel(
    Q0,
    Q1,
    Q2,
    Q3,
    K0,
    K1,
    K2,
    RQ,
    RK,
    TERMS,
    ROWS,
    COLUMNS,
    SHIFTS,
    POSITIVE,
    SCALE,
    BIAS,
    S,
    M,
    N,
    offset,
    m0,
    rows,
    pm0,
    all_blocks_m,
    blocks_m,
    blocks_n,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    IP: tl.constexpr,
    STORED: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    """Sums of the tiles of rows [m0, m0 + rows) of every term; TERMS[t] = query, key, both directions.

    Softmax: ROWS[t, pn, M], COLUMNS[t, pm, N] of exp2(logit - SHIFTS[t, pm, pn]) without the positives. Sigmoid: ROWS
    of the losses (in log2), COLUMNS[t, pm, pn] the tile's sum of gradients. POSITIVE[t, M]: the positives' logits
    (natural), from the same products as the sums.
    """
    pid = tl.program_id(0)
    t = pid // (blocks_m * blocks_n)
    pm, pn = _place(pid % (blocks_m * blocks_n), blocks_m, blocks_n, GROUP)
    qi = tl.load(TERMS + 3 * t)
    ki = tl.load(TERMS + 3 * t + 1)
    both = tl.load(TERMS + 3 * t + 2)
    i0 = m0 + pm * BM
    i = i0 + tl.arange(0, BM)
    j = pn * BN + tl.arange(0, BN)
    here = i < M
    rq = tl.load(RQ + qi.to(tl.int64) * M + i, mask=here, other=0.0)
    rk = tl.load(RK + ki.to(tl.int64) * N + j, mask=j < N, other=0.0)
    s2 = tl.load(SCALE) * LOG2E
    q = pick(qi, Q0, Q1, Q2, Q3)
    k = pick(ki, K0, K1, K2, K2)
    l2 = _logits(q, k, rq, rk, i0, pn * BN, M, N, s2, S, pm * BM, rows, D, BM, BN, BK, IP, STORED)
    t = t.to(tl.int64)
    own = (offset + i)[:, None] == j[None, :]
    crosses = (offset + i0 < pn * BN + BN) & (offset + i0 + BM > pn * BN)
    if crosses:
        positive = tl.sum(tl.where(own, l2, 0.0), 1) * LN2
        tl.store(POSITIVE + t * M + i, positive, mask=here & (offset + i >= pn * BN) & (offset + i < pn * BN + BN))
    valid = here[:, None] & (j[None, :] < N)
    if SIGMOID:
        z2 = l2 + tl.load(BIAS) * LOG2E
        if crosses:
            z2 = tl.where(own, -z2, z2)
        u = tl.exp2(-tl.abs(z2))
        of_rows = tl.where(valid, tl.maximum(z2, 0.0) + tl.log2(1.0 + u), 0.0)
        tl.store(ROWS + (t * blocks_n + pn) * M + i, tl.sum(of_rows, 1), mask=here)
        gradient = tl.where(valid, tl.where(z2 > 0.0, 1.0, u) / (1.0 + u), 0.0)
        total = tl.sum(gradient)
        if crosses:
            total -= 2.0 * tl.sum(tl.where(own, gradient, 0.0))
        tl.store(COLUMNS + (t * all_blocks_m + pm0 + pm) * blocks_n + pn, total)
    else:
        valid = valid & ((offset + i)[:, None] != j[None, :])
        shift = tl.maximum(s2 - TOP, 0.0)
        if s2 > SMALLEST_UNIFORM:
            shift = tl.max(tl.where(valid, l2, -1e30)) - TOP
        tl.store(SHIFTS + (t * all_blocks_m + pm0 + pm) * blocks_n + pn, shift)
        e = tl.where(valid, tl.exp2(l2 - shift), 0.0)
        tl.store(ROWS + (t * blocks_n + pn) * M + i, tl.sum(e, 1), mask=here)
        if both != 0:
            tl.store(COLUMNS + (t * all_blocks_m + pm0 + pm) * N + j, tl.sum(e, 0), mask=j < N)


@triton.jit
def merge_kernel(
    PARTS,
    SHIFTS,
    OUT,
    TERMS,
    L,
    parts,
    blocks,
    stride_own,
    stride_part,
    BLOCK: tl.constexpr,
    B: tl.constexpr,
    PB: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """OUT[t, L] = ln of the sum over parts p of PARTS[t, p, L] 2^shift; -inf where nothing was summed.

    The shift of element o in part p is SHIFTS[t * blocks + (o // BLOCK) * stride_own + p * stride_part].
    """
    t = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * B + tl.arange(0, B)
    top = tl.full((B,), -1e30, tl.float32)
    total = tl.zeros((B,), tl.float32)
    both = tl.load(TERMS + 3 * t + 2)
    if (both != 0) | (not COLUMNS):
        for p0 in range(0, parts, PB):
            p = p0 + tl.arange(0, PB)
            m = (p[:, None] < parts) & (o[None, :] < L)
            v = tl.load(PARTS + (t * parts + p)[:, None] * L + o[None, :], mask=m, other=0.0)
            at = t * blocks + (o // BLOCK)[None, :] * stride_own + p[:, None] * stride_part
            shift = tl.load(SHIFTS + at, mask=m, other=-1e30)
            higher = tl.maximum(top, tl.max(shift, 0))
            total = total * tl.exp2(top - higher) + tl.sum(v * tl.exp2(shift - higher[None, :]), 0)
            top = higher
    log = (tl.log2(tl.maximum(total, 1e-37)) + top) * LN2
    tl.store(OUT + t * L + o, tl.where(total > 0.0, log, float("-inf")), mask=o < L)


@triton.jit
def gradient_kernel(
    Q0,
    Q1,
    Q2,
    Q3,
    K0,
    K1,
    K2,
    RQ,
    RK,
    TERMS,
    ROW_LOG,
    COLUMN_LOG,
    DIAGONAL,
    G,
    TOTALS,
    SCALE,
    BIAS,
    S,
    M,
    N,
    offset,
    m0,
    rows,
    blocks_m,
    blocks_n,
    pitch,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    IP: tl.constexpr,
    STORED: tl.constexpr,
    SIGMOID: tl.constexpr,
    WITH_TOTAL: tl.constexpr,
):
    """G[t, rows, pitch] = rq_i G_ij rk_j of rows [m0, m0 + rows); TOTALS[pid]: the tile's sum of G_ij L_ij."""
    pid = tl.program_id(0)
    t = pid // (blocks_m * blocks_n)
    pm, pn = _place(pid % (blocks_m * blocks_n), blocks_m, blocks_n, GROUP)
    qi = tl.load(TERMS + 3 * t)
    ki = tl.load(TERMS + 3 * t + 1)
    i0 = m0 + pm * BM
    i = i0 + tl.arange(0, BM)
    j = pn * BN + tl.arange(0, BN)
    here = i < M
    rq = tl.load(RQ + qi.to(tl.int64) * M + i, mask=here, other=0.0)
    rk = tl.load(RK + ki.to(tl.int64) * N + j, mask=j < N, other=0.0)
    q = pick(qi, Q0, Q1, Q2, Q3)
    k = pick(ki, K0, K1, K2, K2)
    s2 = tl.load(SCALE) * LOG2E
    l2 = _logits(q, k, rq, rk, i0, pn * BN, M, N, s2, S, pm * BM, rows, D, BM, BN, BK, IP, STORED)
    t = t.to(tl.int64)
    row_log = tl.load(ROW_LOG + t * M + i, mask=here, other=float("inf")) * LOG2E
    if SIGMOID:
        z2 = l2 + tl.load(BIAS) * LOG2E
        u = tl.exp2(-tl.abs(z2))
        g = tl.where(z2 > 0.0, 1.0, u) / (1.0 + u) * tl.exp2(-row_log)[:, None]
    else:
        column_log = tl.load(COLUMN_LOG + t * N + j, mask=j < N, other=float("inf")) * LOG2E
        g = _weighted_probabilities(l2, row_log, column_log)
    if (offset + i0 < pn * BN + BN) & (offset + i0 + BM > pn * BN):
        diagonal = tl.load(DIAGONAL + t * M + i, mask=here, other=0.0)
        g = tl.where((offset + i)[:, None] == j[None, :], -diagonal[:, None], g)
    valid = here[:, None] & (j[None, :] < N)
    if WITH_TOTAL:
        tl.store(TOTALS + pid, tl.sum(tl.where(valid, g * l2, 0.0)) * LN2)
    g = (g * rq[:, None] * rk[None, :]).to(G.dtype.element_ty)
    base = G + (t * rows + pm * BM) * pitch + pn * BN
    tl.store(base + tl.arange(0, BM)[:, None] * pitch + tl.arange(0, BN)[None, :], g, mask=valid)


@triton.jit
def _weighted_probabilities(l2, row_log, column_log):
    """exp2(l2 - row_log_i) + exp2(l2 - column_log_j) with one exponential an element; a log of inf gives 0.

    The shift is the largest row_log less TOP: what underflows is 2^230 times below that row's denominator.
    """
    shift = tl.max(tl.where(row_log < 1e29, row_log, -1e30))
    shift = tl.where(shift > -1e29, shift, tl.max(tl.where(column_log < 1e29, column_log, -1e30))) - TOP
    of_rows = tl.exp2(tl.minimum(shift - row_log, 126.0))
    of_columns = tl.exp2(tl.minimum(shift - column_log, 126.0))
    return tl.exp2(tl.minimum(l2 - shift, 126.0)) * (of_rows[:, None] + of_columns[None, :])


@triton.jit
def normalise_backward_kernel(
    V, X0, X1, X2, X3, G0, G1, G2, G3, RN, ROW_DOTS, FACTOR, M, D, BR: tl.constexpr, DP: tl.constexpr
):
    """g = factor (v - (xh . v) xh), xh = x / |x|, V [t, M, D]; ROW_DOTS[t, M] = |x| xh . v."""
    t = tl.program_id(1)
    x = pick(t, X0, X1, X2, X3)
    g = pick(t, G0, G1, G2, G3)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, DP)
    m = (r[:, None] < M) & (c[None, :] < D)
    at = r[:, None].to(tl.int64) * D + c[None, :]
    v = tl.load(V + t.to(tl.int64) * M * D + at, mask=m, other=0.0)
    rn = tl.load(RN + t * M + r, mask=r < M, other=0.0)
    unit = tl.load(x + at, mask=m, other=0.0).to(tl.float32) * rn[:, None]
    dot = tl.sum(unit * v, 1)
    tl.store(g + at, (tl.load(FACTOR) * (v - dot[:, None] * unit)).to(g.dtype.element_ty), mask=m)
    tl.store(ROW_DOTS + t * M + r, tl.where(rn > 0.0, dot / tl.maximum(rn, 1e-30), 0.0), mask=r < M)


@dataclass(frozen=True)
class Tile:
    """Shape of a tile of logits and how a program computes it."""

    m: int
    n: int
    k: int
    group: int
    warps: int
    stages: int

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        return triton.cdiv(rows, self.m), triton.cdiv(columns, self.n)  # pyright: ignore[reportReturnType]

    def arguments(self, x: Tensor, stored: bool, sigmoid: bool) -> dict:
        """The compile-time arguments that both tile kernels share."""
        return dict(
            D=x.shape[1],
            BM=self.m,
            BN=self.n,
            BK=self.k,
            GROUP=self.group,
            IP=input_precision(),
            STORED=stored,
            SIGMOID=sigmoid,
            num_warps=self.warps,
            num_stages=self.stages,
        )


HOPPER = {torch.bfloat16: Tile(128, 128, 64, 8, 4, 3), torch.float32: Tile(64, 64, 32, 8, 4, 3)}
AMPERE = HOPPER | {torch.bfloat16: Tile(128, 128, 64, 8, 4, 2)}  # with three stages, registers spill
SIGMOID = HOPPER | {torch.bfloat16: Tile(64, 128, 64, 8, 4, 3)}
STORED_TILE = Tile(64, 128, 64, 8, 8, 1)
INTERPRETED = not isinstance(pick, triton.runtime.jit.JITFunction)  # TRITON_INTERPRET=1: kernels run on the CPU
INTERPRETER_TILE = Tile(16, 32, 32, 2, 4, 1)  # small, so that small inputs have several tiles


def tile_for(x: Tensor, stored: bool, sigmoid: bool) -> Tile:
    """The tile for embeddings like x, by what compiling ahead of time showed: none spills registers."""
    if INTERPRETED or stored:
        return INTERPRETER_TILE if INTERPRETED else STORED_TILE
    new = torch.cuda.get_device_capability(x.device)[0] >= 9
    return (SIGMOID if sigmoid else HOPPER if new else AMPERE)[x.dtype]


def input_precision() -> str:
    """How fp32 operands are multiplied, by torch's setting for its own products."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def inverse_norms(towers: list[Tensor]) -> Tensor:
    """See contrastive_reference."""
    rows, dim = towers[0].shape
    towers = [x.contiguous() for x in towers]
    rn = torch.empty(len(towers), rows, device=towers[0].device)
    grid = (triton.cdiv(rows, 4), len(towers))
    inverse_norms_kernel[grid](*four(towers), rn, rows, dim, BR=4, DP=triton.next_power_of_2(dim))
    return rn


def four(tensors: list[Tensor]) -> list[Tensor]:
    """Four pointers for a kernel; those behind the end are never read."""
    return [*tensors, *[tensors[0]] * (4 - len(tensors))]


@dataclass(frozen=True)
class Way:
    """`stored`: products by cuBLAS, in blocks of rows, with the same epilogue in the kernel (any architecture)."""

    stored: bool

    inverse_norms = staticmethod(inverse_norms)

    def _blocks(self, rows: int, columns: int, terms: int, element_size: int, tile: Tile) -> list[tuple[int, int]]:
        """(first row, rows) of the blocks whose workspace fits."""
        size = max(tile.m, WORKSPACE // (columns * element_size * terms) // tile.m * tile.m)
        return [(start, min(size, rows - start)) for start in range(0, rows, size)]

    def sums(self, towers, keys, rn, key_rn, scale, bias, terms: list[Term], offset: int):
        """See contrastive_reference."""
        towers, keys = [x.contiguous() for x in towers], [x.contiguous() for x in keys]
        (rows, _), length, n = towers[0].shape, len(keys[0]), len(terms)
        sigmoid = bias is not None
        tile = tile_for(towers[0], self.stored, sigmoid)
        blocks_m, blocks_n = tile.grid(rows, length)
        of_rows = rn.new_empty(n, blocks_n, rows)
        of_columns = rn.new_empty(n, blocks_m, blocks_n if sigmoid else length)
        shifts, positive = rn.new_empty(n, blocks_m, blocks_n), rn.new_empty(n, rows)
        pointers = [*four(towers), *three(keys), rn, key_rn]

        def launch(first: int, last: int, start: int, count: int, products: Tensor) -> None:
            here, _ = tile.grid(count, length)
            sums_kernel[((last - first) * here * blocks_n,)](
                *pointers,
                table_of(terms, rn)[first:],
                of_rows[first:],
                of_columns[first:],
                shifts[first:],
                positive[first:],
                scale,
                scale if bias is None else bias,
                products,
                rows,
                length,
                offset,
                start,
                count,
                start // tile.m,
                blocks_m,
                here,
                blocks_n,
                **tile.arguments(towers[0], self.stored, sigmoid),
            )

        if self.stored:
            for start, count in self._blocks(rows, length, 1, 4, tile):
                for t, (q, k, _) in enumerate(terms):
                    launch(t, t + 1, start, count, product(towers[q][start : start + count], keys[k].T))
        else:
            launch(0, n, 0, rows, rn)
        if sigmoid:
            return positive, of_rows.sum(1) * LN2.value, of_columns.flatten(1).sum(1, keepdim=True)
        return (
            positive,
            merge(of_rows, shifts, terms, (blocks_n, 1), tile.m, columns=False),
            merge(of_columns, shifts, terms, (1, blocks_n), tile.n, columns=True),
        )

    def products(
        self,
        towers,
        keys,
        rn,
        key_rn,
        scale,
        bias,
        row_log,
        column_log,
        diagonal,
        terms: list[Term],
        offset: int,
        v: Tensor,
        key_v: Tensor,
    ) -> Tensor | None:
        """See contrastive_reference."""
        towers, keys = [x.contiguous() for x in towers], [x.contiguous() for x in keys]
        (rows, _), length, low, sigmoid = towers[0].shape, len(keys[0]), towers[0].dtype, bias is not None
        tile = tile_for(towers[0], self.stored, sigmoid)
        exact = low == torch.float32  # in bf16 the sum of G L would cost spilled registers
        groups = [[term] for term in terms] if self.stored else [terms]
        pitch = triton.cdiv(length, 16) * 16  # aligned rows, so that stores are wide
        total, first = scale.new_zeros(()), 0
        for group in groups:
            last = first + len(group)
            for start, count in self._blocks(rows, length, len(group), 4 if self.stored else low.itemsize, tile):
                here = slice(start, start + count)
                blocks_m, blocks_n = tile.grid(count, length)
                g = torch.empty(len(group), count, pitch, dtype=low, device=rn.device)
                totals = rn.new_empty(len(group) * blocks_m * blocks_n)
                q, k, _ = group[0]
                stored = product(towers[q][here], keys[k].T) if self.stored else rn
                gradient_kernel[(len(totals),)](
                    *four(towers),
                    *three(keys),
                    rn,
                    key_rn,
                    table_of(group, rn),
                    row_log[first:last],
                    column_log[first:last],
                    diagonal[first:last],
                    g,
                    totals,
                    scale,
                    scale if bias is None else bias,
                    stored,
                    rows,
                    length,
                    offset,
                    start,
                    count,
                    blocks_m,
                    blocks_n,
                    pitch,
                    WITH_TOTAL=exact,
                    **tile.arguments(towers[0], self.stored, sigmoid),
                )
                if exact:
                    total += totals.sum()
                for t, (q, k, _) in enumerate(group):
                    weights = g[t, :, :length]
                    v[q, here] += product(weights, keys[k])
                    key_v[k] += product(weights.T, towers[q][here])
            first = last
        return total if exact else None

    def normalise_backward(self, v: Tensor, towers: list[Tensor], rn: Tensor, factor: Tensor):
        """See contrastive_reference."""
        rows, dim = towers[0].shape
        towers = [x.contiguous() for x in towers]
        gradients, dots = [torch.empty_like(x) for x in towers], torch.empty_like(rn)
        grid = (triton.cdiv(rows, 4), len(towers))
        normalise_backward_kernel[grid](
            v, *four(towers), *four(gradients), rn, dots, factor, rows, dim, BR=4, DP=triton.next_power_of_2(dim)
        )
        return gradients, dots.sum()


def three(tensors: list[Tensor]) -> list[Tensor]:
    """The keys' pointers, as four()."""
    return four(tensors)[:3]


def table_of(terms: list[Term], like: Tensor) -> Tensor:
    return table(tuple(tuple(map(int, term)) for term in terms), torch.int32, like.device)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def merge(
    parts: Tensor, shifts: Tensor, terms: list[Term], strides: tuple[int, int], block: int, columns: bool
) -> Tensor:
    """Tiles' sums [n, parts, L] and shifts [n, blocks_m, blocks_n] -> log of the whole sums [n, L]."""
    n, count, length = parts.shape
    out = parts.new_empty(n, length)
    merge_kernel[(triton.cdiv(length, 128), n)](
        parts,
        shifts,
        out,
        table_of(terms, parts),
        length,
        count,
        shifts[0].numel(),
        *strides,
        BLOCK=block,
        B=128,
        PB=16,
        COLUMNS=columns,
    )
    return out


TILE, HYBRID = Way(stored=False), Way(stored=True)
