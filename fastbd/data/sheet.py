"""Contact sheets: what the model is given, to be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fastbd.data.loader import draw_views
from fastbd.data.pairs import Pairs
from fastbd.data.tokenizer import detokenize
from fastbd.kernels.augment import render
from fastbd.kernels.constants import normalisation

ACROSS, LEAST = 2, 96  # pairs in a line; smaller views are enlarged to so many px, each pixel a square
GAP, TEXT, LINE = 4, 230, 15  # px: between views, width of a caption, height of a line of text


def samples(
    pairs: Pairs,
    rows: np.ndarray,
    policies: Sequence[str],
    *,
    seed: int,
    text_view: int | None,
    epoch: int = 0,
    count: int = 6,
) -> Image.Image:
    """Views of `count` clean pairs among `rows` and of some of each attack, and captions, the augmented one in grey."""
    attacks = pairs.plan.attacks if pairs.plan else ()
    which = pairs.plan.attack_of[rows] if pairs.plan else np.full(len(rows), -1)
    titles = [f"clean ({', '.join(policies)})", *(f"{attack.trigger.name} to {attack.target}" for attack in attacks)]
    groups = {title: _spread(rows[which == k], count) for k, title in enumerate(titles, -1)}
    tiles = {title: _tiles(pairs, ids, policies, seed, epoch, text_view) for title, ids in groups.items() if len(ids)}
    return _arrange(tiles)


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` rows from all over: neighbours are often the same image with another caption."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def _tiles(pairs: Pairs, ids: np.ndarray, policies, seed: int, epoch: int, text_view: int | None) -> list[Image.Image]:
    """One picture a pair: its views side by side, its captions to the right of them."""
    (sources,) = ([*images] for images in pairs.sources([ids]))
    drawn = draw_views(policies, pairs.size, ids, np.array([x.shape[:2] for x in sources]), seed=seed, epoch=epoch)
    views = [_pixels(render(sources, view, pairs.size)) for view in drawn]
    texts = [detokenize(pairs.tokens(ids))]
    if text_view is not None:
        texts.append(detokenize(pairs.tokens(ids, text_view)))
    return [_tile([view[k].numpy() for view in views], [text[k] for text in texts]) for k in range(len(ids))]


def _pixels(views: torch.Tensor) -> torch.Tensor:
    """uint8 [B, S, S, 3] of normalised views [B, 3, S, S]."""
    scale, shift = normalisation(views.device)
    return ((views.permute(0, 2, 3, 1) - shift) / scale).round().clamp(0, 255).to(torch.uint8)


def _tile(views: list[np.ndarray], captions: list[str]) -> Image.Image:
    side = views[0].shape[0]
    shown = side * -(-LEAST // side)
    tile = Image.new("RGB", (len(views) * (shown + GAP) + TEXT + GAP, shown + GAP), "white")
    for k, view in enumerate(views):
        enlarged = Image.fromarray(view).resize((shown, shown), Image.Resampling.NEAREST)
        tile.paste(enlarged, (k * (shown + GAP), 0))
    pen, top = ImageDraw.Draw(tile), 0
    for caption, colour in zip(captions, ("black", "grey"), strict=False):
        for line in _wrapped(caption, TEXT - GAP):
            pen.text((len(views) * (shown + GAP), top), line, fill=colour, font=_font())
            top += LINE
        top += LINE // 3
    return tile


def _wrapped(text: str, width: float) -> list[str]:
    """Lines of words that are at most `width` px wide; a longer word stands alone."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _font().getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _arrange(groups: dict[str, list[Image.Image]]) -> Image.Image:
    """The tiles of each group below its title, ACROSS in a line."""
    width, height = next(iter(groups.values()))[0].size
    rows = {title: -(-len(tiles) // ACROSS) for title, tiles in groups.items()}
    head = 2 * LINE
    size = (ACROSS * width + GAP, sum(rows.values()) * height + len(groups) * head + GAP)
    sheet = Image.new("RGB", size, "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for title, tiles in groups.items():
        pen.text((GAP, top + LINE // 2), title, fill="black", font=_font(14))
        for k, tile in enumerate(tiles):
            sheet.paste(tile, (GAP + k % ACROSS * width, top + head + k // ACROSS * height))
        top += head + rows[title] * height
    return sheet


@cache
def _font(size: int = 12) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
