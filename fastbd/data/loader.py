"""From a .beton and a poison plan to batches: the way of the data.

A row's views are made from its source image: the stored image, whole; of a poisoned row the triggered one, fitted to
S x S and stamped, as published programs saved it. So a trigger comes before every augmentation.
"""

from __future__ import annotations

import math
import mmap
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastbd.base import random
from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.base.log import console
from fastbd.data import sampler
from fastbd.data.beton import Beton
from fastbd.data.decode import BadImage, Decoder, OnDemand, read
from fastbd.data.eda import N_DRAWS, eda
from fastbd.data.tokenizer import tokenize
from fastbd.kernels.augment import Ragged, render
from fastbd.kernels.policies import POLICIES
from fastbd.kernels.text_pack import PackedText, lengths_of, pack
from fastbd.kernels.views import View, plain
from fastbd.poison.plan import Plan

if TYPE_CHECKING:
    from fastbd.data.resident import Resident

Images = Sequence[Tensor] | Ragged
Draw = Callable[[np.ndarray, np.ndarray], list[View]]  # (row ids, sizes of their source images)
Texts = Callable[[np.ndarray], tuple[PackedText, ...]]  # of row ids

TASK = 8  # images that one thread takes at a time

RECIPES = {
    "cleanclip": ("plain", "auto_augment"),
    "randaugment": ("plain", "rand_augment"),
    "slip": ("random_crop", "simclr", "simclr"),
    "par": ("light",),
}
"""--views: the policy of the view that meets the caption, then those of the views for the self-supervised loss."""


@dataclass(frozen=True)
class Batch:
    """B pairs: their rows int64 [B]; views of their images, each [B, 3, S, S] in channels_last memory, normalised;
    captions in one or several parts, each of as many pairs in their order: first the captions, then their second
    versions."""

    ids: Tensor
    views: tuple[Tensor, ...]
    texts: tuple[PackedText, ...]


class Pairs:
    """The image-caption pairs of a .beton, with the triggers and captions of a plan.

    A damaged image is named in the log, kept in `bad` (row to reason) and replaced by the next whole one of the file;
    more than `max_bad` of them are a UserError. With `resident`, source images are taken from there; `where` names the
    place that resident.keep() has found for them, "none" where they are decoded in each epoch.
    """

    def __init__(self, beton: Beton, decoder: Decoder, size: int, plan: Plan | None = None, max_bad: int = 0):
        self.beton, self.decoder, self.size, self.plan, self.max_bad = beton, decoder, size, plan, max_bad
        self.bad: dict[int, str] = {}
        self.resident: Resident | None = None
        self.where = "none"
        self._lock = threading.Lock()
        # planned[i] is the place of row i in the plan, or -1
        self.planned = np.full(len(beton), -1)
        if plan is not None:
            plan.check(beton.fingerprint, len(beton), beton.path)
            self.planned[list(plan.rows)] = np.arange(len(plan.rows))
            self._captions = tokenize(plan.captions)
            self._captions_aug = [self._plan_eda(view) for view in range(beton.num_text_views)]

    def _plan_eda(self, view: int) -> np.ndarray:
        u = random.uniform(self.plan.seed, "plan-eda", self.plan.rows, N_DRAWS, view=view)
        return tokenize([eda(caption, u[k]) for k, caption in enumerate(self.plan.captions)])

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
        sizes = images.sizes if isinstance(images, Ragged) else [image.shape[:2] for image in images]
        fitted = render(images, plain(sizes, self.size, self.plan.squashed(ids)), self.size, torch.uint8)
        self.plan.stamp(fitted, ids)
        return fitted

    def each(self, images: Sequence[Tensor]) -> list[Tensor]:
        """All of the images, made side by side."""
        return list(self.decoder.pool.map(images.__getitem__, range(len(images))))

    def squares(self, images: Sequence[Tensor], squash: bool = False) -> Tensor:
        """Their base views, uint8 [B, S, S, 3]; or all squashed."""
        squares = torch.empty(len(images), self.size, self.size, 3, dtype=torch.uint8)

        def fit(k: int) -> None:
            image = images[k]
            view = plain([image.shape[:2]], self.size, squash)
            render([image], view, self.size, torch.uint8, out=squares[k : k + 1])

        list(self.decoder.pool.map(fit, range(len(images))))
        return squares

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


