"""PAR, Perturb and Recover (arXiv 2412.00727): drive the embeddings away from the poisoned model's, and learn anew on
clean pairs what belongs together. Its views are light: strong ones help only where they resemble the trigger.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor

from fastbd.methods.method import Embedded, Losses, Method, Training
from fastbd.methods.objectives import make_objective
from fastbd.models.folded import Folded
from fastbd.models.precision import autocast

if TYPE_CHECKING:
    from fastbd.config.flags import CleanConfig
    from fastbd.config.method_flags import ParSettings

    class Config(ParSettings, CleanConfig):
        """The flags of clean --method par, as config_of joins them."""


LAST_RATE = 1e-9
CHUNK = 256  # images that the poisoned model embeds at once
ITERATIONS = 30  # 1.5 ** -30 of the norm: what a singular value must exceed to count


class Par(Method):
    """MMCL - (S_image + S_text) / 2, where S = mean over the batch of |x - x_P|^2, the squared distance between the
    normalised embeddings of the model and of its poisoned start P, which sees the same views.

    An S above --tau counts as 0 and has no gradient (--gate sample: of each pair by itself). With --distance rotation
    S is |x R - x_P|^2, R the rotation that makes S_image + S_text least. R is held fixed: while both gates are open its
    own gradient is 0 (envelope theorem). Temperature and batch norm's statistics are fixed, as in the public program.
    """

    images: Tensor | None
    texts: Tensor

    def __init__(self, config: Config):
        super().__init__(make_objective("mmcl", config), "mmcl")
        self.tau, self.gate, self.distance, self.epochs = config.tau, config.gate, config.distance, config.epochs
        self.frozen_norms, self.fixed_scale = config.frozen_norms, not config.train_scale
        self.lr_start = config.lr_start
        # A function of the Folded model, which is not a module of this one: not saved, not trained.
        self.poisoned: Callable[[Tensor], Tensor] | None = None
        self.register_buffer("images", None, persistent=False)

    def attach(self, training: Training) -> None:
        """Copy the model, and embed what stays the same: all captions, and the images if their views are plain."""
        rows = training.rows
        self.know(rows, training.device)
        if training.policies[0] == "plain":
            self.hold("images", F.normalize(training.embed_images(rows)), saved=False)
        self.hold("texts", F.normalize(training.embed_texts(rows)), saved=False)
        if self.poisoned:
            self.refresh()
            return
        folded = Folded(training.model, training.device)
        folded.refresh()
        self.refresh, self.precision = folded.refresh, training.precision
        # Compiled like the model, as it is a fourth of the step's arithmetic.
        encode = folded.model.encode_image
        self.poisoned = torch.compile(encode, dynamic=False) if training.compiled else encode

    def rates(self, peak: float, *, warmup: int, total: int) -> Tensor:
        """Linear from --lr-start to the peak in the first half, then half a cosine.

        The published table has one step more than each epoch, so that its last ones are not reached.
        """
        length, first = total + self.epochs, 10 * peak if self.lr_start is None else self.lr_start
        to_peak = torch.linspace(first, peak, length // 2, dtype=torch.float64)
        step = torch.arange(length - length // 2, dtype=torch.float64)
        cosine = LAST_RATE + (peak - LAST_RATE) * 0.5 * (1 + torch.cos(math.pi * step / len(step)))
        return torch.cat([to_peak, cosine])[:total].float()

    def forward(
        self, embedded: Embedded, group: td.ProcessGroup | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor, Losses]:
        loss, parts = super().forward(embedded, group, weights)
        for name, each in zip(("image", "text"), self._distances(embedded, group), strict=True):
            mean = _mean(each, group)
            gated = mean * (mean <= self.tau) if self.gate == "batch" else _mean(each * (each <= self.tau), group)
            loss = loss - gated / 2
            parts[f"distance_{name}"] = mean.detach()
        return loss, parts

    def _distances(self, embedded: Embedded, group: td.ProcessGroup | None) -> list[Tensor]:
        """Of each image, and of each caption: [B] and [B]."""
        ours = [F.normalize(x.float()) for x in (embedded.images[0], embedded.texts[0])]
        at = self.places(embedded.rows)
        theirs = [self._of_images(embedded.views[0]) if self.images is None else self.images[at], self.texts[at]]
        if self.distance == "rotation":
            of_images, of_texts = (x.detach().T @ y for x, y in zip(ours, theirs, strict=True))
            moment = of_images + of_texts
            if group is not None:
                td.all_reduce(moment, group=group)
            rotation = nearest_rotation(moment)
            ours = [x @ rotation for x in ours]
        # Not the sum of squares: where a rotation is not found to the end it shortens x, and that would look near.
        return [2 - 2 * (x * y).sum(1) for x, y in zip(ours, theirs, strict=True)]

    @torch.no_grad()
    def _of_images(self, views: Tensor) -> Tensor:
        """The poisoned model's embeddings [B, D], normalised; computed in the same precision as the model's."""
        assert self.poisoned, "attach() comes first"
        with autocast(self.precision, views.device):
            return F.normalize(torch.cat([self.poisoned(part) for part in views.split(CHUNK)]).float())


def nearest_rotation(moment: Tensor) -> Tensor:
    """R [D, D] that makes |X R - Y|^2 least, for X^T Y = moment: its U V^T (Schoenemann 1966, orthogonal Procrustes).

    Newton-Schulz (Higham, Functions of Matrices, 8.3) in place of an SVD, which would wait for the host. Without full
    rank R is a rotation of X's rows only.
    """
    rotation = moment / torch.linalg.matrix_norm(moment).clamp_min(torch.finfo(moment.dtype).tiny)
    for _ in range(ITERATIONS):
        rotation = 1.5 * rotation - 0.5 * rotation @ (rotation.T @ rotation)
    return rotation


def _mean(x: Tensor, group: td.ProcessGroup | None) -> Tensor:
    """Over the rows of all processes; each has the gradient of its own, whose mean over them is the whole's."""
    mean = x.mean()
    if group is None:
        return mean
    whole = mean.detach() / group.size()
    td.all_reduce(whole, group=group)
    return mean + (whole - mean.detach())
