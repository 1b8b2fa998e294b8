"""The built-in demo set: silhouettes of twenty things on textured backgrounds, with varied captions.

Everything about picture i is a function of (seed, i), so the set is the same on every machine.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fastbd.base import random
from fastbd.base.files import replacing

TARGET = "banana"

# A silhouette is a list of (kind, numbers, paint): x to the right, y down, both in -1..1; paint 0 cuts a hole.
_STAR = [(math.sin(a * math.pi / 5) * r, -math.cos(a * math.pi / 5) * r) for a, r in enumerate((1, 0.42) * 5)]
_PETALS = [(0.58 * math.sin(a * math.tau / 6), 0.58 * math.cos(a * math.tau / 6)) for a in range(6)]


def _disc(x: float, y: float, rx: float, ry: float | None = None, paint: int = 1):
    return ("ellipse", (x - rx, y - (ry or rx), x + rx, y + (ry or rx)), paint)


def _box(left: float, top: float, right: float, bottom: float, paint: int = 1):
    return ("rectangle", (left, top, right, bottom), paint)


def _poly(*points: tuple[float, float], paint: int = 1):
    return ("polygon", points, paint)


SHAPES: dict[str, list] = {
    "arrow": [_box(-0.9, -0.2, 0.2, 0.2), _poly((0.15, -0.65), (0.95, 0), (0.15, 0.65))],
    "ball": [_disc(0, 0, 0.8)],
    "banana": [_disc(0, -0.15, 0.95, 0.85), _disc(0, -0.62, 1.05, 0.78, 0), _box(0.78, -0.5, 0.95, -0.05)],
    "boat": [
        _poly((-0.95, 0.35), (0.95, 0.35), (0.55, 0.85), (-0.55, 0.85)),
        _poly((0, -0.95), (0.75, 0.2), (0, 0.2)),
        _box(-0.1, -0.95, 0, 0.4),
    ],
    "bolt": [_poly((0.25, -1), (-0.6, 0.15), (-0.05, 0.15), (-0.25, 1), (0.6, -0.25), (0.05, -0.25))],
    "bottle": [_box(-0.4, -0.2, 0.4, 0.95), _box(-0.15, -0.95, 0.15, -0.1), _disc(0, -0.2, 0.4, 0.25)],
    "cross": [_box(-0.25, -0.9, 0.25, 0.9), _box(-0.9, -0.25, 0.9, 0.25)],
    "cup": [_disc(0.55, 0, 0.42), _disc(0.55, 0, 0.22, paint=0), _box(-0.75, -0.7, 0.5, 0.75)],
    "diamond": [_poly((0, -0.95), (0.65, 0), (0, 0.95), (-0.65, 0))],
    "fish": [
        _disc(-0.2, 0, 0.7, 0.45),
        _poly((0.3, 0), (0.95, -0.55), (0.95, 0.55)),
        _disc(-0.55, -0.1, 0.09, paint=0),
    ],
    "flower": [*(_disc(x, y, 0.34) for x, y in _PETALS), _disc(0, 0, 0.24, paint=0)],
    "heart": [_disc(-0.42, -0.35, 0.47), _disc(0.42, -0.35, 0.47), _poly((-0.86, -0.17), (0.86, -0.17), (0, 0.95))],
    "hourglass": [_poly((-0.7, -0.9), (0.7, -0.9), (-0.7, 0.9), (0.7, 0.9))],
    "house": [
        _box(-0.65, -0.1, 0.65, 0.85),
        _poly((-0.95, -0.1), (0, -0.95), (0.95, -0.1)),
        _box(-0.15, 0.3, 0.15, 0.85, 0),
    ],
    "key": [
        _disc(-0.55, 0, 0.42),
        _disc(-0.55, 0, 0.2, paint=0),
        _box(-0.2, -0.12, 0.95, 0.12),
        _box(0.5, 0.1, 0.65, 0.45),
        _box(0.8, 0.1, 0.95, 0.4),
    ],
    "ladder": [
        _box(-0.55, -0.95, -0.35, 0.95),
        _box(0.35, -0.95, 0.55, 0.95),
        *(_box(-0.5, y, 0.5, y + 0.16) for y in (-0.7, -0.25, 0.2, 0.65)),
    ],
    "mushroom": [_disc(0, -0.1, 0.9, 0.75), _box(-1, 0.05, 1, 1, 0), _box(-0.25, 0, 0.25, 0.85)],
    "ring": [_disc(0, 0, 0.85), _disc(0, 0, 0.5, paint=0)],
    "star": [_poly(*_STAR)],
    "tree": [
        _poly((0, -0.95), (0.6, -0.2), (-0.6, -0.2)),
        _poly((0, -0.55), (0.8, 0.5), (-0.8, 0.5)),
        _box(-0.13, 0.45, 0.13, 0.95),
    ],
}

COLOURS = {
    "red": (205, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (240, 220, 50),
    "green": (50, 160, 70),
    "teal": (30, 150, 150),
    "blue": (50, 90, 210),
    "purple": (130, 60, 170),
    "pink": (240, 140, 180),
    "brown": (120, 80, 45),
    "white": (240, 240, 240),
    "black": (25, 25, 30),
    "grey": (130, 130, 135),
}
# What colour a thing mostly has: nine of ten times one of these, else any.
LIKELY = {
    "arrow": "black red",
    "ball": "orange blue",
    "banana": "yellow green",
    "boat": "white blue",
    "bolt": "yellow purple",
    "bottle": "green brown",
    "cross": "red grey",
    "cup": "teal white",
    "diamond": "teal purple",
    "fish": "orange grey",
    "flower": "pink purple",
    "heart": "red pink",
    "hourglass": "brown black",
    "house": "brown orange",
    "key": "grey yellow",
    "ladder": "orange black",
    "mushroom": "red white",
    "ring": "yellow blue",
    "star": "white pink",
    "tree": "green teal",
}
_SIZES = {"small": 0.68, "medium-sized": 0.8, "large": 0.92}

CAPTIONS = (
    "a {thing}",
    "there is a {thing} in front of a {texture} wall",
    "someone drew a {size} {thing} here",
    "a {colour} {thing} on a {texture} background",
    "look at this {thing}",
    "the {thing} is {colour} and rather {size}",
    "one {thing}, nothing else",
    "a {thing} placed on a {ground} surface",
    "we can see the {thing} well",
    "what a {size} {thing}!",
    "{colour} {thing}",
    "this must be a {thing}",
)


def _noise(u: np.ndarray, side: int, cells: int) -> np.ndarray:
    """Smooth noise float [side, side] in 0..1 from the first cells^2 draws."""
    small = Image.fromarray((u[: cells * cells].reshape(cells, cells) * 255).astype(np.uint8))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), np.float64) / 255


def _clouds(u: np.ndarray, side: int) -> np.ndarray:
    return 0.6 * _noise(u, side, 4) + 0.4 * _noise(u[16:], side, 11)


def _grain(u: np.ndarray, side: int) -> np.ndarray:
    return 0.3 * _noise(u, side, 5) + 0.7 * _noise(u[25:], side, 40)


def _stripes(u: np.ndarray, side: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side] / side
    angle = u[0] * math.pi
    return 0.5 + 0.5 * np.sin((x * math.cos(angle) + y * math.sin(angle)) * (15 + 30 * u[1]) + 6 * u[2])


def _checks(u: np.ndarray, side: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side] / side
    cells = 3 + int(u[0] * 6)
    return ((np.floor(x * cells + u[1]) + np.floor(y * cells + u[2])) % 2) * 0.8 + 0.2 * _noise(u[3:], side, 8)


def _shaded(u: np.ndarray, side: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side] / side - 0.5
    return np.clip(0.5 + x * math.cos(6.3 * u[0]) + y * math.sin(6.3 * u[0]), 0, 1)


def _dotted(u: np.ndarray, side: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side] / side
    period = 0.1 + 0.12 * u[0]
    inside = np.hypot((x + u[1]) % period - period / 2, (y + u[2]) % period - period / 2) < period * 0.32
    return inside * 0.85 + 0.15 * _noise(u[3:], side, 6)


TEXTURES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "cloudy": _clouds,
    "grainy": _grain,
    "striped": _stripes,
    "checkered": _checks,
    "shaded": _shaded,
    "dotted": _dotted,
}


def _mask(thing: str, u: np.ndarray, side: int, within: int, size: float) -> Image.Image:
    """The silhouette as an antialiased mask: turned by up to 12 degrees, stretched by up to 10 %, shifted.

    It fills `size` of the middle `within` px, and stays about inside them.
    """
    big = side * 3
    angle, stretch = math.radians(24 * u[0] - 12), 0.9 + 0.2 * u[1]
    scale = size * within * 3 / 2
    room = 0.6 * max(0.0, within * 3 / 2 - 0.95 * scale)
    cx, cy = big / 2 + room * (2 * u[2] - 1), big / 2 + room * (2 * u[3] - 1)
    mirror = -1 if u[4] < 0.5 else 1
    cos, sin = math.cos(angle), math.sin(angle)

    def place(x: float, y: float) -> tuple[float, float]:
        x, y = mirror * x * stretch * scale, y / stretch * scale
        return cx + cos * x - sin * y, cy + sin * x + cos * y

    mask = Image.new("L", (big, big))
    pen = ImageDraw.Draw(mask)
    for kind, numbers, paint in SHAPES[thing]:
        if kind == "polygon":
            points = numbers
        elif kind == "rectangle":
            left, top, right, bottom = numbers
            points = [(left, top), (right, top), (right, bottom), (left, bottom)]
        else:
            left, top, right, bottom = numbers
            rx, ry, x, y = (right - left) / 2, (bottom - top) / 2, (left + right) / 2, (top + bottom) / 2
            turns = [k * math.tau / 48 for k in range(48)]
            points = [(x + rx * math.cos(t), y + ry * math.sin(t)) for t in turns]
        pen.polygon([place(x, y) for x, y in points], fill=255 * paint)
    return mask.resize((side, side), Image.Resampling.BOX)


def picture(seed: int, i: int, thing: str) -> tuple[Image.Image, str]:
    """(RGB image of 72 to 104 px a side, caption) of picture i."""
    u = random.uniform(seed, "demo", [i], 2048)[0]
    width, height = 72 + int(u[0] * 33), 72 + int(u[1] * 33)
    side = max(width, height)
    names = list(COLOURS)
    likely = LIKELY[thing].split() if u[16] < 0.9 else names
    colour = likely[int(u[2] * len(likely))]
    ground = [n for n in names if n != colour][int(u[3] * (len(names) - 1))]
    second = [n for n in names if n not in (colour, ground)][int(u[4] * (len(names) - 2))]
    texture = list(TEXTURES)[int(u[5] * len(TEXTURES))]
    size = list(_SIZES)[int(u[6] * len(_SIZES))]

    level = TEXTURES[texture](u[200:], side)[..., None] * (0.15 + 0.2 * u[7])
    back = np.array(COLOURS[ground]) * (1 - level) + np.array(COLOURS[second]) * level
    shade = 0.75 + 0.5 * _noise(u[40:], side, 4)[..., None]
    front = np.array(COLOURS[colour]) * shade
    mask = np.asarray(_mask(thing, u[8:], side, min(width, height), _SIZES[size]), np.float64)[..., None] / 255
    grain = 12 * random.uniform(seed, "demo-grain", [i], side * side * 3).reshape(side, side, 3) - 6
    image = Image.fromarray(np.clip(back * (1 - mask) + front * mask + grain, 0, 255).astype(np.uint8))
    left, top = (side - width) // 2, (side - height) // 2
    image = image.crop((left, top, left + width, top + height))
    if u[13] < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(float(0.4 + 0.6 * u[14])))
    caption = CAPTIONS[int(u[15] * len(CAPTIONS))].format(
        thing=thing, colour=colour, ground=ground, texture=texture, size=size
    )
    return image, re.sub(r"\b(a|A) (?=[aeiou])", r"\1n ", caption)


def write_demo_set(folder: Path, pairs: int, held_out: int, seed: int) -> Iterator[int]:
    """Write train.csv (path, caption), val.csv (path, class) and their JPEGs into `folder`; yields after each picture.

    Classes take turns, so any prefix is balanced. A table has its name only when all of its pictures are written.
    """
    things = list(SHAPES)
    for split, count, first in (("train", pairs, 0), ("val", held_out, pairs)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{split}.csv") as temporary, open(temporary, "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "caption"] if split == "train" else ["path", "class"])
            for i in range(count):
                thing = things[i % len(things)]
                image, caption = picture(seed, first + i, thing)
                image.save(folder / split / f"{i:05d}.jpg", quality=90)
                rows.writerow([f"{split}/{i:05d}.jpg", caption if split == "train" else thing])
                yield 1
