"""Losses in plain PyTorch with all N x N logits, fp32: CyCLIP's, and the contrastive ones of some pairs of a batch.

Embeddings [B, D] are raw, bf16 or fp32. With a group the batch is that of all its processes, N pairs in rank order, and
each process computes the whole loss; `gather` is as for contrastive_loss.
"""

from __future__ import annotations

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor


def cyclic_loss(image: Tensor, text: Tensor, *, gather: str = "exact", group: td.ProcessGroup | None = None) -> Tensor:
    """In-modal + cross-modal consistency (CyCLIP, Goel et al., arXiv 2205.14459), of cosines.

    N mean((I I^T - T T^T)^2) + N mean((I T^T - T I^T)^2), the code's factor N included. The first matrix is symmetric
    and the second antisymmetric, so both together are |I I^T - T T^T + I T^T - T I^T|^2 = |(I - T) (I + T)^T|^2: one
    product, and nothing cancels where pairs agree.
    """
    with torch.autocast(image.device.type, enabled=False):
        i, t = (units(x, group, gather) for x in (image, text))
        return ((i - t) @ (i + t).T).square().sum() / len(i)


def masked_mmcl(
    image: Tensor, text: Tensor, log_scale: Tensor, mask: Tensor, *, gather: str = "exact",
    group: td.ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """MMCL of the pairs in mask, bool [B], alone: others are neither anchors nor negatives; 0 when there is none."""
    of_rows, of_columns = _masked(image, text, log_scale, mask, gather, group)
    return (of_rows + of_columns) / 2


def masked_ssl(
    plain: Tensor, augmented: Tensor, log_scale: Tensor, mask: Tensor, *, gather: str = "exact",
    group: td.ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """A half of SSL, from plain views to augmented ones, of the pairs in mask, bool [B], alone."""
    return _masked(plain, augmented, log_scale, mask, gather, group)[0]


def _masked(
    queries: Tensor, keys: Tensor, log_scale: Tensor, mask: Tensor, gather: str, group: td.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the rows and over the columns."""
    with torch.autocast(queries.device.type, enabled=False):
        q, k = (units(x, group, gather) for x in (queries, keys))
        mask = gathered(mask, group)
        logits = log_scale.float().exp() * q @ k.T
        # A pair left out meets itself alone: loss and gradient 0.
        alone = ~(mask[:, None] & mask).fill_diagonal_(True)
        logits = logits.masked_fill(alone, -torch.inf)
        positive, count = logits.diagonal(), mask.sum().clamp(min=1)
        over_rows, over_columns = ((logits.logsumexp(dim) - positive).sum() / count for dim in (1, 0))
        return over_rows, over_columns


def units(x: Tensor, group: td.ProcessGroup | None, gather: str) -> Tensor:
    """Normalised, float32 [N, D]; only the own rows have a gradient, all of it.

    The mean over the processes of what it makes of the parameters is to be the loss's gradient: "exact" is times their
    number.
    """
    if group is None:
        return F.normalize(x.float(), dim=1)
    own = x.float()
    if gather == "exact":
        own = own.detach() + group.size() * (own - own.detach())
    rows = list(gathered(x.detach(), group).float().split(len(x)))
    rows[group.rank()] = own
    return F.normalize(torch.cat(rows), dim=1)


def gathered(x: Tensor, group: td.ProcessGroup | None) -> Tensor:
    """x [B, ...] of all processes, joined in rank order."""
    if group is None:
        return x
    rows = [torch.empty_like(x) for _ in range(group.size())]
    td.all_gather(rows, x.contiguous(), group=group)
    return torch.cat(rows)
