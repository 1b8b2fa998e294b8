"""The contrastive losses in plain PyTorch: a block of rows at a time, the fallback and the kernels' truth; or a term's
whole matrix of logits at a time, the CPU's way where that matrix is small.

By blocks there are the same functions as in contrastive_tile. Tensors: towers [b, D], the rows of this process; keys
[N, D], those of all processes; `terms` are (query tower, key, both directions), the positive of row i being column
offset + i.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Term = tuple[int, int, bool]
ROWS = 512  # of the logits that exist at a time: memory grows with N, not with N^2
RANGE = 150.0  # logits this far apart have exponentials, and sums of a million of them, within fp32: e^-75 to e^75


def inverse_norms(towers: list[Tensor]) -> Tensor:
    """1 / |x| of each row, [T, b]; 0 for a zero vector, which so gets logits 0 and gradient 0."""
    norms = torch.stack([torch.linalg.vector_norm(x.float(), dim=1) for x in towers])
    return torch.where(norms > 1e-12, 1 / norms, 0)


def sums(
    towers: list[Tensor],
    keys: list[Tensor] | Tensor,
    rn: Tensor,
    key_rn: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    terms: list[Term],
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> positive [n, b], rows [n, b], columns [n, N], for each term.

    Softmax (no bias): rows and columns are log sum exp of the logits of the negatives; columns over these b rows only.
    Sigmoid: rows are sums of the losses of all pairs; columns [n, 1] the sum of their gradients.
    """
    rows, length = len(towers[0]), len(keys[0])
    positive, of_rows = rn.new_empty(2, len(terms), rows)
    of_columns = rn.new_full((len(terms), length), -torch.inf) if bias is None else rn.new_zeros(len(terms), 1)
    for t, (q, k, both) in enumerate(terms):
        for start in range(0, rows, ROWS):
            here = slice(start, start + ROWS)
            logits = _logits(towers[q][here], keys[k], rn[q, here], key_rn[k], scale)
            own = logits.diagonal(offset + start)[: len(logits)]
            positive[t, here] = own
            if bias is None:
                own.fill_(-torch.inf)
                of_rows[t, here] = logits.logsumexp(1)
                if both:
                    of_columns[t] = torch.logaddexp(of_columns[t], logits.logsumexp(0))
            else:
                logits += bias
                own.neg_()
                of_rows[t, here] = F.softplus(logits).sum(1)
                gradient = logits.sigmoid_()
                own.neg_()
                of_columns[t] += gradient.sum()
    return positive, of_rows, of_columns


def products(
    towers: list[Tensor],
    keys: list[Tensor] | Tensor,
    rn: Tensor,
    key_rn: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_log: Tensor,
    column_log: Tensor,
    diagonal: Tensor,
    terms: list[Term],
    offset: int,
    v: Tensor,
    key_v: Tensor,
) -> Tensor | None:
    """Add to v [T, b, D] and key_v [K, N, D] the sums over j of r_i G_ij r_j y_j; returns the sum of G L, or None.

    G is the gradient of the logits L: exp(L - row_log) + exp(L - column_log), for the sigmoid exp(-row_log) sigmoid(L
    + bias), and -diagonal at the positives. r are inverse norms, y raw embeddings.
    """
    total = scale.new_zeros(())
    for t, (q, k, both) in enumerate(terms):
        for start in range(0, len(towers[0]), ROWS):
            here = slice(start, start + ROWS)
            logits = _logits(towers[q][here], keys[k], rn[q, here], key_rn[k], scale)
            log = row_log[t, here, None]
            if bias is None:
                g = torch.exp(logits - log)
                if both:
                    g += torch.exp(logits - column_log[t])
            else:
                g = torch.sigmoid(logits + bias) * torch.exp(-log)
            g.diagonal(offset + start)[: len(g)].copy_(-diagonal[t, here])
            total += torch.vdot(g.flatten(), logits.flatten())
            g.mul_(rn[q, here, None]).mul_(key_rn[k])
            v[q, here] += g @ keys[k].float()
            key_v[k] += g.T @ towers[q][here].float()
    return total


def normalise_backward(v: Tensor, towers: list[Tensor], rn: Tensor, factor: Tensor) -> tuple[list[Tensor], Tensor]:
    """factor (v - (xh . v) xh), xh = x / |x|: gradients of the embeddings, in their dtype; and sum |x| xh . v."""
    gradients, dots = [], v.new_zeros(())
    for x, r, w in zip(towers, rn, v, strict=True):
        unit = x.float() * r[:, None]
        gradients.append((factor * (w - (unit * w).sum(1, keepdim=True) * unit)).to(x.dtype))
        dots += torch.vdot(x.float().flatten(), w.flatten())
    return gradients, dots


