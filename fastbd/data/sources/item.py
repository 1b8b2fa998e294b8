"""A row of a source, before its image is read."""

from __future__ import annotations

from typing import NamedTuple

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


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
