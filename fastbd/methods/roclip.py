"""RoCLIP (Yang et al., arXiv 2303.06854, NeurIPS 2023): pre-training that now and then breaks up the pairs.

A poisoned image seldom finds a caption of the target nearest to it, as long as the attack has not been learned.
"""

from __future__ import annotations

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor

from fastbd.base import random
from fastbd.base.errors import UserError
from fastbd.config.flags import PretrainConfig
from fastbd.methods.losses import gathered
from fastbd.methods.method import Embedded, Losses, Method, Training
from fastbd.methods.objectives import make_objective


class RoClip(Method):
    """Every period-th epoch MMCL, in both directions, of the images and each one's nearest caption in a pool.

    The pool is a queue of embeddings without gradient, so the text tower gets none in such an epoch. It begins with
    random captions, as in the paper (random vectors in the program), and each batch's captions replace the oldest after
    they might have been chosen from. The paper augments images and captions as well: here that is up to --views.
    """

    pool: Tensor
    oldest: Tensor

    def __init__(self, config: PretrainConfig):
        if config.objective != "mmcl":
            raise UserError(
                f"--robust roclip replaces the loss of --objective mmcl: it cannot go with {config.objective}."
            )
        super().__init__(make_objective("mmcl", config))
        self.period, self.size, self.matching = config.roclip_period, config.roclip_pool, False

    def attach(self, training: Training) -> None:
        self.size = min(self.size, len(training.rows))
        self.hold("pool", torch.zeros(self.size, training.model.embed_dim, device=training.device))
        self.hold("oldest", torch.zeros((), dtype=torch.int64, device=training.device))

    def begin(self, epoch: int, training: Training) -> None:
        if epoch == self.period - 1:
            drawn = random.generator(training.seed, "roclip-pool").permutation(len(training.rows))[: self.size]
            self.pool.copy_(F.normalize(training.embed_texts(training.rows[drawn]), dim=1))

    def variant(self, epoch: int) -> bool:
        """Whether images are matched with the pool: in epochs period, 2 period, ... counted from 1."""
        self.matching = (epoch + 1) % self.period == 0
        return self.matching

    def forward(
        self, embedded: Embedded, group: td.ProcessGroup | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor, Losses]:
        if not self.matching:
            return super().forward(embedded, group, weights)
        (image,), (text,) = embedded.images, embedded.texts
        nearest = self.nearest(image)
        self.push(gathered(text.detach(), group))
        loss, parts = self.objective((image,), (nearest,), embedded.log_scale, group, weights)
        return loss + 0 * text.float().sum(), parts  # a gradient of 0, for DDP, which waits for each parameter's

    @torch.no_grad()
    def nearest(self, image: Tensor) -> Tensor:
        """The entry of the pool with the largest cosine to each image, [B, D]."""
        return self.pool[(image.float() @ self.pool.T).argmax(1)]

    @torch.no_grad()
    def push(self, text: Tensor) -> None:
        """Captions take the places of the oldest ones."""
        text = F.normalize(text.float(), dim=1)[-self.size :]
        places = (self.oldest + torch.arange(len(text), device=text.device)) % self.size
        self.pool.index_copy_(0, places, text)
        self.oldest.copy_((self.oldest + len(text)) % self.size)
