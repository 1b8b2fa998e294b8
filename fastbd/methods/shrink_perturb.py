"""Shrink and perturb (Ash and Adams, arXiv 1910.08475) before CleanCLIP, as Verma et al. (arXiv 2311.14948) try it.

Forget a share of what was learnt, the backdoor with it, and learn again from clean pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastbd.base import random
from fastbd.methods.cleanclip import CleanClip
from fastbd.methods.method import Training
from fastbd.models import CLIP
from fastbd.models.clip import fresh_like

if TYPE_CHECKING:
    from fastbd.config.flags import CleanConfig
    from fastbd.config.method_flags import ShrinkPerturbSettings

    class Config(ShrinkPerturbSettings, CleanConfig):
        """The flags of clean --method shrink_perturb, as config_of joins them."""


class ShrinkPerturb(CleanClip):
    """p <- shrink p + perturb p_fresh for each parameter, gains and temperature too, with those of a fresh model."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.shrink, self.perturb = config.shrink, config.perturb

    def attach(self, training: Training) -> None:
        self.seed = training.seed

    @torch.no_grad()
    def prepare(self, model: CLIP) -> None:
        # Not the run's own seed: with that of the pre-training it would draw the weights that the model began with.
        seed = int(random.generator(self.seed, "shrink-perturb").integers(2**63))
        noise = dict(fresh_like(model, seed).named_parameters())
        for name, parameter in model.named_parameters():
            parameter.mul_(self.shrink).add_(noise[name].to(parameter.device), alpha=self.perturb)
