"""Second image views (AutoAugment) and normalisation, on whole batches of uint8 images [B, H, W, 3].

The policy is torchvision's `AutoAugment` with IMAGENET (Cubuk et al., arXiv 1805.09501): 25 pairs of operations,
nearest interpolation, black fill. Every operation gives the bytes that Pillow gives, its rounding included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
N_DRAWS = 5  # sub-policy; then for each of its two operations whether it fires, and its sign
BINS = 10  # magnitudes an operation can have

# (operation, probability, magnitude bin), twice. Repeated lines are in the published policy.
SUB_POLICIES = (
    (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
    (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
    (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, 0), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 0)),
    (("Posterize", 0.8, 5), ("Equalize", 1.0, 0)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, 0), ("Posterize", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 0)),
    (("Equalize", 0.0, 0), ("Equalize", 0.8, 0)),
    (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, 0)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 0)),
    (("Color", 0.4, 0), ("Equalize", 0.6, 0)),
    (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
    (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
)


@dataclass(frozen=True)
class AutoAugment:
    """What was drawn for each image: two operations in turn."""

    operation: np.ndarray  # int [B, 2], place in OPERATIONS, or -1: does not fire
    magnitude: np.ndarray  # float64 [B, 2], signed, in the operation's own unit


def normalise(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, H, W, 3] to [B, 3, H, W] in channels_last memory, with CLIP's mean and std. Computed in float32."""
    batch, height, width, channels = images.shape
    mean, std = torch.tensor([CLIP_MEAN, CLIP_STD], device=images.device)
    # Whole rows at a time: broadcasting over a last axis of 3 is three times slower.
    scale, shift = (1 / (255 * std)).repeat(width), (-mean / std).repeat(width)
    rows = (images.reshape(batch, height, width * channels) * scale).add_(shift)
    return rows.to(dtype).view(images.shape).permute(0, 3, 1, 2)


def draw_auto_augment(u: np.ndarray) -> AutoAugment:
    """Parameters from uniform draws u [B, N_DRAWS] in [0, 1)."""
    policy = (u[:, 0] * len(SUB_POLICIES)).astype(np.int64)
    fires = u[:, 1:3] <= _PROBABILITY[policy]
    sign = np.where(_SIGNED[policy] & (u[:, 3:5] < 0.5), -1.0, 1.0)
    return AutoAugment(np.where(fires, _OPERATION[policy], -1), sign * _MAGNITUDE[policy])


def auto_augment(images: Tensor, params: AutoAugment) -> Tensor:
    """uint8 [B, H, W, 3] to the same shape. Images that drew the same operation go through it together."""
    out = images.clone(memory_format=torch.contiguous_format)
    for turn in range(2):
        for place, operation in enumerate(OPERATIONS.values()):
            rows = np.flatnonzero(params.operation[:, turn] == place)
            if len(rows):
                magnitude = torch.from_numpy(params.magnitude[rows, turn]).to(images.device)
                rows = torch.from_numpy(rows).to(images.device)
                out[rows] = operation.apply(out[rows], magnitude)
    return out


# The operations: uint8 [G, H, W, 3] and float64 magnitudes [G] to new uint8 [G, H, W, 3].


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    return images & (256 - 2 ** (8 - bits)).to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    bright = images >= threshold.ceil().to(torch.uint8).view(-1, 1, 1, 1)
    return images ^ (255 * bright.to(torch.uint8))


def invert(images: Tensor, _: Tensor) -> Tensor:
    return ~images


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    count, height, width, channels = images.shape
    rows = images.view(count, height, width * channels)
    low = rows.amin(1).view(count, width, channels).amin(1)[..., None].double()
    high = rows.amax(1).view(count, width, channels).amax(1)[..., None].double()
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)  # `255 / x` would be 255 * (1 / x), rounded twice
    levels = torch.arange(256, device=images.device)
    table = (levels * scale - low * scale).clamp(0, 255)
    return _look_up(images, torch.where(high > low, table, levels))


def equalize(images: Tensor, _: Tensor) -> Tensor:
    count = images.shape[0]
    histogram = torch.bincount(_table_index(images), minlength=count * 3 * 256).view(count, 3, 256)
    below = histogram.cumsum(-1) - histogram
    levels = torch.arange(256, device=images.device)
    brightest = (levels * (histogram > 0)).amax(-1, keepdim=True)
    step = below.gather(-1, brightest) // 255
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return _look_up(images, torch.where(step > 0, table, levels))


def color(images: Tensor, magnitude: Tensor) -> Tensor:
    return _blend(_grey(images)[..., None], images, magnitude)


