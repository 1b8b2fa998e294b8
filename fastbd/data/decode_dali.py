"""DALI as a decoder: whole images of their own size, in the order asked for.

Whether Pillow decodes an image in place of DALI depends on its file alone, never on the other images of its batch. It
decodes PNGs, so that they are read as the build read them; JPEGs whose segments are not whole, some of which DALI would
give with wrong pixels and no error; those in which DALI sees damage; and those that come from a GPU's JPEG engines
unlike Pillow's pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastbd.base.console import console
from fastbd.data.beton import Beton
from fastbd.data.decode import BadImage, OnDemand, read
from fastbd.data.jpeg import is_whole
from fastbd.data.shards import Shards
from fastbd.kernels.augment import Ragged

AHEAD = 2  # batches that are decoded in advance
HINTED = 1 << 31  # bytes that the JPEG engines may be told to allocate
CELL = 32  # px; side of the squares whose means are compared
LEVELS = 10  # that these means may be apart


class Known:
    """Keeps what is known of a data set's files: bool [N] each.

    `checked`: the segments have been looked at; `compared`: the pixels have been; `left`: Pillow decodes it.
    """

    def __init__(self, total: int):
        self.checked, self.compared, self.left = np.zeros((3, total), bool)


class Dali:
    """DALI's pipelines, and what is known of the files they were given; `pool` compares pixels."""

    def __init__(self, threads: int, hw_decoder_load: float, pool: ThreadPoolExecutor):
        self.threads, self.hw_decoder_load, self.pool = threads, hw_decoder_load, pool
        self._pipelines: dict[str, Pipeline] = {}  # by device
        self._files: WeakKeyDictionary[Beton | Shards, Known] = WeakKeyDictionary()

    @property
    def left(self) -> int:
        """Images that were left to Pillow."""
        return sum(int(files.left.sum()) for files in self._files.values())

    def stream(
        self, beton: Beton | Shards, batches: Sequence[np.ndarray], one: Callable[[int], Tensor], device: str
    ) -> Iterator[Sequence[Tensor] | Ragged]:
        """As Decoder.stream, decoded on `device`. RuntimeError where DALI fails on no image in particular."""
        files = self._files.setdefault(beton, Known(len(beton)))
        pipeline, done = self._pipelines.pop(device, None), 0
        if pipeline and pipeline.batch_size < max(map(len, batches), default=1):
            pipeline = None
        while done < len(batches):
            pipeline = pipeline or self._pipeline(device, beton, max(map(len, batches)))
            pipeline.start(self._jpegs(beton, files, ids) for ids in batches[done:])
            for ids in batches[done:]:
                try:
                    images = pipeline.next()
                except RuntimeError:
                    pipeline = None  # it is no longer valid, the error says
                    refused = self._refused(device, beton, ids[~files.left[ids]])
                    if not refused:
                        raise
                    _leave(beton, files, refused, "DALI cannot decode")
                    break  # to decode this batch again
                if isinstance(images, Ragged) and self.hw_decoder_load and not files.compared[ids].all():
                    torch.cuda.current_stream().synchronize()
                    self._compare(beton, files, ids, images.owner.as_cpu())
                yield _with_left(images, ids, files.left, one)
                done += 1
        if pipeline:
            pipeline.end()  # a stream that is left before leaves its pipeline in the middle, to be thrown away
            self._pipelines[device] = pipeline

    def _pipeline(self, device: str, beton: Beton | Shards, batch_size: int) -> Pipeline:
        where = {"device": "cpu"}
        if device.startswith("cuda"):  # chroma as the CPU has it, in training and in evaluation
            hints = engine_hints(beton.width, beton.height, batch_size, self.hw_decoder_load)
            where = {"device": "mixed", "hw_decoder_load": self.hw_decoder_load, "jpeg_fancy_upsampling": True, **hints}
        return Pipeline(batch_size, self.threads, device, where)

    def _jpegs(self, beton: Beton | Shards, files: Known, ids: np.ndarray) -> list[np.ndarray]:
        """The files of a batch, with another one in place of those that are left to Pillow."""
        for row in ids[~files.checked[ids]].tolist():
            files.left[row] |= not is_whole(beton.jpeg(row))
        files.checked[ids] = True
        return [placeholder() if files.left[row] else beton.jpeg(row) for row in ids.tolist()]

    def _refused(self, device: str, beton: Beton | Shards, ids: np.ndarray) -> list[int]:
        """Those of the rows that DALI cannot decode, found by halving; none where the fault is not an image's."""

        def decodes(jpegs: list[np.ndarray]) -> bool:
            pipeline = self._pipeline(device, beton, len(jpegs))
            pipeline.start(iter([jpegs]))
            try:
                pipeline.next()
            except RuntimeError:
                return False
            return True

        def refused(rows: list[int]) -> list[int]:
            if decodes([beton.jpeg(row) for row in rows]):
                return []
            half = len(rows) // 2
            return refused(rows[:half]) + refused(rows[half:]) if half else rows

        return refused(np.unique(ids).tolist()) if len(ids) and decodes([placeholder()]) else []

    def _compare(self, beton: Beton | Shards, files: Known, ids: np.ndarray, images: Sequence) -> None:
        """Leave to Pillow what is unlike its pixels, of the images uint8 [H, W, 3] that were not compared before."""
        new = np.flatnonzero(~files.compared[ids] & ~files.left[ids])
        same = self.pool.map(lambda k: is_like(np.asarray(images[k]), beton.jpeg(int(ids[k]))), new.tolist())
        unlike = new[~np.fromiter(same, bool)]
        files.compared[ids] = True
        _leave(beton, files, np.unique(ids[unlike]).tolist(), "DALI gives other pixels than Pillow for")


