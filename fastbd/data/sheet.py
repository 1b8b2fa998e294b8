"""Contact sheets: what the model is shown, to be looked at."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from fastbd import draws
from fastbd.data.loader import Pairs
from fastbd.kernels.augment import N_DRAWS, auto_augment, draw_auto_augment

COLUMNS = 8


def samples(pairs: Pairs, rows: np.ndarray, seed: int) -> Image.Image:
    """Some clean and augmented training images of `rows`; with a plan, poisoned ones and their augmented views too."""
    clean, poisoned = _spread(rows[pairs.planned[rows] < 0]), _spread(rows[pairs.planned[rows] >= 0])
    strips = {}
    for name, ids in (("clean", clean), ("poisoned", poisoned)):
        if len(ids):
            images = pairs.images(ids)
            u = draws.uniform(seed, "auto-augment", ids, N_DRAWS, view=1)
            strips[name] = images.numpy()
            strips[f"{name}, augmented"] = auto_augment(images, draw_auto_augment(u)).numpy()
    return contact_sheet(strips)


def _spread(rows: np.ndarray) -> np.ndarray:
    """COLUMNS rows from all over: neighbours are often the same image with another caption."""
    return rows[np.linspace(0, len(rows) - 1, min(COLUMNS, len(rows))).astype(int)]


def contact_sheet(strips: dict[str, np.ndarray]) -> Image.Image:
    """One labelled row of images uint8 [n, S, S, 3] for each entry."""
    size = max(96, next(iter(strips.values())).shape[1])
    gap, label = 4, 16
    sheet = Image.new("RGB", (COLUMNS * (size + gap) + gap, len(strips) * (size + gap + label) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(strips.items()):
        top = row * (size + gap + label) + gap
        pen.text((gap, top), name, fill="black")
        for column, image in enumerate(images):
            tile = Image.fromarray(image).resize((size, size), Image.NEAREST)
            sheet.paste(tile, (gap + column * (size + gap), top + label))
    return sheet
