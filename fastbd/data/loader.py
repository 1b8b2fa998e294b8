"""Batches on the device: the views and the captions of pairs, one batch ahead."""

from __future__ import annotations

import math
import mmap
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from fastbd.base import random
from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.config.cards import load
from fastbd.data import sampler
from fastbd.data.pairs import Pairs
from fastbd.kernels.augment import Ragged, render
from fastbd.kernels.policies import POLICIES
from fastbd.kernels.text_pack import PackedText, lengths_of, pack
from fastbd.kernels.views import View, plain

T = TypeVar("T")
Draw = Callable[[np.ndarray, np.ndarray], list[View]]  # (row ids, sizes of their source images)
Texts = Callable[[np.ndarray], tuple[PackedText, ...]]  # of row ids

RECIPES = {
    "cleanclip": ("plain", "auto_augment"),
    "randaugment": ("plain", "rand_augment"),
    "slip": ("random_crop", "simclr", "simclr"),
    "par": ("light",),
}
"""--views: the policy of the view that meets the caption, then those of the views for the self-supervised loss."""


def recipe(views: str) -> tuple[str, ...]:
    """The policies of --views, of the tables or from outside. UserError where one from outside names others."""
    if views in RECIPES:
        return RECIPES[views]
    found = load("views", views)
    known = ("plain", *POLICIES)
    if not isinstance(found, tuple | list) or not found or not all(policy in known for policy in found):
        raise UserError(f"the views {views} must be a tuple of policies, of {', '.join(known)}.")
    return tuple(found)


@dataclass(frozen=True)
class Batch:
    """B pairs: their rows int64 [B]; views of their images, each [B, 3, S, S] in channels_last memory, normalised;
    captions in one or several parts, each of as many pairs in their order: first the captions, then their second
    versions."""

    ids: Tensor
    views: tuple[Tensor, ...]
    texts: tuple[PackedText, ...]


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
    return _ahead(_made_on_cpu(pairs, order, policies, draw, texts, dtype), depth)


def text_lengths(pairs: Pairs, rows: np.ndarray, text_view: int | None) -> np.ndarray:
    """Tokens of the captions of some 4,096 of the rows, int [N, captions of a pair]."""
    some = rows[:: max(1, len(rows) // 4096)]
    return lengths_of(pairs.captions(some, text_view)).reshape(-1, len(some)).T


def _made_on_cpu(
    pairs: Pairs, order: Sequence[np.ndarray], policies: Sequence[str], draw: Draw, texts: Texts, dtype
) -> Generator[Batch, None, None]:
    rooms = _Rooms()
    for ids, sources in zip(order, pairs.sources(order), strict=True):
        views = _views(pairs, ids, sources, policies, draw, partial(rooms.empty, dtype=dtype))
        yield Batch(torch.from_numpy(ids), views, texts(ids))


def _views(
    pairs: Pairs, ids: np.ndarray, sources: Sequence[Tensor], policies: Sequence[str], draw: Draw, empty
) -> tuple[Tensor, ...]:
    """One task takes a few images from their bytes to all their views, while they are in a core's cache."""
    size, sizes = pairs.size, pairs.sizes(ids)
    squares = pairs.resident_squares
    drawn = draw(ids, sizes)
    views = [empty((len(ids), size, size, 3)) for _ in drawn]

    def make(places: range) -> None:
        images, part = [sources[k] for k in places], slice(places.start, places.stop)
        mine = [view[part] for view in drawn]
        found = np.array([image.shape[:2] for image in images])
        if not np.array_equal(found, sizes[part]):  # a substitute
            mine = draw(ids[part], found)
        for out, view, policy in zip(views, mine, policies, strict=True):
            if policy == "plain" and squares:  # made before: it is only normalised
                whole = plain([(size, size)] * len(out[part]), size)
                render(squares.images(ids[part]), whole, size, out.dtype, out=out[part])
            else:
                render(images, view, size, out.dtype, out=out[part])

    pairs.side_by_side(len(ids), make)
    return tuple(view.permute(0, 3, 1, 2) for view in views)


class _Rooms:
    """Memory for views, taken again when nothing refers to what was in it.

    Of huge pages: to touch small ones for the first time, batch after batch, costs more than to normalise.
    """

    def __init__(self):
        self._rooms: list[mmap.mmap] = []
        self._users: WeakValueDictionary[int, memoryview] = WeakValueDictionary()  # of rooms, by their place

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        free = [k for k, room in enumerate(self._rooms) if len(room) == size and k not in self._users]
        if not free:
            room = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                room.madvise(mmap.MADV_HUGEPAGE)
            free = [len(self._rooms)]
            self._rooms.append(room)
        # All tensors over a room refer to its memoryview. Counting references would not do: Python 3.14 borrows some.
        user = self._users[free[0]] = memoryview(self._rooms[free[0]])
        return torch.frombuffer(user, dtype=dtype).view(shape)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: PyTorch keeps the memory of each stream apart."""
    return torch.cuda.Stream(device)


def _made_on_gpu(
    pairs: Pairs, order: Sequence[np.ndarray], draw: Draw, texts: Texts, dtype, device: torch.device
) -> Generator[tuple[Batch, torch.cuda.Event], None, None]:
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

    pairs.side_by_side(len(images), lambda part: [place(k) for k in part])
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


def _ahead(items: Generator[T, None, None], depth: int) -> Iterator[T]:
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
