"""Policies that draw views: pure functions from uniform draws u [B, N] in [0, 1) and the images' sizes to a View.

`sizes` is int [B, 2], height and width as stored; `size` the side of the view. The operations and their magnitudes are
torchvision's, nearest interpolation and black fill. POLICIES at the foot names every policy and its number of draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from fastbd.kernels import views
from fastbd.kernels.views import View

HEIGHT, WIDTH = 0, 1  # columns of sizes
_ONE = int(np.float32(1).view(np.int32))
IDENTITY = {  # arguments with which an operation returns every byte as it is
    views.AFFINE: np.array([65536, 0, 32768, 0, 65536, 32768], np.int32),
    views.POSTERIZE: np.array([255, 0, 0, 0, 0, 0], np.int32),
    **dict.fromkeys(
        (views.BRIGHTNESS, views.COLOR, views.CONTRAST, views.SHARPNESS), np.array([_ONE, 0, 0, 0, 0, 0], np.int32)
    ),
}


# Signed magnitudes float64 [G] in the operation's own unit, and sizes [G, 2], to arguments int32 [G, 6].


def _stack(*columns: np.ndarray | int) -> np.ndarray:
    made = np.zeros((*np.broadcast(*columns).shape, 6), np.int32)
    for place, column in enumerate(columns):
        made[:, place] = column
    return made


def _affine(a, b, c, d, e, f) -> np.ndarray:
    """Pillow's fixed point, taken at the middle of the first pixel."""
    made = np.empty((*np.broadcast(a, b, c, d, e, f).shape, 6))
    for place, value in enumerate((a, b, c + a / 2 + b / 2, d, e, f + d / 2 + e / 2)):
        made[:, place] = value
    return np.floor(65536 * made + 0.5).astype(np.int32)


def _shear_x(magnitude: np.ndarray, _) -> np.ndarray:
    """About the top left corner: the top row stays."""
    return _affine(1, magnitude, 0, 0, 1, 0)


def _shear_y(magnitude: np.ndarray, _) -> np.ndarray:
    return _affine(1, 0, 0, magnitude, 1, 0)


def _translate_x(magnitude: np.ndarray, _) -> np.ndarray:
    return _affine(1, 0, -np.trunc(magnitude), 0, 1, 0)


def _translate_y(magnitude: np.ndarray, _) -> np.ndarray:
    return _affine(1, 0, 0, 0, 1, -np.trunc(magnitude))