# ---- a term's whole matrix of logits at a time ----


def losses_and_gradients(
    towers: list[Tensor], scale: Tensor, weights: Tensor, terms: list[Term]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Towers [N, D], weights [n, 2] -> parts [n, 2], and the loss's gradients: fp32 of the towers, of log_scale.

    A product for the logits and one for each gradient, where blocks multiply the logits out twice. One N x N matrix
    exists at a time. Where it is larger than half a tower, unit vectors are made anew for each product: that takes a
    hundredth of its time and leaves the peak of memory below that of blocks.
    """
    rn, (rows, dim) = inverse_norms(towers), towers[0].shape
    kept = {t: _unit(x, rn[t]) for t, x in enumerate(towers)} if rows <= dim / 2 else {}

    def unit(t: int) -> Tensor:
        return kept[t] if t in kept else _unit(towers[t], rn[t])

    v: dict[int, Tensor] = {}
    parts = [_add_term(v, unit, scale, term, w) for term, w in zip(terms, weights, strict=True)]
    dots = torch.empty_like(rn)
    for t, (x, r) in enumerate(zip(towers, rn, strict=True)):  # the gradient is s r (v - (xh . v) xh), xh = r x
        torch.sum(unit(t).mul_(v[t]), 1, out=dots[t])
        kept.pop(t, None)
        v[t].addcmul_(x, (dots[t] * r)[:, None], value=-1).mul_((scale * r)[:, None])
    # Each logit is in the dots of its row and of its column.
    return torch.stack(parts), [v[t] for t in range(len(towers))], dots.sum() * scale / 2


def _unit(x: Tensor, r: Tensor) -> Tensor:
    return x * r[:, None]


def _add_term(
    v: dict[int, Tensor], unit: Callable[[int], Tensor], scale: Tensor, term: Term, weights: Tensor
) -> Tensor:
    """Add to v of a term's towers the sums over j of G_ij xh_j; returns the term's parts [2]."""
    q, k, both = term[0], term[1] + 1, term[2]
    logits = (unit(q) @ unit(k).T).mul_(scale)
    parts = _to_gradient(logits, weights, both)
    for t, other, g in ((q, k, logits), (k, q, logits.T)):
        v[t] = v[t].addmm_(g, unit(other)) if t in v else g @ unit(other)
    return parts


def _to_gradient(logits: Tensor, weights: Tensor, both: bool) -> Tensor:
    """Turn a term's logits [N, N] into the loss's gradient by them, in place; returns the term's parts [2].

    One exponential, by a shift that suits all, serves the sums of the rows, of the columns and the gradient. Logits too
    far apart for that have one for their row and one for their column.
    """
    low, high = (extreme.item() for extreme in logits.aminmax())
    positive, w = logits.diagonal().clone(), weights[:, None] / len(logits)
    logits.fill_diagonal_(-torch.inf)
    if high - low > RANGE:
        sums = torch.stack([logits.logsumexp(1), logits.logsumexp(0)])
        log, odds = torch.logaddexp(sums, positive) - w.log(), sums - positive
        diagonal = (w * odds.sigmoid()).sum(0)
        for block, of_rows in zip(logits.split(ROWS), log[0, :, None].split(ROWS), strict=True):
            torch.add(torch.exp(block - of_rows), torch.exp(block - log[1]), out=block)
    else:
        shift = (low + high) / 2
        sums, own = torch.stack([logits.sub_(shift).exp_().sum(1), logits.sum(0)]), positive - shift
        factor, odds = w / (sums + own.exp()), sums.log() - own
        diagonal = (factor * sums).sum(0)
        for block, of_rows in zip(logits.split(ROWS), factor[0, :, None].split(ROWS), strict=True):
            block.mul_(of_rows + factor[1])
    logits.diagonal().copy_(-diagonal)
    parts = F.softplus(odds).mean(1)
    return parts if both else parts * parts.new_tensor([1, 0])


def _logits(query: Tensor, key: Tensor, rq: Tensor, rk: Tensor, scale: Tensor) -> Tensor:
    return (query.float() @ key.float().T).mul_((scale * rq)[:, None]).mul_(rk)
