"""What cleaning does to a model, watched on clean pairs, without knowing the trigger."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbd.base.evaluation import Evaluation, evaluation_of
from fastbd.data.loader import draw_views
from fastbd.data.pairs import Pairs
from fastbd.evals.retrieval import validation_loss
from fastbd.evals.towers import Towers
from fastbd.kernels.augment import render

VIEWS = ("plain", "auto_augment")
CHUNK = 256  # images decoded at once
BATCH = 256  # pairs of the validation loss


class Monitor:
    """monitor() says how far the model has moved since start(), on clean pairs that it is not trained on.

    Of the `rows` of `pairs` the images' plain and AutoAugment views, drawn from `seed`, stay on the device
    as uint8 [N, S, S, 3], and the captions packed. The towers are as they were last refreshed.
    """

    def __init__(self, towers: Towers, pairs: Pairs, rows: np.ndarray, *, seed: int = 0):
        self.towers = towers
        held_out = Pairs(pairs.beton, pairs.decoder, pairs.size, max_bad=pairs.max_bad)  # residents are training rows
        chunks = [rows[first : first + CHUNK] for first in range(0, len(rows), CHUNK)]
        views = [
            self._views(ids, held_out.each(sources), pairs.size, seed)
            for ids, sources in zip(chunks, held_out.sources(chunks), strict=True)
        ]
        self.plain, self.augmented = (torch.cat(parts) for parts in zip(*views, strict=True))
        self.texts = towers.packed(held_out.tokens(rows))

    def _views(self, ids: np.ndarray, images: list[Tensor], size: int, seed: int) -> list[Tensor]:
        images = [image.to(self.towers.device) for image in images]
        drawn = draw_views(VIEWS, size, ids, np.array([image.shape[:2] for image in images]), seed=seed, epoch=0)
        with torch.cuda.device_of(images[0]):  # Triton starts a kernel on the thread's device
            return [render(images, view, size, torch.uint8) for view in drawn]

    def start(self) -> None:
        """Take the model as it is, before cleaning, for what drift is measured from."""
        self.started = self._embed(self.plain), self._captions()

    def __call__(self) -> Evaluation:
        """Numbers for a line of metrics.jsonl.

        val_loss: the symmetric contrastive loss at the model's temperature, in batches of 256. drift_image, drift_text:
        mean squared distance of the normalised embeddings from those of the start, 0 to 4; _aligned: after the joint
        rotation that brings both nearest to them, to which no cosine is sensitive. agreement: mean cosine of the plain
        and the AutoAugment view.
        """
        images, texts = self._embed(self.plain), self._captions()
        turn = rotation(torch.cat([images, texts]), torch.cat(self.started))
        found = {"agreement": (images * self._embed(self.augmented)).sum(1).mean()}
        for name, now, before in zip(("image", "text"), (images, texts), self.started, strict=True):
            found[f"drift_{name}"] = _distance(now, before)
            found[f"drift_{name}_aligned"] = _distance(now @ turn, before)
        numbers = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
        loss = validation_loss(images, texts, self.towers.log_scale, min(BATCH, len(images)))
        return evaluation_of({"val_loss": loss, **numbers})

    def _embed(self, images: Tensor) -> Tensor:
        return F.normalize(self.towers.images(images), dim=1)

    def _captions(self) -> Tensor:
        return F.normalize(torch.cat([self.towers.text(part) for part in self.texts]), dim=1)


def rotation(points: Tensor, onto: Tensor) -> Tensor:
    """The orthogonal R [D, D] of least |points R - onto|, both [N, D] (Procrustes; Schönemann 1966)."""
    u, _, vh = torch.linalg.svd(points.T @ onto)
    return u @ vh


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum(1).mean()
