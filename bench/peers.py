"""Other people's forms of the contrastive loss, told in our words: (towers, log_scale) -> loss.

Towers are raw embeddings [B, D]: image and text, and with the self-supervised term image_aug and text_aug too. The
loss is then MMCL + SSL, each with weight 1.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Unavailable

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


def float32(form: Form) -> Form:
    """The form as it is run without mixed precision, embeddings of bf16 converted first."""
    return lambda towers, log_scale: form([tower.float() for tower in towers], log_scale)


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


# ---- packages, where they are installed ----


def memeff(log_scale: Tensor, device: str, alone: bool) -> Form:
    """MemoryEfficientCLIP's loss (b0nce, PyPI: memeff), which has MMCL `alone`.

    Its temperature is a number. What it is now becomes part of the loss, and a factor of 1 on the image embeddings
    carries the gradient.
    """
    module = package("memeff", device)
    if not alone:
        raise Unavailable("memeff has no loss of one direction with gradients for both sides")
    constant = log_scale.detach().exp().item()
    pair_loss = module.MemoryEfficientCLIPLoss(temperature=1 / constant, normalized_inputs=True, stable=False)

    def form(towers: list[Tensor], log_scale: Tensor) -> Tensor:
        image, text = (F.normalize(tower, dim=-1) for tower in towers)
        return pair_loss(image * (log_scale.exp() / constant).to(image.dtype), text)

    return form


def inf_cl(device: str) -> Form:
    """Inf-CL's loss on one GPU (DAMO-NLP-SG, PyPI: inf-cl), a call for each direction."""
    rows = package("inf_cl", device).cal_flash_loss

    def pair_loss(a: Tensor, b: Tensor, scale: Tensor, both: bool) -> Tensor:
        loss = rows(a, b, scale=scale).mean()
        return loss + rows(b, a, scale=scale).mean() if both else loss

    return of_pairs(pair_loss)


def package(name: str, device: str) -> ModuleType:
    """Unavailable where it is not installed, or could not run."""
    if device == "cpu":
        raise Unavailable("needs a GPU")
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise Unavailable(f"{name} is not installed") from None