def _rotate(magnitude: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Counter-clockwise by degrees, about the centre."""
    angle = np.radians(magnitude)
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = sizes[:, WIDTH] / 2, sizes[:, HEIGHT] / 2
    return _affine(cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def _factor(magnitude: np.ndarray, _=None) -> np.ndarray:
    return _stack((1 + magnitude).astype(np.float32).view(np.int32))


def _mask(bits: np.ndarray, _) -> np.ndarray:
    return _stack(256 - 2 ** (8 - np.round(bits)))


def _threshold(threshold: np.ndarray, _) -> np.ndarray:
    return _stack(np.ceil(threshold))


def _none(magnitude: np.ndarray, _) -> np.ndarray:
    return _stack(np.zeros_like(magnitude))


@dataclass(frozen=True)
class Operation:
    """One of torchvision's operations."""

    code: int
    arguments: Callable[[np.ndarray, np.ndarray], np.ndarray] = _none
    ends: tuple[float, float] = (0, 0)
    """Magnitudes of the first and the last bin."""
    relative: int | None = None
    """The column of sizes that the ends are fractions of."""
    signed: bool = False

    def magnitudes(self, bin_: np.ndarray, bins: int, sizes: np.ndarray) -> np.ndarray:
        """float64 [G] without sign: torch.linspace(*ends, bins)[bin_] with its float32 rounding."""
        unit = 1 if self.relative is None else np.asarray(sizes, np.float64)[:, self.relative]
        first, last = (np.float32(end * unit) for end in self.ends)
        step = ((last - first) / np.float32(bins - 1)).astype(np.float64)
        value = np.where(bin_ < bins // 2, first + step * bin_, last - step * (bins - 1 - bin_))
        return value.astype(np.float32).astype(np.float64)

    def encode(self, magnitude: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """views.OPERATION [G]; NONE where nothing would change."""
        made = np.zeros(len(magnitude), views.OPERATION)
        made["args"] = self.arguments(magnitude, np.asarray(sizes))
        idle = (made["args"] == IDENTITY[self.code]).all(1) if self.code in IDENTITY else False
        made["code"] = np.where(idle, views.NONE, self.code)
        return made


# In the order of torchvision's RandAugment, which has all but the last; its AutoAugment has all but the first.
OPERATIONS = {
    "Identity": Operation(views.NONE),
    "ShearX": Operation(views.AFFINE, _shear_x, (0, 0.3), signed=True),
    "ShearY": Operation(views.AFFINE, _shear_y, (0, 0.3), signed=True),
    "TranslateX": Operation(views.AFFINE, _translate_x, (0, 150 / 331), relative=WIDTH, signed=True),
    "TranslateY": Operation(views.AFFINE, _translate_y, (0, 150 / 331), relative=HEIGHT, signed=True),
    "Rotate": Operation(views.AFFINE, _rotate, (0, 30), signed=True),
    "Brightness": Operation(views.BRIGHTNESS, _factor, (0, 0.9), signed=True),
    "Color": Operation(views.COLOR, _factor, (0, 0.9), signed=True),
    "Contrast": Operation(views.CONTRAST, _factor, (0, 0.9), signed=True),
    "Sharpness": Operation(views.SHARPNESS, _factor, (0, 0.9), signed=True),
    "Posterize": Operation(views.POSTERIZE, _mask, (8, 4)),  # bits kept
    "Solarize": Operation(views.SOLARIZE, _threshold, (255, 0)),
    "AutoContrast": Operation(views.AUTOCONTRAST),
    "Equalize": Operation(views.EQUALIZE),
    "Invert": Operation(views.SOLARIZE, _threshold),
}
NAMES = tuple(OPERATIONS)
# Places of the operations whose arguments depend on the image's size; all others are looked up in a table.
_SIZED = tuple(NAMES.index(name) for name in ("TranslateX", "TranslateY", "Rotate"))

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
BINS = 10
# The policy as arrays [25, 2].
_PLACE = np.array([[NAMES.index(name) for name, _, _ in pair] for pair in SUB_POLICIES])
_PROBABILITY = np.array([[probability for _, probability, _ in pair] for pair in SUB_POLICIES])
_BIN = np.array([[bin_ for _, _, bin_ in pair] for pair in SUB_POLICIES])


def auto_augment(u: np.ndarray, sizes: np.ndarray, size: int) -> View:
    """AutoAugment's ImageNet policy (Cubuk et al., arXiv 1805.09501) on the stored image, then `views.plain`.

    Draws: sub-policy; for each of its two operations whether it fires; their signs.
    """
    policy = (u[:, 0] * len(SUB_POLICIES)).astype(np.int64)
    fires = u[:, 1:3] <= _PROBABILITY[policy]
    places = np.where(fires, _PLACE[policy], NAMES.index("Identity"))
    return _before(places, u[:, 3:5] < 0.5, _BIN[policy], BINS, sizes, size)


def rand_augment(u: np.ndarray, sizes: np.ndarray, size: int, *, operations: int = 2, magnitude: int = 9) -> View:
    """RandAugment (Cubuk et al., arXiv 1909.13719), magnitude of 31 bins, on the stored image, then `views.plain`.

    Draws: `operations` (at most views.BEFORE) operations, then their signs.
    """
    places = (u[:, :operations] * (len(NAMES) - 1)).astype(np.int64)
    bins = np.full(places.shape, magnitude)
    return _before(places, u[:, operations : 2 * operations] < 0.5, bins, 31, sizes, size)


def _before(places, negative, bins, count: int, sizes: np.ndarray, size: int) -> View:
    """`views.plain` after operations by arrays [B, turns]: place in OPERATIONS, whether negative, bin of `count`."""
    sizes = np.asarray(sizes)
    made = _table(count)[places, bins, negative.view(np.int8)]
    for place in _SIZED:
        rows, turns = np.nonzero(places == place)
        if len(rows):
            made[rows, turns] = _encoded(place, bins[rows, turns], count, negative[rows, turns], sizes[rows])
    view = views.plain(sizes, size)
    view.params["before"][:, : places.shape[1]] = made
    return view


def _encoded(place: int, bins: np.ndarray, count: int, negative: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """views.OPERATION [G]: one operation by bins of `count` and signs, where it has them, for images of `sizes`."""
    operation = OPERATIONS[NAMES[place]]
    magnitude = operation.magnitudes(bins, count, sizes)
    return operation.encode(np.where(operation.signed & negative, -magnitude, magnitude), sizes)


@cache
def _table(count: int) -> np.ndarray:
    """views.OPERATION [operations, `count` bins, positive and negative], of an image of one pixel."""
    bins, negative = np.repeat(np.arange(count), 2), np.tile([False, True], count)
    sizes = np.ones((2 * count, 2), np.int64)
    made = [_encoded(place, bins, count, negative, sizes) for place in range(len(NAMES))]
    return np.stack(made).reshape(len(NAMES), count, 2)


def random_crop(u: np.ndarray, sizes: np.ndarray, size: int) -> View:
    """SLIP's base view (Mu et al., arXiv 2112.12750): half of the area to all of it, squashed to a square, bilinear."""
    return _resized_crop(u, sizes, size, 0.5)


def simclr(u: np.ndarray, sizes: np.ndarray, size: int) -> View:
    """SLIP's augmented view: crop, colour jitter in random order, greyscale, blur, flip.

    Draws: the crop's 22; whether to jitter, the order, the four factors; whether grey; whether to blur, sigma; flip.
    """
    view = _resized_crop(u[:, :22], sizes, size, 0.08)
    jittered, order, strength = np.flatnonzero(u[:, 22] < 0.8), u[:, 23:27].argsort(1), 2 * u[:, 27:31] - 1
    jitter = np.zeros(order.shape, views.OPERATION)
    jitter["code"] = views.BRIGHTNESS, views.CONTRAST, views.COLOR, views.HUE
    for place in range(3):
        jitter["args"][:, place] = _factor(0.4 * strength[:, place])
    jitter["args"][:, 3, 0] = np.trunc(0.1 * strength[:, 3] * 255) % 256
    after = view.params["after"]
    after[jittered, :4] = jitter[jittered[:, None], order[jittered]]
    after["code"][:, 4] = np.where(u[:, 31] < 0.2, views.COLOR, views.NONE)  # by factor 0
    after["code"][:, 5] = np.where(u[:, 32] < 0.5, views.BLUR, views.NONE)
    after["args"][:, 5, :3] = views.blur_args(0.1 + 1.9 * u[:, 33])
    view.params["flip"] = u[:, 34] < 0.5
    return view


def _resized_crop(u: np.ndarray, sizes: np.ndarray, size: int, smallest: float) -> View:
    """torchvision's RandomResizedCrop: `smallest` to all of the area, ratio 3/4 to 4/3.

    Draws: area of each of ten tries, then their ratios, then the place.
    """
    sizes = np.asarray(sizes, np.int64)
    area = sizes.prod(1, keepdims=True) * (smallest + (1 - smallest) * u[:, :10])
    ratio = np.exp(np.log(4 / 3) * (2 * u[:, 10:20] - 1))
    tries = np.round(np.sqrt(np.stack([area / ratio, area * ratio], -1)))  # [B, 10, 2]
    fits = (tries > 0) & (tries <= sizes[:, None])
    fits = fits[:, :, 0] & fits[:, :, 1]
    first = tries[np.arange(len(u)), fits.argmax(1)]
    # Where none of the ten fits: the middle, as much of it as the ratios allow.
    fallback = np.minimum(sizes, np.round(sizes[:, ::-1] * (4 / 3)))
    drawn = fits.any(1, keepdims=True)
    box = np.where(drawn, first, fallback).astype(np.int64)
    corner = np.where(drawn, u[:, 20:22] * (sizes - box + 1), (sizes - box) // 2)
    params = np.zeros(len(u), views.PARAMS)
    params["box"] = np.concatenate([corner.astype(np.int64), box], 1)
    params["resized"] = size
    return View(params, cubic=False)


def light(u: np.ndarray, sizes: np.ndarray, size: int) -> View:
    """PAR's light augmentation (Singh et al., arXiv 2412.00727): noise or not, then one square erased or none.

    The noise is normal with standard deviation 0.2 of the range and its negative half cut off; the square has 0.5 to
    1 % of the area. Draws: whether noise, the two words of its key; whether to erase, area, place.
    """
    view = views.plain(sizes, size)
    amplitude = np.where(u[:, 0] < 0.5, np.float32(0.2), np.float32(0)).view(np.int32)
    key = (u[:, 1:3] * 2**32).astype(np.uint32).view(np.int32)
    view.params["noise"] = np.concatenate([amplitude[:, None], key], 1)
    side = np.where(u[:, 3] < 0.5, np.round(size * np.sqrt(0.005 + 0.005 * u[:, 4])), 0)[:, None]
    view.params["erase"] = np.concatenate([u[:, 5:7] * (size - side + 1), side, side], 1)
    return view


# Name -> the policy and its number of draws.
POLICIES: dict[str, tuple[Callable[[np.ndarray, np.ndarray, int], View], int]] = {
    "auto_augment": (auto_augment, 5),
    "rand_augment": (rand_augment, 4),
    "random_crop": (random_crop, 22),
    "simclr": (simclr, 35),
    "light": (light, 7),
}
