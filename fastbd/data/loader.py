"""From a .beton and a poison plan to batches: the way of the data."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastbd import draws
from fastbd.data import sampler
from fastbd.data.beton import Beton
from fastbd.data.decode import BadImage, Decoder
from fastbd.data.eda import N_DRAWS, eda
from fastbd.data.tokenizer import longest, tokenize
from fastbd.dist import World
from fastbd.errors import UserError
from fastbd.kernels import augment
from fastbd.log import progress
from fastbd.poison.plan import Plan


@dataclass(frozen=True)
class Batch:
    """B pairs: ids int64 [B], images uint8 [B, S, S, 3], tokens int64 [B, L].

    For second views also how to augment the images, and tokens_aug int64 [B, L].
    """

    ids: np.ndarray
    images: Tensor
    tokens: Tensor
    augment: augment.AutoAugment | None = None
    tokens_aug: Tensor | None = None


class Pairs:
    """The image-caption pairs of a .beton as the model sees them: S x S uint8, triggers of the plan stamped."""

    def __init__(self, beton: Beton, decoder: Decoder, size: int, plan: Plan | None = None):
        self.beton, self.decoder, self.size, self.plan = beton, decoder, size, plan
        self._resident: np.ndarray | None = None
        self._slot: np.ndarray | None = None
        # planned[i] is the place of row i in the plan, or -1
        self.planned = np.full(len(beton), -1)
        if plan is not None:
            plan.check(beton.fingerprint, str(beton.path))
            self.planned[list(plan.rows)] = np.arange(len(plan.rows))
            self._captions = tokenize(plan.captions)
            u = draws.uniform(plan.seed, "plan-eda", plan.rows, N_DRAWS)
            self._captions_aug = tokenize([eda(c, u[k]) for k, c in enumerate(plan.captions)])

    def images(self, ids: np.ndarray) -> Tensor:
        """uint8 [B, S, S, 3], triggers included."""
        if self._resident is not None:
            if (self._slot[ids] < 0).any():
                raise IndexError("a row that is not in memory")
            return torch.from_numpy(self._resident[self._slot[ids]])
        if self.plan is None:
            return self.decoded(ids, np.zeros(len(ids), bool))
        images = self.decoded(ids, self.plan.squashed(ids))
        self.plan.stamp(images, ids)
        return images

    def decoded(self, ids: np.ndarray, squash: np.ndarray) -> Tensor:
        """uint8 [B, S, S, 3] without triggers; squash bool [B] picks the geometry of each."""
        try:
            return torch.from_numpy(self.decoder([self.beton.jpeg(i) for i in ids], self.size, squash))
        except BadImage as error:
            raise UserError(
                f"image {ids[error.index]} of {self.beton.path} cannot be decoded ({error.reason}): the file "
                "was damaged after it was built; build it again."
            ) from error

    def tokens(self, ids: np.ndarray, augmented: bool = False) -> np.ndarray:
        """uint16 [B, 77]: captions, or their augmented versions; poisoned rows have the plan's."""
        tokens = self.beton.text_view(ids) if augmented else self.beton.tokens(ids)
        planned = self.planned[ids]
        hit = planned >= 0
        if hit.any():
            tokens[hit] = (self._captions_aug if augmented else self._captions)[planned[hit]]
        return tokens

    def keep_in_memory(self, rows: np.ndarray, quiet: bool = False) -> None:
        """Decode `rows` once, for good."""
        kept = np.empty((len(rows), self.size, self.size, 3), np.uint8)
        with progress("decoding", len(rows), quiet=quiet) as advance:
            for start in range(0, len(rows), 256):
                part = rows[start : start + 256]
                kept[start : start + len(part)] = self.images(part).numpy()
                advance(len(part))
        slot = np.full(len(self.beton), -1)
        slot[rows] = np.arange(len(rows))
        self._resident, self._slot = kept, slot

    def fits_in_memory(self, rows: int) -> bool:
        """Whether so many decoded images fill at most this process's share of a quarter of the memory."""
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return rows * self.size**2 * 3 * processes <= memory() / 4


def memory() -> int:
    """Bytes of memory that this machine, or the container around the process, has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


def batches(
    pairs: Pairs,
    rows: np.ndarray,
    batch_size: int,
    *,
    seed: int,
    second_images: bool,
    second_texts: bool,
    world: World,
    epoch: int,
    start: int,
) -> Iterator[Batch]:
    """This rank's batches of an epoch from step `start` on, over `rows` in the order of (seed, epoch).

    batch_size counts all ranks; second_* ask for second views. The next batches are made by a thread meanwhile.
    """

    def make(picked: np.ndarray) -> Batch:
        ids = rows[picked]
        params, texts = None, [pairs.tokens(ids)]
        if second_images:
            u = draws.uniform(seed, "auto-augment", ids, augment.N_DRAWS, epoch=epoch, view=1)
            params = augment.draw_auto_augment(u)
        if second_texts:
            texts.append(pairs.tokens(ids, augmented=True))
        tokens, tokens_aug = [*_trim(*texts), None][:2]
        return Batch(ids, pairs.images(ids), tokens, params, tokens_aug)

    order = sampler.batches(len(rows), batch_size, seed, epoch, rank=world.rank, world=world.size, start=start)
    return _ahead((make(picked) for picked in order), 2)


def _trim(*tokens: np.ndarray) -> list[Tensor]:
    """int64, cut to the longest caption among them: exact, as the text tower is causal and reads the end token."""
    length = max(map(longest, tokens))
    return [torch.from_numpy(t[:, :length].astype(np.int64)) for t in tokens]


def _ahead(items: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """The same items, made by a thread up to `depth` ahead."""
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
