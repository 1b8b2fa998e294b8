"""What a view of an image is: parameters for each sample, packed into one array, and the policies that draw them.

A view = operations on the stored image, a crop of it resized, a window cut out, operations on that, flip, noise,
normalisation, erasing. `fastbd.kernels.augment.render` makes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

# Codes of the operations, and what their arguments (int32 [6]) are.
NONE = 0
AFFINE = 1  # 16.16 fixed point: a, b, c of x' = a x + b y + c, then of y'; nearest, black outside
POSTERIZE = 2  # bit mask
SOLARIZE = 3  # threshold: values from it on are inverted
BRIGHTNESS = 4  # factor, bits of a float32; so are the next three
COLOR = 5
CONTRAST = 6
SHARPNESS = 7
EQUALIZE = 8
AUTOCONTRAST = 9
HUE = 10  # shift of Pillow's 8-bit hue, 0 to 255
BLUR = 11  # extended box blur, three times each way: whole radius, weight of the box and of its two ends in 2^-24

OPERATION = np.dtype([("code", "i4"), ("args", "i4", 6)])
BEFORE, AFTER = 2, 6
PARAMS = np.dtype(
    [
        ("before", OPERATION, BEFORE),
        ("box", "i4", 4),  # top, left, height, width of the crop of the stored image
        ("resized", "i4", 2),  # height and width that the crop is resized to
        ("window", "i4", 2),  # top and left of the square that is cut out of it
        ("after", OPERATION, AFTER),
        ("flip", "i4"),
        ("noise", "i4", 3),  # amplitude (bits of a float32, in 0..1; 0: none), two words of a random key
        ("erase", "i4", 4),  # top, left, height, width of a square of the mean colour
    ]
)
OFFSETS: dict[str, int] = {name: place for name, (_, place, *_) in (PARAMS.fields or {}).items()}
"""Bytes before each field of PARAMS."""


@dataclass(frozen=True)
class View:
    """How to make one view of each of B images."""

    params: np.ndarray
    """PARAMS [B]"""
    cubic: bool = True
    """Resize with Pillow's bicubic filter, else with its bilinear one."""

    def __getitem__(self, picked) -> View:
        return View(self.params[picked], self.cubic)


def plain(sizes: ArrayLike, size: int, squash: np.ndarray | bool = False) -> View:
    """The base view of images of `sizes` int [B, 2] (height, width): no operations.

    Short side to `size` (the long one rounded down, as torchvision's Resize does) and the middle cut out (its
    CenterCrop); where `squash`, both sides to `size`.
    """
    sizes = np.asarray(sizes, np.int64)
    params = np.zeros(len(sizes), PARAMS)
    params["box"][:, 2:] = sizes
    resized = size * sizes // np.minimum(sizes[:, :1], sizes[:, 1:])
    if squash is not False:
        resized = np.where(np.reshape(squash, (-1, 1)), size, resized)
    params["resized"] = resized
    params["window"] = np.rint((resized - size) / 2)  # half to even, as Python's round
    return View(params)


def operation(code: int, *args: int | float) -> np.ndarray:
    """One OPERATION; float arguments become the bits of a float32."""
    made = np.zeros((), OPERATION)
    made["code"] = code
    for place, value in enumerate(args):
        made["args"][place] = np.float32(value).view(np.int32) if isinstance(value, float) else value
    return made


def blur_args(sigma: np.ndarray) -> np.ndarray:
    """int32 [B, 3], arguments of BLUR for standard deviations in px, in float32 as Pillow's GaussianBlur has them.

    Three box blurs of fractional radius (Gwosdek et al., 2011, equations 7, 11 and 14).
    """
    f32 = np.float32
    variance = f32(sigma) ** 2 / f32(3)
    length = np.sqrt(12.0 * variance.astype(np.float64) + 1).astype(f32)
    whole = np.floor((length.astype(np.float64) - 1) / 2).astype(f32)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    radius = whole + part
    inner = radius.astype(np.int64)
    box = (f32(1 << 24) / (2 * radius + 1)).astype(np.int64)
    return np.stack([inner, box, ((1 << 24) - (2 * inner + 1) * box) // 2], -1).astype(np.int32)