def draw_views(
    policies: Sequence[str], size: int, ids: np.ndarray, sizes: np.ndarray, *, seed: int, epoch: int
) -> list[View]:
    """A View of rows `ids` by each policy; sizes int [B, 2] are those of their source images."""
    views = []
    for place, name in enumerate(policies):
        if name == "plain":
            views.append(plain(sizes, size))
        else:
            policy, count = POLICIES[name]
            u = random.uniform(seed, name.replace("_", "-"), ids, count, epoch=epoch, view=place)
            views.append(policy(u, sizes, size))
    return views


def batches(
    pairs: Pairs,
    rows: np.ndarray,
    batch_size: int,
    *,
    seed: int,
    policies: Sequence[str],
    text_view: int | None,
    world: World,
    epoch: int,
    start: int,
    dtype: torch.dtype = torch.float32,
    parts: int = 1,
    room: int = 1,
) -> Iterator[Batch]:
    """This rank's batches of an epoch from step `start` on, over `rows` in the order of (seed, epoch), on its device.

    batch_size counts all ranks. Each image has a view by each of the `policies`; `text_view` is the number of the
    captions' second view. Captions come in `parts`, whose tokens are a multiple of `room`. The next batches are made by
    a thread meanwhile, on a GPU in a stream of its own.
    """
    places = sampler.batches(len(rows), batch_size, seed, epoch, rank=world.rank, world=world.size, start=start)
    order = [rows[picked] for picked in places]
    draw = partial(draw_views, policies, pairs.size, seed=seed, epoch=epoch)

    def texts(ids: np.ndarray) -> tuple[PackedText, ...]:
        return tuple(pack(pairs.captions(part, text_view), room) for part in np.split(ids, parts))

    depth = 2 if parts == 1 else 1  # a batch that is used in parts is large
    if world.device.type == "cuda":
        return _received(_ahead(_made_on_gpu(pairs, order, draw, texts, dtype, world.device), depth))
    return _ahead(_made_on_cpu(pairs, order, draw, texts, dtype), depth)