def _leave(beton: Beton | Shards, files: Known, rows: list[int], why: str) -> None:
    files.left[rows] = True
    for row in rows:
        console.print(f"{why} image {row} of {beton.path}: it is left to Pillow.", markup=False)


def is_like(pixels: np.ndarray, jpeg: np.ndarray) -> bool:
    """Whether pixels, uint8 [H, W, 3], are about those that Pillow reads from a JPEG file, uint8 [bytes].

    Decoders round differently, and spread colours over edges; damage shows in the mean of a cell.
    """
    try:
        wanted = read(jpeg)
    except BadImage:
        return False
    if pixels.shape != wanted.shape:
        return False
    off = pixels.astype(np.int32) - wanted
    for axis in 0, 1:
        borders = np.linspace(0, pixels.shape[axis], max(1, pixels.shape[axis] // CELL) + 1).astype(int)
        sizes = np.diff(borders).reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
        off = np.add.reduceat(off, borders[:-1], axis) / sizes
    return bool(np.abs(off).max() <= LEVELS)


def engine_hints(width: np.ndarray, height: np.ndarray, batch_size: int, hw_decoder_load: float) -> dict[str, int]:
    """What DALI can tell the JPEG engines of images of these sizes, so that they need not allocate again.

    Nothing where no image goes there, or the largest one, for all images of a batch, would take too much memory.
    """
    largest = {"preallocate_width_hint": int(width.max()), "preallocate_height_hint": int(height.max())}
    room = 3 * np.prod([*largest.values()], dtype=np.int64) * batch_size * hw_decoder_load
    return largest if 0 < room <= HINTED else {}


def _with_left(images: list[Tensor] | Ragged, ids: np.ndarray, left: np.ndarray, one) -> Sequence[Tensor] | Ragged:
    """A batch of images, with those that are left to Pillow decoded by `one`."""
    there = np.flatnonzero(left[ids])
    if not len(there):
        return images
    if not isinstance(images, Ragged):
        return OnDemand(len(ids), lambda k: one(int(ids[k])) if left[ids[k]] else images[k])
    others = Ragged.of([one(int(row)).to(images.device) for row in ids[there]])
    addresses, sizes = images.addresses.copy(), images.sizes.copy()
    addresses[there], sizes[there] = others.addresses, others.sizes
    return replace(images, addresses=addresses, sizes=sizes, owner=(images.owner, others.owner))


@cache
def placeholder() -> np.ndarray:
    """A small JPEG that each decoder can read, uint8 [bytes]."""
    jpeg = io.BytesIO()
    Image.new("RGB", (64, 64)).save(jpeg, "JPEG")
    return np.frombuffer(jpeg.getvalue(), np.uint8)


class Pipeline:
    """DALI's pipeline from JPEG files to RGB pixels of their own size; `where` are settings of its decoder."""

    def __init__(self, batch_size: int, threads: int, device: str, where: dict):
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import pipeline_def

        self.batch_size, self.gpu = batch_size, device.startswith("cuda")
        feed: list[Iterator[list[np.ndarray]]] = [iter(())]
        self._feed = feed  # not self: without a cycle a pipeline ends when it is dropped

        @pipeline_def(
            batch_size=batch_size,
            num_threads=threads,
            # DALI's hint lacks the None of a CPU.
            device_id=int(device.partition(":")[2] or 0) if self.gpu else None,  # pyright: ignore[reportArgumentType]
            prefetch_queue_depth=AHEAD,
        )
        def pipeline():
            # Not copied: the file stays mapped.
            jpegs = fn.external_source(
                source=lambda: next(feed[0]), dtype=types.DALIDataType.UINT8, ndim=1, no_copy=True
            )
            # The build has turned the images upright; an orientation that is still recorded is not to be applied again.
            return fn.decoders.image(jpegs, output_type=types.DALIImageType.RGB, adjust_orientation=False, **where)

        self._pipeline = pipeline()
        self._pipeline.build()

    def start(self, batches: Iterator[list[np.ndarray]]) -> None:
        """Batches of files that are to come."""
        self._feed[0] = batches

    def next(self) -> list[Tensor] | Ragged:
        """Images of the next batch. RuntimeError where DALI cannot decode one of them."""
        if not self.gpu:
            (images,) = self._pipeline.run()
            return [torch.from_dlpack(image) for image in images]
        stream = torch.cuda.current_stream()
        (images,) = self._pipeline.run(stream)  # in its order, so that the host need not wait
        addresses = np.array([image.data_ptr() for image in images], np.int64)
        sizes = np.array(images.shape(), np.int32).reshape(-1, 3)[:, :2]
        return Ragged(addresses, sizes, stream.device, images)

    def end(self) -> None:
        """After the last batch: ready for other files."""
        try:
            self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
