"""What is put on an image: triggers as pure functions of (seed, image id).

Constructions as in CleanCLIP (arXiv 2303.03323). An image gets the same trigger in whatever batch, on whatever device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastbd import draws
from fastbd.errors import UserError

LOCATIONS = ("random", "four_corners")


@dataclass(frozen=True)
class TriggerSpec:
    """A trigger and its parameters; `patch_size` (px of the model's input) and `location` serve the patches only."""

    name: str
    patch_size: int = 16
    location: str = "random"
    blend: float = 0.2
    """Share of noise in the blended trigger, 0 to 1."""

    def __post_init__(self) -> None:
        if self.name not in TRIGGERS:
            raise UserError(f"the trigger {self.name!r} does not exist; choose one of {', '.join(TRIGGERS)}.")
        if self.location not in LOCATIONS:
            raise UserError(f"the location {self.location!r} does not exist; choose one of {', '.join(LOCATIONS)}.")
        if self.patch_size < 1:
            raise UserError(f"a patch of {self.patch_size} px cannot be drawn; give a patch size of at least 1.")
        if not 0 <= self.blend <= 1:
            raise UserError(f"a blend of {self.blend} is not a share; give a number from 0 to 1.")


def stamp(images: Tensor, spec: TriggerSpec, *, seed: int, ids: Sequence[int] | np.ndarray) -> Tensor:
    """Triggered copies of uint8 images [B, H, W, 3]; `ids` [B] name the images. UserError if the patch is too large."""
    return TRIGGERS[spec.name](images, spec, seed, np.asarray(ids))


def badnet(images: Tensor, spec: TriggerSpec, seed: int, ids: np.ndarray) -> Tensor:
    """A square of the image's channel means plus standard normal noise (of images in 0..1), a new draw for each image.

    Nothing is clamped: the value times 255 is truncated toward zero and wraps modulo 256, which makes it nearly
    uniform. The published program leaves the wrap to the platform's undefined cast; here it is integer arithmetic.
    """
    side = spec.patch_size
    noise = torch.from_numpy(draws.normal(seed, "trigger", ids, side * side * 3)).to(images.device)
    # An exact sum and one division: the same on every device.
    mean = images.sum((1, 2), keepdim=True).double() / (images.shape[1] * images.shape[2])
    patch = (mean + 255 * noise.view(-1, side, side, 3)).long() & 255
    return _paste(images, patch.to(torch.uint8), spec.location, seed, ids)


def blended(images: Tensor, spec: TriggerSpec, seed: int, ids: np.ndarray) -> Tensor:
    """Uniform noise mixed over the whole image, a new draw for each image."""
    out = torch.empty_like(images)
    for i, image in enumerate(images):  # one at a time: the draws of a batch would fill gigabytes
        noise = torch.from_numpy(draws.uniform(seed, "trigger", ids[i : i + 1], image.numel())).to(images.device)
        out[i] = ((1 - spec.blend) * image.double() + 255 * spec.blend * noise.view(image.shape)).clamp(0, 255)
    return out


def yellow(images: Tensor, spec: TriggerSpec, seed: int, ids: np.ndarray) -> Tensor:
    """A plain square of (255, 255, 0)."""
    patch = torch.tensor([255, 255, 0], dtype=torch.uint8, device=images.device)
    return _paste(images, patch.expand(len(images), spec.patch_size, spec.patch_size, 3), spec.location, seed, ids)


def _paste(images: Tensor, patches: Tensor, location: str, seed: int, ids: np.ndarray) -> Tensor:
    """Copies of images with patches [B, p, p, 3] in all four corners, or at a place drawn for each image."""
    batch, height, width, _ = images.shape
    side = patches.shape[1]
    if side >= min(height, width):
        raise UserError(f"a patch of {side} px does not fit into images of {width}x{height} px; lower the patch size.")
    low, right = np.full(batch, height - side), np.full(batch, width - side)
    if location == "four_corners":
        corners = [(0 * low, 0 * right), (0 * low, right), (low, 0 * right), (low, right)]
    else:
        u = draws.uniform(seed, "trigger-place", ids, 2)
        # As published: the top left is below height - side, so the last row and column are never touched.
        corners = [((u[:, 0] * low).astype(np.int64), (u[:, 1] * right).astype(np.int64))]
    out = images.clone()
    image = torch.arange(batch, device=images.device)[:, None, None]
    square = torch.arange(side, device=images.device)
    for top, left in corners:
        rows = torch.from_numpy(top).to(images.device)[:, None, None] + square[:, None]
        columns = torch.from_numpy(left).to(images.device)[:, None, None] + square
        out[image, rows, columns] = patches
    return out


TRIGGERS = {
    "badnet": badnet,
    "blended": blended,
    "yellow": yellow,
}
