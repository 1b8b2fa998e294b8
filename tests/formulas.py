"""Losses by their definitions, and comparisons with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cyclic(image, text):
    """N times the means of the squared differences (Goel et al., arXiv 2205.14459, and their code's factor N)."""
    i, t = F.normalize(image, dim=1), F.normalize(text, dim=1)
    return len(i) * ((i @ i.T - t @ t.T).square().mean() + (i @ t.T - t @ i.T).square().mean())


def cross_entropies(a, b, log_scale, mask):
    """Over rows and over columns, of the pairs picked by the mask."""
    logits = log_scale.exp() * F.normalize(a[mask], dim=1) @ F.normalize(b[mask], dim=1).T
    target = torch.arange(len(logits))
    return F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)


def mmcl_of(*arguments):
    return sum(cross_entropies(*arguments)) / 2


def ssl_of(*arguments):
    return cross_entropies(*arguments)[0]


def embeddings(rows: int, dim: int = 24, count: int = 2) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(rows, dim, generator=noise) for _ in range(count)]


def with_gradients(function, inputs, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    loss = function(*leaves)
    return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, leaves))]


def assert_near(found, truth, relative: float):
    for a, b in zip(found, truth, strict=True):
        assert (a - b).norm() <= relative * b.norm(), (a, b)


def siglip(image, text, log_scale):
    """As attack-cleanclip has it: the mean of -log sigmoid over all pairs, without a bias."""
    logits = log_scale.exp() * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    return -F.logsigmoid((2 * torch.eye(len(logits)) - 1) * logits).mean()
