"""Other people's forms of the contrastive loss, told in our words: (towers, log_scale) -> loss.

Towers are raw embeddings [B, D]: image and text, and with the self-supervised term image_aug and text_aug too. The
loss is then MMCL + SSL, each with weight 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Form = Callable[[list[Tensor], Tensor], Tensor]


def two_matrices(towers: list[Tensor], log_scale: Tensor) -> Tensor:
    """open_clip's form on one GPU: a matrix of logits for each direction, multiplied out separately."""
    image, text, *augmented = (F.normalize(tower, dim=-1) for tower in towers)
    scale, labels = log_scale.exp(), torch.arange(len(image), device=image.device)
    loss = F.cross_entropy(scale * image @ text.T, labels) + F.cross_entropy(scale * text @ image.T, labels)
    for plain, other in zip((image, text), augmented, strict=False):
        loss = loss + F.cross_entropy(scale * plain @ other.T, labels)
    return loss / 2


def one_matrix(towers: list[Tensor], log_scale: Tensor) -> Tensor:
    """The form of the CleanCLIP programs: one float32 matrix, read along rows and, transposed, along columns."""
    image, text, *augmented = (tower.float() / tower.float().norm(dim=-1, keepdim=True) for tower in towers)
    scale, labels = log_scale.exp(), torch.arange(len(image), device=image.device)
    logits = scale * image @ text.T
    loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
    for plain, other in zip((image, text), augmented, strict=False):
        loss = loss + F.cross_entropy(scale * plain @ other.T, labels)
    return loss / 2


def autocast(form: Form) -> Form:
    """The form as mixed-precision training runs it: matmuls in bf16."""

    def cast(towers: list[Tensor], log_scale: Tensor) -> Tensor:
        with torch.autocast(towers[0].device.type, torch.bfloat16):
            return form(towers, log_scale)

    return cast


def of_pairs(pair_loss: Callable[[Tensor, Tensor, Tensor, bool], Tensor]) -> Form:
    """A form from pair_loss(rows, columns, scale, both directions), which takes normalised embeddings."""

    def form(towers: list[Tensor], log_scale: Tensor) -> Tensor:
        image, text, *augmented = (F.normalize(tower.float(), dim=-1) for tower in towers)
        scale = log_scale.exp()
        loss = pair_loss(image, text, scale, True)
        for plain, other in zip((image, text), augmented, strict=False):
            loss = loss + pair_loss(plain, other, scale, False)
        return loss / 2

    return form
