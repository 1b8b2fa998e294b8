"""An objective: only images look for their captions, not captions for their images."""

import torch
from torch.nn.functional import cross_entropy, normalize

from fastbd.methods.objectives import Objective


class OneWay(Objective):
    def __call__(self, images, texts, log_scale, group=None, weights=None):
        """Return (loss, parts by name) of raw embeddings [B, D], a tensor for each view of the images and texts."""
        image, text = (normalize(each[0].float(), dim=1) for each in (images, texts))
        loss = cross_entropy(log_scale.exp() * image @ text.T, torch.arange(len(image), device=image.device))
        return loss, {"one_way": loss.detach()}


def make(config):
    """Return the objective; `config` has all flags of the run."""
    return OneWay()


make.title, make.colour = "One-way MMCL", "#882255"  # in reports
