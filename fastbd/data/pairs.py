"""Image-caption pairs: the source images and captions of rows, with the triggers and captions of a plan.

A row's views are made from its source image: the stored image, whole; of a poisoned row the triggered one, fitted to
S x S and stamped, as published programs saved it. So a trigger comes before every augmentation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Literal, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from fastbd.base import random
from fastbd.base.console import console
from fastbd.base.errors import UserError
from fastbd.base.text import clean
from fastbd.data.beton import Beton
from fastbd.data.decode import BadImage, Decoder, OnDemand, read
from fastbd.data.eda import N_DRAWS, eda
from fastbd.data.pixels import Pixels
from fastbd.data.shards import Shards
from fastbd.data.tokenizer import tokenize
from fastbd.kernels.augment import Ragged, render
from fastbd.kernels.views import plain
from fastbd.poison.plan import Plan

T = TypeVar("T")
Images = Sequence[Tensor] | Ragged
TASK = 8  # images that one thread takes at a time


class Pairs:
    """The image-caption pairs of a .beton, with the triggers and captions of a plan.

    A damaged image is named in the log, kept in `bad` (row to reason) and replaced by the next whole one of the file;
    more than `max_bad` of them are a UserError. With `resident`, source images are taken from there, and with
    `resident_squares` plain views; `where` names the place that resident.keep() has found for them, "none" where they
    are decoded in each epoch.
    """

    def __init__(self, beton: Beton | Shards, decoder: Decoder, size: int, plan: Plan | None = None, max_bad: int = 0):
        self.beton, self.decoder, self.size, self.plan, self.max_bad = beton, decoder, size, plan, max_bad
        self.bad: dict[int, str] = {}
        self.resident: Pixels | None = None
        self.resident_squares: Pixels | None = None
        self.where = "none"
        self._lock = threading.Lock()
        # planned[i] is the place of row i in the plan, or -1
        self.planned = np.full(len(beton), -1)
        if plan is not None:
            plan.check(beton.fingerprint, len(beton), beton.path)
            self.planned[list(plan.rows)] = np.arange(len(plan.rows))
            self._captions = tokenize(plan.captions)
            self._captions_aug = [self._plan_eda(plan, view) for view in range(beton.num_text_views)]

    def _plan_eda(self, plan: Plan, view: int) -> np.ndarray:
        u = random.uniform(plan.seed, "plan-eda", plan.rows, N_DRAWS, view=view)
        return tokenize([eda(clean(caption), u[k]) for k, caption in enumerate(plan.captions)])

    def stored(self, row: int) -> Tensor:
        """The stored image uint8 [H, W, 3], decoded by Pillow, or a damaged one's substitute."""
        total, reason = len(self.beton), None
        for step in range(total):
            other = (row + step) % total
            try:
                image = read(self.beton.jpeg(other))
            except BadImage as error:
                reason = reason or error.reason
            else:
                if reason:
                    self._note(row, reason, other)
                return torch.from_numpy(image)
        raise UserError(f"no image of {self.beton.path} can be decoded: build it again.")

    def _note(self, row: int, reason: str, other: int) -> None:
        said = f"image {row} of {self.beton.path} cannot be decoded ({reason})"
        with self._lock:
            if row in self.bad:
                return
            self.bad[row] = reason
            if len(self.bad) > self.max_bad:
                more = f", and --max-bad allows {self.max_bad} such images" if self.max_bad else ""
                raise UserError(f"{said}{more}: the file was damaged after it was built; build it again.")
            console.print(f"{said}: the image of row {other} stands in.", markup=False)

    def sizes(self, ids: np.ndarray) -> np.ndarray:
        """int [B, 2]: height and width of the source images; those of damaged ones' substitutes may differ."""
        if self.resident is not None:
            return self.resident.sizes[self.resident.place[ids]]
        sizes = np.stack([self.beton.height[ids], self.beton.width[ids]], -1).astype(np.int64)
        sizes[self.planned[ids] >= 0] = self.size
        return sizes

    @overload
    def sources(self, batches: Sequence[np.ndarray], host: Literal[True] = True) -> Iterator[Sequence[Tensor]]: ...

    @overload
    def sources(self, batches: Sequence[np.ndarray], host: bool) -> Iterator[Images]: ...

    def sources(self, batches: Sequence[np.ndarray], host: bool = True) -> Iterator[Images]:
        """The source images of batches of rows, in order: made on demand, to be used before the next batch is taken.

        Tensors in main memory; a Ragged where the GPU has or reads them, and they are not for the `host`.
        """
        if self.resident is not None and not (host and self.resident.pixels.is_cuda):
            yield from map(partial(self.resident.images, host=host), batches)
            return
        for ids, images in zip(batches, self.decoder.stream(self.beton, batches, self.stored, host), strict=True):
            if isinstance(images, Ragged):
                yield self._with_triggers(ids, images)
            else:
                yield OnDemand(len(ids), partial(self._source, ids, images))

    def _source(self, ids: np.ndarray, images: Sequence[Tensor], k: int) -> Tensor:
        return images[k] if self.planned[ids[k]] < 0 else self._triggered(ids[k : k + 1], [images[k]])[0]

    def _with_triggers(self, ids: np.ndarray, images: Ragged) -> Ragged:
        hit = np.flatnonzero(self.planned[ids] >= 0)
        if not len(hit):
            return images
        stored = replace(images, addresses=images.addresses[hit], sizes=images.sizes[hit])
        triggered = self._triggered(ids[hit], stored)
        addresses, sizes = images.addresses.copy(), images.sizes.copy()
        addresses[hit], sizes[hit] = [image.data_ptr() for image in triggered], self.size
        return replace(images, addresses=addresses, sizes=sizes, owner=(images.owner, triggered))

    def _triggered(self, ids: np.ndarray, images: Images) -> Tensor:
        """Stored images of poisoned rows, fitted and stamped: uint8 [B, S, S, 3]."""
        assert self.plan is not None, "no other rows are poisoned"
        sizes = images.sizes if isinstance(images, Ragged) else [image.shape[:2] for image in images]
        fitted = render(images, plain(sizes, self.size, self.plan.squashed(ids)), self.size, torch.uint8)
        self.plan.stamp(fitted, ids)
        return fitted

    def each(self, images: Sequence[Tensor]) -> list[Tensor]:
        """All of the images, made side by side."""
        return list(chain(*self.side_by_side(len(images), lambda part: [images[k] for k in part])))

    def squares(self, images: Sequence[Tensor], squash: bool = False) -> Tensor:
        """Their base views, uint8 [B, S, S, 3]; or all squashed."""
        squares = torch.empty(len(images), self.size, self.size, 3, dtype=torch.uint8)

        def fit(part: range) -> None:
            mine = [images[k] for k in part]
            views = plain([image.shape[:2] for image in mine], self.size, squash)
            render(mine, views, self.size, torch.uint8, out=squares[part.start : part.stop])

        self.side_by_side(len(images), fit)
        return squares

    def side_by_side(self, count: int, work: Callable[[range], T]) -> list[T]:
        """work(part) for all parts of range(count), by the decoder's threads, each part a few images."""
        parts = [range(first, min(first + TASK, count)) for first in range(0, count, TASK)]
        return list(self.decoder.pool.map(work, parts))

    def tokens(self, ids: np.ndarray, view: int | None = None) -> np.ndarray:
        """uint16 [B, 77]: captions, or their augmented versions number `view`; poisoned rows have the plan's."""
        tokens = self.beton.tokens(ids) if view is None else self.beton.text_view(ids, view)
        planned = self.planned[ids]
        hit = planned >= 0
        if hit.any():
            tokens[hit] = (self._captions if view is None else self._captions_aug[view])[planned[hit]]
        return tokens

    def captions(self, ids: np.ndarray, text_view: int | None) -> np.ndarray:
        """uint16 [B, 77], or [2 B, 77] where there is a second view of each, behind all the first ones."""
        views = (None,) if text_view is None else (None, text_view)
        return np.concatenate([self.tokens(ids, view) for view in views])
