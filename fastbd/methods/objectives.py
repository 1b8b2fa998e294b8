"""Training objectives: (embeddings of a batch) -> (loss, named parts)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
import torch.distributed as td
from torch import Tensor

from fastbd.base.errors import UserError
from fastbd.config.cards import load
from fastbd.config.imports import check_like
from fastbd.kernels.contrastive import contrastive_loss, sigmoid_loss
from fastbd.methods.losses import cyclic_loss

Loss = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Objective:
    """The sum of the terms, each times its weight; weight 0 leaves a term out.

    MMCL; SSL, the mean of the halves in use; SigLIP's loss, the mean over all N^2 pairs without a learned bias, as in
    the code of Verma et al. (arXiv 2311.14948); both cyclic terms of CyCLIP (arXiv 2205.14459).
    """

    mmcl_weight: float = 1.0
    ssl_weight: float = 0.0
    siglip_weight: float = 0.0
    cyclic_weight: float = 0.0
    ssl_image: bool = True
    ssl_text: bool = True
    ssl_symmetric: bool = False
    gather: str = "exact"

    @property
    def weights(self) -> tuple[float, float, float, float]:
        """Of MMCL, SSL, SigLIP and the cyclic terms."""
        return self.mmcl_weight, self.ssl_weight, self.siglip_weight, self.cyclic_weight

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
        if self.mmcl_weight or self.siglip_weight or self.cyclic_weight or (self.ssl_image and self.ssl_text):
            return None
        return "text" if self.ssl_image else "image"

    def __call__(
        self,
        images: Sequence[Tensor],
        texts: Sequence[Tensor],
        log_scale: Tensor,
        group: td.ProcessGroup | None = None,
        weights: Tensor | None = None,
    ) -> Loss:
        """Raw embeddings [B, D] of this process, of each view -> (loss, parts), all scalars.

        SSL compares the second views with the first; of three images the third with the second, as SLIP does (Mu et
        al., arXiv 2112.12750). The other terms compare the first views. With a group, the batch is that of all its
        processes. `weights` [4], on the device, are those of MMCL, SSL, SigLIP and the cyclic terms in place of the
        objective's own, which still say by being 0 that a term is left out.
        """
        given = self.weights if weights is None else weights
        mmcl, ssl, siglip, cyclic = (weight if own else 0 for own, weight in zip(self.weights, given, strict=True))
        terms = []
        if self.mmcl_weight or self.ssl_weight:
            terms.append(self._contrastive(images, texts, log_scale, group, mmcl, ssl))
        if self.siglip_weight:
            pairs = len(images[0]) * (1 if group is None else group.size())
            of_anchor = sigmoid_loss(
                images[0], texts[0], log_scale=log_scale, bias=log_scale.new_zeros(()), gather=self.gather, group=group
            )
            terms.append((siglip * of_anchor / pairs, {"siglip": of_anchor.detach() / pairs}))
        if self.cyclic_weight:
            loss = cyclic_loss(images[0], texts[0], gather=self.gather, group=group)
            terms.append((cyclic * loss, {"cyclic": loss.detach()}))
        losses, parts = zip(*terms, strict=True)
        return reduce(torch.add, losses), {name: part for named in parts for name, part in named.items()}

    def _contrastive(
        self, images: Sequence[Tensor], texts: Sequence[Tensor], log_scale: Tensor, group: td.ProcessGroup | None,
        mmcl_weight: float | Tensor, ssl_weight: float | Tensor,
    ) -> Loss:  # fmt: skip
        """MMCL and SSL."""
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


TERMS = {
    "mmcl": ("mmcl",),
    "ssl": ("ssl",),
    "mmcl_ssl": ("mmcl", "ssl"),
    "siglip": ("siglip",),
    "siglip_ssl": ("siglip", "ssl"),
    "cyclip": ("mmcl", "cyclic"),
}


def make_objective(name: str, config) -> Objective:
    """Return the objective called `name` with the weights and switches of a TrainConfig.

    UserError where these leave nothing to train with, or where one from outside makes no Objective.
    """
    made = load("objective", name)(config)
    if not isinstance(made, Objective):
        raise UserError(f"the objective {name} makes a {type(made).__name__}: it must return an Objective.")
    check_like(f"the objective that {name} makes", made.__call__, Objective.__call__)
    return made


def _of_terms(name: str, config) -> Objective:
    """Return the sum of the terms of an objective of TERMS."""
    weights = {f"{term}_weight": getattr(config, f"{term}_weight") for term in TERMS[name]}
    if sum(weights.values()) <= 0:
        flags = " or ".join(f"--{weight.replace('_', '-')}" for weight in weights)
        raise UserError(f"every term of --objective {name} has weight 0; give it a positive {flags}.")
    if weights.get("ssl_weight", 0) > 0 and not (config.ssl_image or config.ssl_text):
        raise UserError(
            "--no-ssl-image and --no-ssl-text leave no self-supervised loss: drop one, or use --objective mmcl."
        )
    return Objective(
        **{"mmcl_weight": 0.0} | weights,
        ssl_image=config.ssl_image,
        ssl_text=config.ssl_text,
        ssl_symmetric=config.ssl_symmetric,
        gather=config.gather,
    )


mmcl, ssl, mmcl_ssl, siglip, siglip_ssl, cyclip = (partial(_of_terms, name) for name in TERMS)
