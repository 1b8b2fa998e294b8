"""Training objectives: (embeddings of a batch) -> (loss, named parts)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch.distributed as td
from torch import Tensor

from fastbd.errors import UserError
from fastbd.kernels.contrastive import contrastive_loss


@dataclass(frozen=True)
class Objective:
    """mmcl_weight * MMCL + ssl_weight * (mean of the halves in use); weight 0 leaves a term out."""

    mmcl_weight: float = 1.0
    ssl_weight: float = 0.0
    ssl_image: bool = True
    ssl_text: bool = True
    ssl_symmetric: bool = False
    gather: str = "exact"

    @property
    def weights(self) -> tuple[float, float]:
        """Of MMCL and SSL."""
        return self.mmcl_weight, self.ssl_weight

    @property
    def augments_images(self) -> bool:
        """Whether a second view of each image is needed."""
        return self.ssl_weight > 0 and self.ssl_image

    @property
    def augments_texts(self) -> bool:
        """Whether a second version of each caption is needed."""
        return self.ssl_weight > 0 and self.ssl_text

    @property
    def idle(self) -> str | None:
        """The tower that no term looks at: image, text, or None."""
        if self.mmcl_weight or (self.ssl_image and self.ssl_text):
            return None
        return "text" if self.ssl_image else "image"

    def __call__(
        self,
        images: Sequence[Tensor],
        texts: Sequence[Tensor],
        log_scale: Tensor,
        group: td.ProcessGroup | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Raw embeddings [B, D] of this process, of each view -> (loss, parts), all scalars.

        MMCL compares the first views. SSL compares the second with the first; of three images the third with the
        second, as SLIP does (Mu et al., arXiv 2112.12750). With a group, the batch is that of all its processes.
        `weights` [2], on the device, are those of MMCL and SSL in place of the objective's own, which still say by
        being 0 that a term is left out.
        """
        given = self.weights if weights is None else weights
        mmcl_weight, ssl_weight = (weight if own else 0 for own, weight in zip(self.weights, given, strict=True))
        image, text = images[0], texts[0]
        image_aug = images[-1] if self.augments_images else None
        text_aug = texts[-1] if self.augments_texts else None
        loss_of = partial(
            contrastive_loss, log_scale=log_scale, ssl_symmetric=self.ssl_symmetric, gather=self.gather, group=group
        )
        if image_aug is None or len(images) == 2:
            return loss_of(image, text, image_aug, text_aug, mmcl_weight=mmcl_weight, ssl_weight=ssl_weight)
        weight = ssl_weight / (1 + self.augments_texts)
        loss, parts = loss_of(images[1], text, image_aug, mmcl_weight=0, ssl_weight=weight)
        if self.mmcl_weight or self.augments_texts:
            rest, others = loss_of(image, text, None, text_aug, mmcl_weight=mmcl_weight, ssl_weight=weight)
            loss, parts = loss + rest, others | parts
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
        gather=config.gather,
    )
