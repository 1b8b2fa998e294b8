"""A cleaning method: train with the image-text loss, and push the embeddings of images apart."""

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from fastbd.methods.method import Method
from fastbd.methods.objectives import make_objective


class Spread(Method):
    """MMCL + strength * log of the mean of exp(-2 |x - y|^2) over pairs of images (Wang and Isola 2020)."""

    title, marker = "Spreading", "*"  # in reports

    @dataclass(frozen=True)
    class Settings:
        """Flags of this method; clean --method spread:Spread --help shows them."""

        strength: float = 0.5
        """Weight of what pushes images apart."""

    def __init__(self, config):
        super().__init__(make_objective("mmcl", config), "mmcl")
        self.strength = config.strength

    def forward(self, embedded, group=None, weights=None):
        loss, parts = super().forward(embedded, group, weights)
        distances = torch.pdist(normalize(embedded.images[0].float(), dim=1))
        spread = (-2 * distances.square()).exp().mean().log()
        return loss + self.strength * spread, parts | {"spread": spread.detach()}
