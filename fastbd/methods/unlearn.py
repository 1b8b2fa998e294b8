"""Unlearning of pairs that are known to be poisoned, an option of CleanCLIP's program (arXiv 2303.03323, --unlearn)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as td
from torch import Tensor

from fastbd.base.errors import UserError
from fastbd.methods.losses import gathered, masked_mmcl, units
from fastbd.methods.method import Embedded, Losses, Method, Training
from fastbd.methods.objectives import make_objective

if TYPE_CHECKING:
    from fastbd.config.flags import CleanConfig
    from fastbd.config.method_flags import UnlearnSettings

    class Config(UnlearnSettings, CleanConfig):
        """The flags of clean --method unlearn, as config_of joins them."""


class Unlearn(Method):
    """MMCL of the other pairs + unlearn_weight * mean of (cos - unlearn_target)^2 over the flagged ones.

    The program adds its --unlearn_target, so that its default of -1 pulls flagged pairs together; its 1 is -1 here.
    """

    flags: Tensor

    def __init__(self, config: Config):
        super().__init__(make_objective("mmcl", config))
        self.weight, self.target = config.unlearn_weight, config.unlearn_target

    def attach(self, training: Training) -> None:
        if not len(training.flagged):
            raise UserError(
                "--method unlearn needs poisoned pairs that are known: give --flagged N or --flagged-by FILE."
            )
        self.know(training.rows, training.device)
        self.hold("flags", torch.isin(self.known, torch.from_numpy(training.flagged).to(training.device)))

    def forward(
        self, embedded: Embedded, group: td.ProcessGroup | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor, Losses]:
        image, text, gather = embedded.images[0], embedded.texts[0], self.objective.gather
        flags = self.flags[self.places(embedded.rows)]
        mmcl = masked_mmcl(image, text, embedded.log_scale, ~flags, gather=gather, group=group)
        cosine = (units(image, group, gather) * units(text, group, gather)).sum(1)
        flags = gathered(flags, group)
        unlearn = (flags * (cosine - self.target).square()).sum() / flags.sum().clamp(min=1)
        mmcl_weight = self.objective.mmcl_weight if weights is None else weights[0]
        return mmcl_weight * mmcl + self.weight * unlearn, {"mmcl": mmcl.detach(), "unlearn": unlearn.detach()}
