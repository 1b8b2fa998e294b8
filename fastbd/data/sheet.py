"""Contact sheets: what the model is shown, to be looked at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from fastbd.data.loader import Pairs, draw_views
from fastbd.kernels.augment import render

COLUMNS = 8


def samples(pairs: Pairs, rows: np.ndarray, policies: Sequence[str], *, seed: int) -> Image.Image:
    """Views, by each of the policies, of some training images of `rows`; with a plan, of poisoned ones too.

    As pixels: without noise and what is erased after normalisation.
    """
    clean, poisoned = _spread(rows[pairs.planned[rows] < 0]), _spread(rows[pairs.planned[rows] >= 0])
    strips = {}
    for name, ids in (("clean", clean), ("poisoned", poisoned)):
        if len(ids):
            (sources,) = map(pairs.each, pairs.sources([ids]))
            views = draw_views(policies, pairs.size, ids, np.array([s.shape[:2] for s in sources]), seed=seed, epoch=0)
            for place, (policy, view) in enumerate(zip(policies, views, strict=True)):
                pixels = render(sources, view, pairs.size, torch.uint8)
                strips[f"{name}, view {place + 1}: {policy}"] = pixels.numpy()
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
