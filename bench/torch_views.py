"""Base view and AutoAugment view in ordinary PyTorch operations, for images of one size: what fused kernels replace.

Images with the same operation go through it together, as a batched augmentation library has them. The resize is
PyTorch's antialiased one in float32, so a level here and there differs from the 8-bit one.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbd.kernels import views
from fastbd.kernels.augment_reference import autocontrast_tables, equalize_tables
from fastbd.kernels.constants import normalisation
from fastbd.kernels.views import View

# images uint8 [G, 3, H, W], arguments [G, 6] int32 -> the same shape


def affine(x: Tensor, args: Tensor) -> Tensor:
    height, width = x.shape[2:]
    a, b, c, d, e, f = (v.view(-1, 1, 1) for v in args.unbind(1))
    column = torch.arange(width, dtype=torch.int32, device=x.device)
    row = torch.arange(height, dtype=torch.int32, device=x.device)[:, None]
    from_x, from_y = (c + b * row + a * column) >> 16, (f + e * row + d * column) >> 16
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    index = torch.where(inside, from_y * width + from_x, 0).flatten(1)[:, None].expand(-1, 3, -1).long()
    return x.flatten(2).gather(2, index).view_as(x) * inside[:, None]


def posterize(x: Tensor, args: Tensor) -> Tensor:
    return x & args[:, :1, None, None].to(torch.uint8)


def solarize(x: Tensor, args: Tensor) -> Tensor:
    return torch.where(x >= args[:, :1, None, None], 255 - x, x)


def color(x: Tensor, args: Tensor) -> Tensor:
    return blend(grey(x), x, args)


def contrast(x: Tensor, args: Tensor) -> Tensor:
    return blend((grey(x).float().mean((2, 3), keepdim=True) + 0.5).floor(), x, args)


def sharpness(x: Tensor, args: Tensor) -> Tensor:
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=x.device).expand(3, 1, 3, 3) / 13
    smooth = x.float()
    smooth[:, :, 1:-1, 1:-1] = (F.conv2d(x.float(), kernel, groups=3) + 0.5).floor()
    return blend(smooth, x, args)


def equalize(x: Tensor, _: Tensor) -> Tensor:
    return looked_up(x, equalize_tables(histograms(x)))


def autocontrast(x: Tensor, _: Tensor) -> Tensor:
    return looked_up(x, autocontrast_tables(histograms(x)))


def grey(x: Tensor) -> Tensor:
    red, green, blue = x.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16)[:, None]


def blend(other: Tensor, x: Tensor, args: Tensor) -> Tensor:
    factor = args[:, :1, None, None].view(torch.float32)
    return (other + factor * (x.float() - other)).clamp(0, 255).to(torch.uint8)


def histograms(x: Tensor) -> Tensor:
    flat = x.flatten(2).flatten(0, 1).long()
    counts = torch.zeros(len(flat), 256, dtype=torch.int64, device=x.device)
    return counts.scatter_add_(1, flat, torch.ones_like(flat)).view(len(x), 3, 256)


def looked_up(x: Tensor, tables: Tensor) -> Tensor:
    return tables.gather(2, x.flatten(2).long()).view_as(x)


OPERATIONS = {
    views.AFFINE: affine,
    views.POSTERIZE: posterize,
    views.SOLARIZE: solarize,
    views.COLOR: color,
    views.CONTRAST: contrast,
    views.SHARPNESS: sharpness,
    views.EQUALIZE: equalize,
    views.AUTOCONTRAST: autocontrast,
}


def two_views(images: Tensor, second: View, size: int, dtype: torch.dtype, compiled: bool):
    """A call that gives both views [B, 3, S, S] of uint8 images [B, H, W, 3]; parameters are on the device already."""
    wrap = torch.compile if compiled else lambda f: f
    x = images.permute(0, 3, 1, 2).contiguous()
    groups = []
    for turn in second.params["before"].T:
        for code in np.unique(turn["code"][turn["code"] > 0]):
            rows = np.flatnonzero(turn["code"] == code)
            args = torch.from_numpy(turn["args"][rows].copy()).to(x.device)
            groups.append((wrap(OPERATIONS[int(code)]), torch.from_numpy(rows).to(x.device), args))
    shape, (top, left) = second.params["resized"][0].tolist(), second.params["window"][0].tolist()
    scale, shift = (v.view(3, 1, 1) for v in normalisation(x.device))

    @wrap
    def fit(pixels: Tensor) -> Tensor:
        resized = F.interpolate(pixels.float(), shape, mode="bicubic", antialias=True).round().clamp(0, 255)
        window = resized[:, :, top : top + size, left : left + size]
        return (window * scale + shift).to(dtype, memory_format=torch.channels_last)

    def call() -> tuple[Tensor, Tensor]:
        augmented = x.clone()
        for operation, rows, args in groups:
            augmented[rows] = operation(augmented[rows], args)
        return fit(x), fit(augmented)

    return call
