"""Image views: from decoded images of any sizes to normalised network inputs, on the CPU or in Triton kernels.

`views` says what a view is, `policies` draw its parameters, `render` makes it. All ways give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbd.kernels import augment_native, augment_reference
from fastbd.kernels.views import View


@dataclass(frozen=True)
class Ragged:
    """B uint8 images [H, W, 3] of any sizes on one device, each contiguous, anywhere in its memory."""

    addresses: np.ndarray
    """int64 [B], on the host"""
    sizes: np.ndarray
    """int32 [B, 2], height and width"""
    device: torch.device
    owner: Any
    """What keeps the memory."""

    @classmethod
    def of(cls, images: Sequence[Tensor] | Tensor) -> Ragged:
        """Of tensors on one device, or of one [B, H, W, 3]; what is not contiguous is copied."""
        if isinstance(images, Tensor):
            images = images.contiguous()
            addresses = images.data_ptr() + images.stride(0) * np.arange(len(images))
            sizes = np.tile(np.array(images.shape[1:3], np.int32), (len(images), 1))
            return cls(addresses, sizes, images.device, images)
        images = [image.contiguous() for image in images]
        addresses = np.array([image.data_ptr() for image in images], np.int64)
        sizes = np.array([image.shape[:2] for image in images], np.int32).reshape(-1, 2)
        return cls(addresses, sizes, images[0].device, images)

    def __len__(self) -> int:
        return len(self.addresses)


def render(
    images: Sequence[Tensor] | Ragged,
    view: View,
    size: int,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """One view of each of B images uint8 [H, W, 3]: [B, 3, S, S] in channels_last memory, normalised in float32.

    With dtype uint8 the pixels before noise and normalisation, [B, S, S, 3]. Images on a GPU, or Ragged, go through
    the kernels; they must not change until the work that is queued is done. On the CPU, in C++ where that was compiled,
    `out` may be given, contiguous [B, S, S, 3].
    """
    if len(images) != len(view.params):
        raise ValueError(f"{len(images)} images, but parameters for {len(view.params)}")
    if not isinstance(images, Ragged):
        if not len(images) or not images[0].is_cuda:
            here = augment_native if augment_native.takes(dtype) else augment_reference
            return here.render(images, view, size, dtype, out)
        images = Ragged.of(images)
    from fastbd.kernels import augment_triton

    return augment_triton.render(images, view, size, dtype)


def normalise(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, S, S, 3] to [B, 3, S, S] in channels_last memory, with CLIP's mean and std. Computed in float32."""
    out = torch.empty(images.shape, dtype=dtype, device=images.device)
    augment_reference.normalise(images, out)
    return out.permute(0, 3, 1, 2)
