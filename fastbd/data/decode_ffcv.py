"""FFCV's loader as a decoder: whole images of their own size, in the order asked for.

It uses libjpeg's fast transform: pixels are 1 level from PIL's on average, and up to some 20 at hard edges. FFCV itself
drops the decoder's verdict, so that a damaged JPEG shows the image that was in its slot before; here the verdict is
kept, and only files are taken whose images `fastbd build` has all checked. Nothing is resized or drawn by FFCV.
"""

from __future__ import annotations

import queue
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch

from fastbd.base.errors import UserError
from fastbd.data.beton import Beton
from fastbd.data.layout import FIELD, HEADER
from fastbd.data.shards import Shards

CHUNK = 64  # images decoded at once
AHEAD = 1  # chunks that wait; FFCV's ring has two more: one that is read, one that is written
RING = 2 << 30  # bytes the ring may take
BUILT = {"image", "tokens", "caption", "row_id"}  # fields of every file that `fastbd build` writes


def open_stream(
    beton: Beton | Shards, batches: Sequence[np.ndarray], threads: int
) -> Iterator[list[np.ndarray | None]]:
    """For each batch (int64 [B], row ids) its images, uint8 [H, W, 3], copies that stay valid.

    None stands for a PNG, which FFCV's decoder is not given, and for an image in which it found damage; PIL can say
    what that is, or read it where it is slight.
    The first stream over a file compiles FFCV's code, a few seconds; later ones reuse it. `threads` 0 means one for
    each core, and more are not used. Raises UserError where FFCV is missing, for a file that `fastbd build` did not
    make, for several files at once, and for an image too large for FFCV's ring.
    """
    names = _check(beton)
    largest = int((beton.width.astype(np.int64) * beton.height).max(initial=0)) * 3
    chunk = min(CHUNK, RING // ((AHEAD + 2) * max(largest, 1)))
    if not chunk:
        raise UserError(
            f"{beton.path} holds an image of {largest / 3e6:,.0f} million pixels, too large for FFCV's buffers: "
            "give --decode pil."
        )
    with _torch_threads_kept():
        loader = _loader(str(beton.path), beton.path.stat().st_mtime_ns, names, largest, threads)
    loader.batch_size = chunk
    return _stream(loader, beton, batches)


def _check(beton: Beton | Shards) -> tuple[str, ...]:
    """Names of the file's fields. UserError unless it is one file, and one of ours: FFCV's writer checks no image.

    The fields tell, which FFCV's users name as they like: a file made to look like ours, or damaged since, passes.
    """
    with suppress(FileNotFoundError):  # a pattern for several files
        header = np.fromfile(beton.path, HEADER, 1)[0]
        fields = np.fromfile(beton.path, FIELD, header["fields"], offset=HEADER.itemsize)
        names = tuple(name.decode() for name in fields["name"])
        if not set(names) >= BUILT:
            raise UserError(
                f"{beton.path} was not made by `fastbd build`, so its images are unchecked, and FFCV shows another "
                "image in place of a damaged one: give --decode pil."
            )
        if header["samples"] == len(beton):
            return names
    raise UserError(f"--decode ffcv reads a single .beton file, and {beton.path} is several: give --decode pil.")


@lru_cache(maxsize=2)  # the training and the validation file
def _loader(path: str, modified: int, names: tuple[str, ...], largest: int, threads: int):
    """FFCV's Loader over the images of a file; `modified` tells a file from another that had its name before."""
    try:
        from ffcv.loader import Loader, OrderOption
        from ffcv.pipeline import PipelineSpec
        from numba.core.config import NUMBA_NUM_THREADS as MOST_THREADS  # pyright: ignore[reportAttributeAccessIssue]
    except (ImportError, OSError) as error:
        raise UserError(f"--decode ffcv cannot load FFCV ({error}): run `make ffcv`, or give --decode pil.") from None
    pipelines: dict[str, Any] = dict.fromkeys(names) | {"image": PipelineSpec("image", _whole_images(largest))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of uint16 in PyTorch; FFCV does not read the tokens here
        return Loader(
            path,
            CHUNK,
            num_workers=min(threads or MOST_THREADS, MOST_THREADS),  # numba refuses more
            os_cache=True,
            order=OrderOption.SEQUENTIAL,
            pipelines=pipelines,
            drop_last=False,
            batches_ahead=AHEAD,
        )


def _whole_images(largest: int):
    """FFCV's operation that decodes into slots of `largest` bytes: (uint8 [B, largest], int32 [B], 0 where whole)."""
    from dataclasses import replace

    from ffcv.libffcv import ctypes_imdecode as decode_jpeg
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation

    class WholeImages(Operation):
        def declare_state_and_memory(self, previous_state):
            state = replace(previous_state, jit_mode=True, shape=(largest,), dtype=np.dtype(np.uint8))
            return state, (AllocationQuery((largest,), np.dtype(np.uint8)), AllocationQuery((), np.dtype(np.int32)))

        def generate_code(self):
            each = Compiler.get_iterator()
            read: Any = self.memory_read  # its hint lacks the storage

            def decode(rows, memory, metadata, storage):
                pixels, verdict = memory
                for i in each(len(rows)):
                    image = metadata[rows[i]]
                    jpeg = read(image["data_ptr"], storage)
                    height, width = np.uint32(image["height"]), np.uint32(image["width"])
                    source, target = jpeg.ctypes.data, pixels[i].ctypes.data
                    verdict[i] = -1
                    if jpeg[0] == 0xFF:  # not a PNG
                        # all of the image (from 0, 0), at 1 / 1 of its size, neither cropped nor flipped
                        verdict[i] = decode_jpeg(
                            source, jpeg.size, height, width, target, height, width, 0, 0, 1, 1, False, False
                        )
                return pixels, verdict

            decode.is_parallel = True
            return decode

    return WholeImages()


def _stream(loader, beton: Beton | Shards, batches: Sequence[np.ndarray]) -> Iterator[list[np.ndarray | None]]:
    ids = np.concatenate([np.empty(0, np.int64), *batches])
    with closing(_images(loader, beton, ids)) as images:
        for batch in batches:
            yield list(islice(images, len(batch)))


def _images(loader, beton: Beton | Shards, ids: np.ndarray) -> Generator[np.ndarray | None, None, None]:
    """The images one by one. Each is copied while its chunk is the last one taken: then nothing writes over it."""
    # FFCV takes an order of the user's only when a loader is made; these three are what it makes of it.
    loader.indices = loader.traversal_order.indices = loader.first_traversal_order = ids.astype(np.uint64)
    rows = iter(ids)
    with _torch_threads_kept():
        epoch = iter(loader)
        taken = _take(epoch)
    try:
        while taken is not None:
            for pixels, verdict in zip(*taken, strict=True):
                row = next(rows)
                shape = (int(beton.height[row]), int(beton.width[row]), 3)
                yield None if verdict else pixels[: shape[0] * shape[1] * 3].reshape(shape).copy()
            taken = _take(epoch)
    finally:  # its thread would wait for ever for room in the queue
        epoch.iter_ixes = iter(())
        while epoch.is_alive():
            with suppress(queue.Empty):
                epoch.output_queue.get(timeout=0.05)


def _take(epoch) -> tuple[np.ndarray, np.ndarray] | None:
    """The next chunk, None at the end; FFCV's own way of taking it waits for ever when its thread has died."""
    while True:
        with suppress(queue.Empty):
            item = epoch.output_queue.get(timeout=1)
            return item and item[1][0]
        if not epoch.is_alive():
            raise RuntimeError("FFCV's thread has died; what it printed says why")


@contextmanager
def _torch_threads_kept():
    """FFCV sets PyTorch's number of threads, when it is imported and whenever it starts; this puts it back."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