def contrast(images: Tensor, magnitude: Tensor) -> Tensor:
    grey = _grey(images)
    pixels = grey[0].numel()
    mean = ((2 * grey.sum((1, 2)) + pixels) // (2 * pixels)).view(-1, 1, 1)  # rounded half up
    levels = torch.arange(256, device=images.device).view(1, 1, 256)
    return _look_up(images, _blend(mean, levels, magnitude).expand(-1, 3, -1))


def sharpness(images: Tensor, magnitude: Tensor) -> Tensor:
    smooth = images.clone()  # the border stays as it is
    if min(images.shape[1:3]) >= 3:
        x = images.short()
        columns = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
        weighted = columns[:, :, :-2] + columns[:, :, 1:-1] + columns[:, :, 2:] + 4 * x[:, 1:-1, 1:-1]
        smooth[:, 1:-1, 1:-1] = (weighted / 13 + 0.5).to(torch.uint8)
    return _blend(smooth, images, magnitude)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Counter-clockwise, about the centre."""
    cos, sin = torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()
    y, x = images.shape[1] / 2, images.shape[2] / 2
    return _warp(images, (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y))


def shear_x(images: Tensor, magnitude: Tensor) -> Tensor:
    """Row y moves left by magnitude * y: the top row stays."""
    zero, one = torch.zeros_like(magnitude), torch.ones_like(magnitude)
    return _warp(images, (one, magnitude, zero), (zero, one, zero))


def _grey(images: Tensor) -> Tensor:
    """Pillow's luma (ITU-R 601 in 16-bit fixed point), int32 [G, H, W]."""
    red, green, blue = images.int().unbind(-1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _blend(degenerate: Tensor, images: Tensor, magnitude: Tensor) -> Tensor:
    """degenerate + (1 + magnitude) (images - degenerate) in float32, clipped and truncated like Pillow's blend."""
    factor = (1 + magnitude).float().view(-1, *[1] * (images.ndim - 1))
    return (degenerate.float() + factor * (images.float() - degenerate.float())).clamp(0, 255).to(torch.uint8)


def _table_index(images: Tensor) -> Tensor:
    """int32 [G * H * W * 3]: where each value stands in a flattened table [G, 3, 256]."""
    count, height, width, channels = images.shape
    image = torch.arange(count, dtype=torch.int32, device=images.device).view(-1, 1, 1) * (3 * 256)
    channel = torch.arange(channels, dtype=torch.int32, device=images.device).repeat(width) * 256
    return (images.view(count, height, width * channels) + (image + channel)).flatten()


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """Replace each value by its entry in table [G, 3, 256]."""
    return table.to(torch.uint8).flatten().index_select(0, _table_index(images)).view(images.shape)


def _warp(images: Tensor, across: tuple[Tensor, ...], down: tuple[Tensor, ...]) -> Tensor:
    """Each pixel from the nearest one at x' = a x + b y + c (`across`) and y' likewise (`down`); black outside.

    Pillow steps through the source in 16.16 fixed point; so does this, which makes every pixel agree.
    """
    count, height, width, channels = images.shape

    def source(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        a, b, c = ((65536 * v + 0.5).floor().int().view(-1, 1, 1) for v in (a, b, c + a / 2 + b / 2))
        x = torch.arange(width, dtype=torch.int32, device=images.device)
        y = torch.arange(height, dtype=torch.int32, device=images.device)[:, None]
        return (c + b * y + a * x) >> 16

    x, y = source(*across), source(*down)
    first = torch.arange(count, dtype=torch.int32, device=images.device).view(-1, 1, 1) * (height * width)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = torch.where(inside, first + y * width + x, count * height * width)
    pixels = torch.cat([images.reshape(-1, channels), images.new_zeros(1, channels)])  # the last one is black
    return pixels.index_select(0, index.flatten()).view(images.shape)


@dataclass(frozen=True)
class Operation:
    apply: Callable[[Tensor, Tensor], Tensor]
    magnitudes: tuple[float, ...] = (0.0,) * BINS
    signed: bool = False


def _range(start: float, end: float) -> tuple[float, ...]:
    return tuple(torch.linspace(start, end, BINS).tolist())  # float32, as torchvision's


OPERATIONS = {
    "Posterize": Operation(posterize, tuple(8 - round(4 * i / (BINS - 1)) for i in range(BINS))),
    "Solarize": Operation(solarize, _range(255, 0)),
    "Invert": Operation(invert),
    "AutoContrast": Operation(autocontrast),
    "Equalize": Operation(equalize),
    "Color": Operation(color, _range(0, 0.9), signed=True),
    "Contrast": Operation(contrast, _range(0, 0.9), signed=True),
    "Sharpness": Operation(sharpness, _range(0, 0.9), signed=True),
    "Rotate": Operation(rotate, _range(0, 30), signed=True),
    "ShearX": Operation(shear_x, _range(0, 0.3), signed=True),
}

# The policy as arrays [25, 2].
_OPERATION = np.array([[list(OPERATIONS).index(name) for name, _, _ in pair] for pair in SUB_POLICIES])
_PROBABILITY = np.array([[probability for _, probability, _ in pair] for pair in SUB_POLICIES])
_MAGNITUDE = np.array([[OPERATIONS[name].magnitudes[i] for name, _, i in pair] for pair in SUB_POLICIES], np.float64)
_SIGNED = np.array([[OPERATIONS[name].signed for name, _, _ in pair] for pair in SUB_POLICIES])
