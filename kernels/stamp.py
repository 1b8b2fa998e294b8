"""Triggers put on batches of uint8 images [B, H, W, 3], in whole numbers: a CPU and a GPU give the same bytes.

A trigger is an `Overlay`, whatever it looks like, and is put on in three steps, of which each may be missing: the image
is warped, its levels go through a table, and patches are pasted or mixed in: v = clamp((keep v + add) >> 16).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

TRITON = find_spec("triton") is not None
ONE = 1 << 16  # of keep and add
STEPS = 1 << 11  # positions of a field between two pixels: 255 STEPS^2 still fits 32 bits


@dataclass(frozen=True)
class Overlay:
    """What is put on B images of H x W px; everything on their device.

    Patches of h x w px: keep and add int32, broadcast to [B, h, w, 3], keep 0 to ONE, add within 255 ONE of 0. A patch
    that only covers has keep 0; nothing is pasted without places.
    """

    keep: Tensor
    add: Tensor
    places: Tensor
    """int32 [B, n, 2]: top and left of the n places (up to four) of the patch, inside the image."""
    levels: Tensor | None = None
    """uint8 [3, 256]: what becomes of each level of each channel."""
    field: Tensor | None = None
    """int32 [H, W, 2]: row and column, in 1 / STEPS px, that each pixel is taken from; black outside."""

    def patch(self) -> tuple[Tensor, Tensor]:
        """keep and add [B, h, w, 3], without a copy."""
        keep, add = torch.broadcast_tensors(self.keep, self.add)
        shape = (len(self.places), *keep.shape[1:])
        return keep.expand(shape), add.expand(shape)


def stamp(images: Tensor, overlay: Overlay) -> Tensor:
    """New images uint8 [B, H, W, 3] with the overlay on them."""
    if images.is_cuda and TRITON:
        from fastbd.kernels.stamp_triton import stamp_triton  # triton is loaded only where it is used

        return stamp_triton(images, overlay)
    return stamp_reference(images, overlay)


def stamp_reference(images: Tensor, overlay: Overlay) -> Tensor:
    """As `stamp`, in PyTorch."""
    out = images.clone() if overlay.field is None else _warp(images, overlay.field)
    if overlay.levels is not None:
        channel = 256 * torch.arange(3, dtype=torch.int32, device=out.device)
        out = overlay.levels.flatten().index_select(0, (out + channel).flatten()).view(out.shape)
    height, width = overlay.patch()[0].shape[1:3]
    for image, places, keep, add in zip(out, overlay.places.tolist(), *overlay.patch(), strict=True):
        for top, left in places:
            covered = image[top : top + height, left : left + width]
            covered.copy_((keep * covered).add_(add).bitwise_right_shift_(16).clamp_(0, 255))
    return out


def _warp(images: Tensor, field: Tensor) -> Tensor:
    """Bilinear, truncated; black outside."""
    count, height, width, channels = images.shape
    pixels = torch.cat([images.flatten(1, 2), images.new_zeros(count, 1, channels)], 1)  # the last one is black
    (y, x), (down, across) = (field >> 11).unbind(-1), (field & (STEPS - 1)).unbind(-1)
    total = torch.zeros(images.shape, dtype=torch.int32, device=images.device)
    for row, share in ((y, STEPS - down), (y + 1, down)):
        for column, part in ((x, STEPS - across), (x + 1, across)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            taken = pixels[:, torch.where(inside, row * width + column, height * width).flatten()]
            total += (share * part)[..., None] * taken.view(images.shape)
    return (total >> 22).to(torch.uint8)
