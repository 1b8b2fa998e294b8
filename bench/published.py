"""The loader of the published programs in our words: a Dataset of files opened with Pillow, in torch's DataLoader.

Each view opens and decodes the file anew; float32 tensors cross from the worker processes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.pillow_views import pillow_view
from fastbd.kernels.views import View


class Views(Dataset):
    """Item i: the views of image i, float32 [3, S, S] each, with the parameters drawn beforehand."""

    def __init__(self, files: Sequence[np.ndarray], views: Sequence[View], size: int):
        self.files, self.views, self.size = files, views, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> list[Tensor]:
        opened = (Image.open(io.BytesIO(self.files[i].tobytes())).convert("RGB") for _ in self.views)
        return [pillow_view(image, view.params[i], self.size) for image, view in zip(opened, self.views, strict=True)]


def loader(images: Dataset, batch: int, workers: int) -> DataLoader:
    """In their order; the workers stay from one epoch to the next, which the published ones do not."""
    return DataLoader(
        images,
        batch,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="fork",
        worker_init_fn=lambda _: torch.set_num_threads(1),
    )
