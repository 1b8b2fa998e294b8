"""Supervised fine-tuning of the image tower on labelled images, as in CleanCLIP (Bansal et al., arXiv 2303.03323).

The result is a run like any other: evaluated zero-shot with its old text tower, or cleaned further.
"""

from __future__ import annotations

import torch.distributed as td
from torch import Tensor

from fastbd.base import random
from fastbd.base.errors import UserError
from fastbd.config.flags import CleanConfig
from fastbd.methods.head import Head
from fastbd.methods.method import Embedded, Losses, Method, Training
from fastbd.methods.objectives import Objective


class Supervised(Method):
    """CE(W i + b, class of the image), i the embedding as it is; text tower and temperature stay."""

    fixed_scale = True
    contrasts = False

    def __init__(self, config: CleanConfig):
        super().__init__(Objective(mmcl_weight=0.0, ssl_weight=0.0, ssl_text=False), "supervised")
        self.head: Head | None = None

    def attach(self, training: Training) -> None:
        labels, rows, dim = training.labels, training.rows, training.model.embed_dim
        if labels is None:
            raise UserError("--method supervised needs images with classes: name a labelled .beton with --data.")
        if self.head is None:
            self.head = Head(len(rows), dim, int(labels.max()) + 1, training.device)
        self.know(rows, training.device)
        self.head.learn(labels[rows])
        self.head.renew(random.generator(training.seed, "head"), std=(3 * dim) ** -0.5)

    def forward(
        self, embedded: Embedded, group: td.ProcessGroup | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor, Losses]:
        assert self.head, "attach() comes first"
        loss = self.head(embedded.images[0], self.places(embedded.rows), group)
        return loss, {"supervised": loss.detach()}