def text_lengths(pairs: Pairs, rows: np.ndarray, text_view: int | None) -> np.ndarray:
    """Tokens of the captions of some 4,096 of the rows, int [N, captions of a pair]."""
    some = rows[:: max(1, len(rows) // 4096)]
    return lengths_of(pairs.captions(some, text_view)).reshape(-1, len(some)).T


def _made_on_cpu(pairs: Pairs, order: Sequence[np.ndarray], draw: Draw, texts: Texts, dtype) -> Iterator[Batch]:
    rooms = _Rooms()
    for ids, sources in zip(order, pairs.sources(order), strict=True):
        views = _views(pairs, ids, sources, draw, partial(rooms.empty, dtype=dtype))
        yield Batch(torch.from_numpy(ids), views, texts(ids))


def _views(pairs: Pairs, ids: np.ndarray, sources: Sequence[Tensor], draw: Draw, empty) -> tuple[Tensor, ...]:
    """One task takes a few images from their bytes to all their views, while they are in a core's cache."""
    size, sizes = pairs.size, pairs.sizes(ids)
    drawn = draw(ids, sizes)
    views = [empty((len(ids), size, size, 3)) for _ in drawn]

    def make(first: int) -> None:
        part = slice(first, min(first + TASK, len(ids)))
        images, mine = [sources[k] for k in range(part.start, part.stop)], [view[part] for view in drawn]
        found = np.array([image.shape[:2] for image in images])
        if not np.array_equal(found, sizes[part]):  # a substitute
            mine = draw(ids[part], found)
        for out, view in zip(views, mine, strict=True):
            render(images, view, size, out.dtype, out=out[part])

    list(pairs.decoder.pool.map(make, range(0, len(ids), TASK)))
    return tuple(view.permute(0, 3, 1, 2) for view in views)


class _Rooms:
    """Memory for views, taken again when nothing refers to what was in it.

    Of huge pages: to touch small ones for the first time, batch after batch, costs more than to normalise.
    """

    def __init__(self):
        self._rooms: list[mmap.mmap] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        # A tensor over a room refers to it; a free one has the list, the variable and the argument.
        free = next((room for room in self._rooms if len(room) == size and sys.getrefcount(room) == 3), None)
        if free is None:
            free = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                free.madvise(mmap.MADV_HUGEPAGE)
            self._rooms.append(free)
        return torch.frombuffer(free, dtype=dtype).view(shape)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: PyTorch keeps the memory of each stream apart."""
    return torch.cuda.Stream(device)


def _made_on_gpu(
    pairs: Pairs, order: Sequence[np.ndarray], draw: Draw, texts: Texts, dtype, device: torch.device
) -> Iterator[tuple[Batch, torch.cuda.Event]]:
    """Batches, and when they are ready."""
    held = deque()
    with torch.cuda.stream(_stream(device)):
        try:
            for ids, sources in zip(order, pairs.sources(order, host=False), strict=True):
                if not isinstance(sources, Ragged):
                    sources = _uploaded(pairs, sources, device)
                views = tuple(render(sources, view, pairs.size, dtype) for view in draw(ids, sources.sizes))
                packed = tuple(PackedText(*(_sent(x, device) for x in text)) for text in texts(ids))
                rows = _sent(torch.from_numpy(ids), device)
                ready = torch.cuda.Event()
                ready.record()
                held.append((ready, sources))  # DALI's memory is not PyTorch's: it must outlive the kernels' reading
                while held[0][0].query() and len(held) > 1:
                    held.popleft()
                yield Batch(rows, views, packed), ready
        finally:
            if held:
                held[-1][0].synchronize()


def _sent(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True)


def _uploaded(pairs: Pairs, sources: Sequence[Tensor], device: torch.device) -> Ragged:
    """Images that are made on demand or lie in pageable memory, on the GPU: in one copy of locked memory."""
    images = pairs.each(sources)
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    *starts, total = np.cumsum([0, *(image.numel() for image in images)]).tolist()
    locked = torch.empty(total, dtype=torch.uint8, pin_memory=True)

    def place(k: int) -> None:
        locked[starts[k] : starts[k] + images[k].numel()].copy_(images[k].flatten())

    list(pairs.decoder.pool.map(place, range(len(images))))
    flat = locked.to(device, non_blocking=True)
    return Ragged(flat.data_ptr() + np.array(starts, np.int64), sizes, flat.device, flat)


def _received(made: Iterator[tuple[Batch, torch.cuda.Event]]) -> Iterator[Batch]:
    """Batches that another stream made, for use in the current one."""
    for batch, ready in made:
        stream = torch.cuda.current_stream()
        stream.wait_event(ready)
        for tensor in (batch.ids, *batch.views, *chain(*batch.texts)):
            tensor.record_stream(stream)  # else its memory could be given away while it is read
        yield batch
        del batch, tensor  # not to be kept while the next one is waited for


def _ahead(items: Generator, depth: int) -> Iterator:
    """The same items, made by a thread up to `depth` ahead, which also closes their maker."""
    done, ready, abandoned = object(), queue.Queue(depth), threading.Event()

    def put(item) -> bool:
        while not abandoned.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            with closing(items):
                for item in items:
                    if not put(item):
                        return
            put(done)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not done:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        abandoned.set()
        thread.join()  # not to be decoding when the interpreter ends
