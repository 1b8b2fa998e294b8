"""A row of a source, before its image is read."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

from fastbd.config.flags import BuildConfig

# The first of them that a sample has is its image.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
IMAGE_KEYS = ("path", "image", "file_name")
"""Names of the column, or key, of the images: the first that a source has is taken unless it is named by a flag."""
CAPTION_LIMIT = 10_000
"""Characters of a caption that are read; 77 tokens, all that a model reads, are some 400."""
MISSING = frozenset(("nan", "-nan", "none", "null", "<na>", "na", "n/a", "#n/a", "#na"))
"""Captions, in lower case, that exports of pandas and of spreadsheets write for a missing one."""
NO_CLASS = frozenset(("nan", "null", "<na>", "-1"))
"""Class names, in lower case, of rows without a class; -1 is Hugging Face's. Classes may well be called none or na."""


class Item(NamedTuple):  # there are millions, sent to the workers
    """One row of a source, as a worker needs it. Its bytes are `size` from `offset` on in `file`, or all of it."""

    row_id: int
    name: str  # the path as the source writes it
    file: str
    caption: str
    class_name: str | None = None  # None: the source has no classes
    offset: int = 0
    size: int | None = None
    problem: str | None = None  # why the row cannot be used, where the source shows it
    line: int | None = None  # of a text file, from 1, where the row begins
    column: str | None = None  # of a parquet file, which holds the image in row `offset`


def with_sound_caption(item: Item) -> Item:
    """The item with its caption cut to CAPTION_LIMIT; a mark for a missing caption is a problem, or "" with a class."""
    caption = item.caption[:CAPTION_LIMIT].strip()
    if len(caption) < 5 and caption.lower() in MISSING:
        problem = None if item.class_name else f"missing caption: '{caption}'"
        return item._replace(caption="", problem=item.problem or problem)
    return item if len(item.caption) <= CAPTION_LIMIT else item._replace(caption=caption)


def class_problem(name: str) -> str | None:
    """Why a row cannot be of the class of this name, which its source gives; None where it can."""
    if not name:
        return "empty class"
    return f"missing class: '{name}'" if name.lower() in NO_CLASS else None


def image_key(keys: Container[str], config: BuildConfig, usual: Sequence[str] = IMAGE_KEYS) -> str:
    """The column, or key, of the images: that of the flag, else the first of `usual` that is in `keys`, else "path"."""
    return config.image_key or next((key for key in usual if key in keys), "path")
