"""Training objectives: (embeddings of a batch) -> (loss, named parts). Plain PyTorch.

Notation of CleanCLIP (arXiv 2303.03323): I, T are normalised plain embeddings, I', T' augmented ones, s the
temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbd.errors import UserError


def cross_entropy(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    """Mean cross-entropy of s * rows @ columns^T with the diagonal as target; rows, columns [B, D] normalised."""
    return F.cross_entropy(scale * rows @ columns.T, torch.arange(len(rows), device=rows.device))


def mmcl(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Multimodal contrastive loss, both directions averaged (Verma et al., arXiv 2311.14948, eq. 1)."""
    return (cross_entropy(image, text, scale) + cross_entropy(text, image, scale)) / 2


def ssl(plain: Tensor, augmented: Tensor, scale: Tensor, symmetric: bool) -> Tensor:
    """Self-supervised loss of one modality; published: plain rows against augmented columns only."""
    loss = cross_entropy(plain, augmented, scale)
    return (loss + cross_entropy(augmented, plain, scale)) / 2 if symmetric else loss


@dataclass(frozen=True)
class Objective:
    """mmcl_weight * MMCL + ssl_weight * (mean of the halves in use); weight 0 leaves a term out."""

    mmcl_weight: float = 1.0
    ssl_weight: float = 0.0
    ssl_image: bool = True
    ssl_text: bool = True
    ssl_symmetric: bool = False

    @property
    def augments_images(self) -> bool:
        """Whether a second view of each image is needed."""
        return self.ssl_weight > 0 and self.ssl_image

    @property
    def augments_texts(self) -> bool:
        """Whether a second version of each caption is needed."""
        return self.ssl_weight > 0 and self.ssl_text

    def __call__(
        self, image: Tensor, text: Tensor, image_aug: Tensor | None, text_aug: Tensor | None, log_scale: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Raw embeddings [B, D] (the augmented ones None without SSL) -> (loss, parts), all scalars."""
        scale = log_scale.float().exp()
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        parts = {}
        if self.mmcl_weight > 0:
            parts["mmcl"] = mmcl(image, text, scale)
        loss = self.mmcl_weight * parts.get("mmcl", torch.zeros_like(scale))
        if self.ssl_weight > 0:
            if self.ssl_image:
                parts["ssl_image"] = ssl(image, F.normalize(image_aug.float(), dim=-1), scale, self.ssl_symmetric)
            if self.ssl_text:
                parts["ssl_text"] = ssl(text, F.normalize(text_aug.float(), dim=-1), scale, self.ssl_symmetric)
            halves = [parts[name] for name in ("ssl_image", "ssl_text") if name in parts]
            loss = loss + self.ssl_weight * sum(halves) / len(halves)
        return loss, parts


# name -> (uses MMCL, uses SSL)
OBJECTIVES = {"mmcl": (True, False), "ssl": (False, True), "mmcl_ssl": (True, True)}


def make_objective(name: str, config) -> Objective:
    """The objective called `name` with the weights and switches of a TrainConfig."""
    uses_mmcl, uses_ssl = OBJECTIVES[name]
    mmcl_weight, ssl_weight = config.mmcl_weight * uses_mmcl, config.ssl_weight * uses_ssl
    if mmcl_weight + ssl_weight <= 0:
        raise UserError(
            f"every term of --objective {name} has weight 0; give it a positive --mmcl-weight or --ssl-weight."
        )
    if ssl_weight > 0 and not (config.ssl_image or config.ssl_text):
        raise UserError(
            "--no-ssl-image and --no-ssl-text leave no self-supervised loss: drop one, or use --objective mmcl."
        )
    return Objective(
        mmcl_weight=mmcl_weight,
        ssl_weight=ssl_weight,
        ssl_image=config.ssl_image,
        ssl_text=config.ssl_text,
        ssl_symmetric=config.ssl_symmetric,
    )
