"""Several .beton files read as one data set."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from fastbd.base.errors import UserError
from fastbd.data.beton import Beton, number_images
from fastbd.data.tokenizer import CONTEXT

T = TypeVar("T")


def open_beton(path: str | os.PathLike) -> Beton | Shards:
    """The data set in a .beton file, or in all the files that a pattern such as cc3m-*.beton matches.

    UserError when no file matches, or the files are of different kinds.
    """
    if Path(path).exists() or not glob.has_magic(str(path)):
        return Beton(path)
    files = sorted(glob.glob(str(path)), key=natural)
    if not files:
        raise UserError(f"no file matches {path}: make them with `fastbd build`, or mend the pattern.")
    return Beton(files[0]) if len(files) == 1 else Shards(path, [Beton(file) for file in files])


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names by their value: a-2 comes before a-10."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", name)]


class Shards:
    """Several .beton files with the interface of one: their rows numbered through, in the order of the files.

    `row_id` stays the row in the source of the shard; classes are united by name. UserError when only some of the
    files have labels, or class names, or their numbers of text views differ.
    """

    def __init__(self, path: str | os.PathLike, shards: list[Beton]):
        self.path, self._shards = Path(path), shards
        *self._starts, self._rows = np.cumsum([0, *map(len, shards)]).tolist()
        self.num_text_views = self._same("number of text views", lambda shard: shard.num_text_views)
        self.built = self._same("flags of build", lambda shard: shard.built)
        named = self._same("kind (with labels, or without)", lambda shard: shard.labels is not None)
        named = named and self._same("kind (with class names, or without)", lambda shard: shard.class_names is not None)
        # As build numbers the classes of a single file.
        self.class_names = sorted({name for s in shards for name in s.class_names or ()}) if named else None
        self.has_checksums = all(shard.has_checksums for shard in shards)

    def _same(self, what: str, of: Callable[[Beton], T]) -> T:
        first, *others = self._shards
        for other in others:
            if of(other) != of(first):
                raise UserError(f"{first.path} and {other.path} differ in their {what}: build all shards alike.")
        return of(first)

    def __len__(self) -> int:
        return self._rows

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(shard, name) for shard in self._shards])

    @cached_property
    def width(self) -> np.ndarray:
        return self._column("width")

    @cached_property
    def height(self) -> np.ndarray:
        return self._column("height")

    @cached_property
    def row_id(self) -> np.ndarray:
        return self._column("row_id")

    @cached_property
    def image_of(self) -> np.ndarray:
        """int64 [N]: number of the image of each row, in order of first appearance."""
        stored, row, end = zip(*(shard.stored_images() for shard in self._shards), strict=True)
        *firsts, _ = np.cumsum([0, *map(len, row)])
        stored = np.concatenate([part + first for part, first in zip(stored, firsts, strict=True)])
        row = np.concatenate([part + start for part, start in zip(row, self._starts, strict=True)])
        return number_images(self, stored, row, np.concatenate(end))

    @cached_property
    def labels(self) -> np.ndarray | None:
        """int64 [N], places in class_names; the shards' own where they name no classes."""
        if self.class_names is None:
            return None if self._shards[0].labels is None else self._column("labels")
        place = {name: label for label, name in enumerate(self.class_names)}
        return np.concatenate([np.array([place[n] for n in s.class_names or ()])[s.labels] for s in self._shards])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the shards' fingerprints: names the data that a plan was made for."""
        return hashlib.sha256("".join(shard.fingerprint for shard in self._shards).encode()).hexdigest()

    def _find(self, i: int) -> tuple[Beton, int]:
        """The shard of row i, and its row there."""
        shard = bisect_right(self._starts, i) - 1
        return self._shards[shard], i - self._starts[shard]

    def whereabouts(self, i: int) -> str:
        """Return the words for row i: its number and its file."""
        shard, row = self._find(i)
        return shard.whereabouts(row)

    def is_whole(self, rows: np.ndarray) -> np.ndarray:
        """bool [B]: whether the rows, int64 [B], have the bytes that their checksums were made of."""
        shard_of = np.searchsorted(self._starts, rows, "right") - 1
        whole = np.empty(len(rows), bool)
        for k in np.unique(shard_of):
            here = shard_of == k
            whole[here] = self._shards[k].is_whole(rows[here] - self._starts[k])
        return whole

    def _gather(self, ids, read: Callable[[Beton, np.ndarray], np.ndarray]) -> np.ndarray:
        """uint16 [B, 77]: what `read` gives for the rows of each shard, in the order of `ids`."""
        ids = np.atleast_1d(ids)
        shard_of = np.searchsorted(self._starts, ids, "right") - 1
        out = np.empty((len(ids), CONTEXT), np.uint16)
        for k in np.unique(shard_of):
            here = shard_of == k
            out[here] = read(self._shards[k], ids[here] - self._starts[k])
        return out

    def jpeg(self, i: int) -> np.ndarray:
        """uint8 [bytes], a view of the file: nothing is copied."""
        shard, row = self._find(i)
        return shard.jpeg(row)

    def will_need(self, ids: np.ndarray) -> None:
        """Let the system read the images of rows int64 [B] into its cache meanwhile."""
        shard_of = np.searchsorted(self._starts, ids, "right") - 1
        for k in np.unique(shard_of).tolist():
            self._shards[k].will_need(ids[shard_of == k] - self._starts[k])

    def tokens(self, ids) -> np.ndarray:
        """uint16 [B, 77], the captions' tokens."""
        return self._gather(ids, lambda shard, rows: shard.tokens(rows))

    def text_view(self, ids, k: int = 0) -> np.ndarray:
        """uint16 [B, 77], tokens of the k-th augmented version of the captions."""
        return self._gather(ids, lambda shard, rows: shard.text_view(rows, k))

    def caption(self, i: int) -> str:
        shard, row = self._find(i)
        return shard.caption(row)
