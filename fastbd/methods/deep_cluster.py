"""Deep clustering (Caron et al., arXiv 1807.05520) beside CleanCLIP, as Verma et al. (arXiv 2311.14948) try it.

Images are to be told apart by what they look like, which the trigger hides. With labels of another model in place of
clusters it is those authors' upper bound. Two things in their program are left out: there, the model embeds in training
mode, which moves its running statistics, and the heads of past epochs stay in the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastbd.base import random
from fastbd.base.errors import UserError
from fastbd.methods.cleanclip import CleanClip
from fastbd.methods.head import Head
from fastbd.methods.kmeans import spherical_kmeans
from fastbd.methods.method import Embedded, Losses, Training

if TYPE_CHECKING:
    from fastbd.config.flags import CleanConfig
    from fastbd.config.method_flags import DeepClusterSettings

    class Config(DeepClusterSettings, CleanConfig):
        """The flags of clean --method deep_cluster, as config_of joins them."""


class DeepCluster(CleanClip):
    """MMCL + SSL + weight * CE(W i / |i| + b, label of the image), i the embedding of the plain view.

    Before each epoch the labels are the nearest of `clusters` centres, by spherical k-means on all training images, and
    W and b fresh. Labels from a file stay, and so does their head.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.clusters, self.weight, self.file = config.clusters, config.cluster_weight, config.cluster_labels
        self.head: Head | None = None

    def attach(self, training: Training) -> None:
        rows, given = training.rows, None
        if self.file:
            given = read_labels(self.file, training.data_size)
        elif self.clusters > len(rows):
            raise UserError(f"--clusters {self.clusters} is more than the {len(rows):,} images: give fewer.")
        if self.head is None:
            classes = self.clusters if given is None else int(given.max()) + 1
            self.head = Head(len(rows), training.model.embed_dim, classes, training.device)
        self.know(rows, training.device)
        self.head.learn(np.zeros_like(rows) if given is None else given[rows])
        self.head.renew(random.generator(training.seed, "head"))

    def begin(self, epoch: int, training: Training) -> None:
        if self.file:
            return
        assert self.head, "attach() comes first"
        images = training.embed_images(training.rows)
        noise = random.generator(training.seed, f"clusters/{epoch}")
        start = images[noise.permutation(len(images))[: self.clusters]]
        self.head.learn(spherical_kmeans(images, start)[0].cpu().numpy())
        self.head.renew(noise)

    @property
    def renewed(self) -> Sequence[nn.Parameter]:
        return () if self.file or self.head is None else tuple(self.head.parameters())

    def forward(
        self, embedded: Embedded, group: td.ProcessGroup | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor, Losses]:
        assert self.head, "attach() comes first"
        loss, parts = super().forward(embedded, group, weights)
        cluster = self.head(normalize(embedded.images[0].float(), dim=-1), self.places(embedded.rows), group)
        return loss + self.weight * cluster, parts | {"cluster": cluster.detach()}


def read_labels(path: Path, total: int) -> np.ndarray:
    """int64 [total], from a .npy file or a text file with one a line, for each row of the data."""
    try:
        labels = np.load(path) if path.suffix == ".npy" else np.array(path.read_text().split(), np.int64)
    except OSError as error:
        raise UserError(f"the labels {path} cannot be read ({error.strerror}).") from None
    except (ValueError, EOFError):
        raise UserError(f"{path} holds no labels: give a .npy file, or a text file, of integers.") from None
    if labels.shape != (total,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(f"{path} must hold an integer from 0 for each of the {total:,} rows of the data.")
    return labels.astype(np.int64)
