"""The .beton container, version 2 (FFCV's format), read and written with numpy alone."""

from __future__ import annotations

import hashlib
import itertools
import math
import mmap
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from fastbd.base.errors import UserError
from fastbd.base.files import discard, sync
from fastbd.base.journal import Journal
from fastbd.data.layout import (
    ARRAY_TYPE,
    BYTES_TYPE,
    FIELD,
    HEADER,
    IMAGE_TYPE,
    INT_TYPE,
    PAGE,
    allocations,
    array_arguments,
    built_arguments,
    bytes_of,
    check_ranges,
    checksum,
    count_text_views,
    names_of,
    read_built,
    read_tables,
    record_of,
    spans,
)
from fastbd.data.tokenizer import CONTEXT, VOCABULARY

BLOCK = 1 << 26  # bytes hashed at a time
ROWS = 1 << 16  # samples whose allocations are written at a time


class Beton:
    """A .beton file, mapped into memory: opening checks the tables, samples are read when asked for.

    Attributes, with N the number of samples: `path`; `width`, `height`: uint16 [N], px; `row_id`: int64 [N], row in
    the source; `image_of`: int64 [N]; `labels`: int64 [N] or None; `class_names`: list or None; `num_text_views`;
    `built`: flags of build, by name, that are not at their defaults and change images or tokens;
    `has_checksums`: whether is_whole() can tell damage, as in no file of FFCV's. The columns, but for image_of, are
    views of the file, which all processes share.
    Raises UserError for a file that is no .beton, is cut short, holds raw pixels in place of JPEG, or whose tables have
    pointers, sizes or labels that cannot be. What is read later and cannot be is a UserError then.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._bytes = np.frombuffer(self._map, np.uint8)
            self._read_tables()
        except FileNotFoundError:
            raise UserError(f"{self.path} does not exist: make it with `fastbd build`.") from None
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.path} is no whole .beton file ({error}): make one from its source with `fastbd build`."
            ) from None

    def _read_tables(self) -> None:
        tables = read_tables(self._bytes)
        self._fields, self._metadata, self._allocations, *_ = tables
        image, names = self._metadata["image"], names_of(self._metadata.dtype)
        if image["mode"].any():
            raise ValueError("its images are not JPEG")
        self._jpeg_ptr, self._jpeg_size = image["ptr"], self._sizes(image["ptr"])
        self.num_text_views = count_text_views(self._fields)
        self.built = read_built(self._fields)
        check_ranges(tables, self._jpeg_size, self.num_text_views)
        self.width, self.height = image["width"], image["height"]
        self.row_id = self._metadata["row_id"] if "row_id" in names else np.arange(len(image))
        self.labels = self._metadata["label"] if "label" in names else None
        self.has_checksums = "checksum" in names
        self._release()

    def _release(self) -> None:
        """Give back the memory of the pages read so far; they stay in the system's cache, for all processes."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _sizes(self, ptr: np.ndarray) -> np.ndarray:
        """Length in bytes of the value at each pointer, from the allocation table."""
        table = self._allocations
        stride = len(table) // max(len(ptr), 1)
        if stride and len(table) == stride * len(ptr) and np.array_equal(table["ptr"][::stride], ptr):
            return table["size"][::stride]  # in order, as BetonWriter writes it: nothing to sort
        table = table[table["size"] > 0]  # an empty value shares its pointer with the next one
        order = np.argsort(table["ptr"])
        found = np.searchsorted(table["ptr"], ptr, sorter=order).clip(max=max(len(table) - 1, 0))
        if not np.array_equal(table["ptr"][order[found]], ptr):
            raise ValueError("an image is missing from its allocation table")
        return table["size"][order[found]]

    def _column(self, name: str) -> np.ndarray:
        if name not in names_of(self._metadata.dtype):
            raise UserError(f"{self.path} holds no {name}: build it with `fastbd build`.")
        return self._metadata[name]

    def _gather(self, name: str, ids, skip: int, width: int) -> np.ndarray:
        """uint16 [B, width], starting `skip` values into the array `name` of each sample."""
        ids = np.atleast_1d(ids)
        first = self._column(name)[ids] + np.uint64(2 * skip)
        tokens = sliding_window_view(self._bytes, 2 * width)[first].view("<u2")
        if tokens.max(initial=0) >= VOCABULARY:
            row = int(ids[tokens.max(1).argmax()])
            raise UserError(
                f"the {name} of {self.whereabouts(row)} are not CLIP's: the file is damaged; build it again."
            )
        return tokens

    def _text(self, name: str, i: int) -> str:
        ptr, size = self._column(name)[i].tolist()
        try:
            return self._map[ptr : ptr + size].decode()
        except UnicodeDecodeError:
            said = f"the {name} of {self.whereabouts(i)} is not text"
            raise UserError(f"{said}: the file is damaged; build it again.") from None

    def _stored(self, ptr: int, size: int) -> np.ndarray:
        return self._bytes[ptr : ptr + size]

    def whereabouts(self, i: int) -> str:
        """Return the words for row i: its number and its file."""
        return f"row {i} of {self.path}"

    def is_whole(self, rows: np.ndarray) -> np.ndarray:
        """bool [B]: whether the rows, int64 [B], have the bytes that their checksums were made of.

        The file must have checksums. They tell accidents, not a forger's work.
        """
        metadata, sizes = self._metadata[rows], self._jpeg_size[rows]
        table, columns = self._allocations.reshape(len(self), -1)[rows], spans(metadata, sizes, self.num_text_views)
        if table.shape[1] != len(columns):  # a field has lost its name
            return np.zeros(len(rows), bool)
        whole = (table == allocations(metadata, rows, sizes, self.num_text_views)).all(1)
        columns = {name: _pairs(*column) for name, column in columns.items()}
        images, others = columns.pop("image"), list(zip(*columns.values(), strict=True))
        descriptors, records, before = zlib.crc32(self._fields.tobytes()), bytes_of(self._metadata), None
        for k, (image, others_of_row) in enumerate(zip(images, others, strict=True)):
            if image != before:  # else rows share it
                before, crc = image, zlib.crc32(self._stored(*image).data)
            parts = [records[rows[k], :-8], *itertools.starmap(self._stored, others_of_row)]
            found = checksum(descriptors, crc, parts)
            whole[k] &= found == metadata["checksum"][k]
        self._release()
        return whole

    def __len__(self) -> int:
        return len(self._metadata)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over header, metadata and allocation table: names the data that a plan was made for.

        The metadata hold the checksums of images, captions and tokens, so it stands for all that `build` has written. A
        file without checksums may change its content and keep its fingerprint.
        """
        digest = hashlib.sha256()
        head = HEADER.itemsize + self._fields.nbytes + self._metadata.nbytes
        for table in (self._bytes[:head], self._allocations.view(np.uint8)):
            for start in range(0, len(table), BLOCK):
                digest.update(table[start : start + BLOCK].data)
                self._release()
        return digest.hexdigest()

    @cached_property
    def class_names(self) -> list[str] | None:
        """Name of class 0..C-1."""
        if self.labels is None or "class_name" not in names_of(self._metadata.dtype):
            return None
        labels, first = np.unique(self.labels, return_index=True)
        if labels[-1] >= len(labels):
            raise UserError(f"the classes of {self.path} are not numbered from 0 without gaps: build it again.")
        return [self._text("class_name", i) for i in first.tolist()]

    @cached_property
    def image_of(self) -> np.ndarray:
        """int64 [N]: number of the image of each row, in order of first appearance; rows may share one.

        By content: an image whose rows do not follow one another was stored several times.
        """
        return number_images(self, *self.stored_images())

    def stored_images(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For number_images: the stored file of each row, [N]; a row of each file and what it ends with, uint64 [M]."""
        ptr, row, stored = np.unique(self._jpeg_ptr, return_index=True, return_inverse=True)
        size = self._jpeg_size[row]
        last = sliding_window_view(self._bytes, 8)[ptr + size - np.uint64(16)]  # before what ends a JPEG or a PNG
        self._release()
        return stored, row, last.view("<u8")[:, 0] ^ size

    def jpeg(self, i: int) -> np.ndarray:
        """The JPEG, or PNG where the file was built with --store png, uint8 [bytes]: a view, nothing is copied."""
        return self._stored(int(self._jpeg_ptr[i]), int(self._jpeg_size[i]))

    def will_need(self, ids: np.ndarray) -> None:
        """Let the system read the images of rows int64 [B] into its cache, and the captions behind them, meanwhile."""
        start, end = self._jpeg_ptr[ids], self._jpeg_ptr[ids] + self._jpeg_size[ids] + np.uint64(mmap.PAGESIZE)
        order = np.argsort(start)
        start, end = start[order].astype(np.int64) // mmap.PAGESIZE * mmap.PAGESIZE, end[order].astype(np.int64)
        first = np.append(True, start[1:] > np.maximum.accumulate(end)[:-1])  # of ranges that do not touch the last
        end = np.minimum(np.maximum.reduceat(end, np.flatnonzero(first)), len(self._bytes))
        for at, stop in zip(start[first].tolist(), end.tolist(), strict=True):
            self._map.madvise(mmap.MADV_WILLNEED, at, stop - at)

    def tokens(self, ids) -> np.ndarray:
        """uint16 [B, 77], the captions' tokens."""
        return self._gather("tokens", ids, 0, CONTEXT)

    def text_view(self, ids, k: int = 0) -> np.ndarray:
        """uint16 [B, 77], tokens of the k-th augmented version of the captions."""
        if not 0 <= k < self.num_text_views:
            raise UserError(f"{self.path} holds {self.num_text_views} text views: build it with --text-views {k + 1}.")
        return self._gather("text_views", ids, k * CONTEXT, CONTEXT)

    def caption(self, i: int) -> str:
        return self._text("caption", i)


def _pairs(ptr: np.ndarray, size: np.ndarray) -> list[tuple[int, int]]:
    """Return (pointer, size) of each value; `size` is one of each, [B], or the same for all."""
    return list(zip(ptr.tolist(), np.broadcast_to(size, ptr.shape).tolist(), strict=True))


def number_images(data, stored: np.ndarray, row: np.ndarray, end: np.ndarray) -> np.ndarray:
    """int64 [N]: number of the image of each row of `data`, in order of first appearance.

    Only files of the same `end` are read in whole, so a file without repeats costs no more than its ends. They must
    be: pictures on a white ground often share their length and more than 1,024 of their last bytes.
    """
    _, like, times = np.unique(end, return_inverse=True, return_counts=True)
    image, known = np.arange(len(row)), {}
    for i in np.flatnonzero(times[like] > 1).tolist():
        image[i] = known.setdefault(hashlib.sha256(data.jpeg(row[i])).digest(), i)
    _, first, inverse = np.unique(image[stored], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def begins_as_beton(path: Path) -> bool:
    """Whether a file's first bytes are those of the format, as also of a .beton that is cut short."""
    with path.open("rb") as file:
        return file.read(2) == (2).to_bytes(2, "little")


def temporary(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(path.name + ".tmp")


def holds(tmp: Path, samples: int, free: int) -> bool:
    """Whether a temporary file still has what a save left in it."""
    return tmp.exists() and (samples == 0 or tmp.stat().st_size >= free)


class BetonWriter:
    """Writes a .beton file sample by sample; a context manager.

    `capacity` bounds the number of samples (the metadata precede the values, so their room is reserved); fewer may
    follow. The file appears under its name when the block ends well. With a `journal`, save() makes what was added
    durable, and a writer that is given the journal's entries of a job that was cut short goes on from the last.
    After an error, what was saved is left, unless the journal was cleared; else nothing. `built` is as in Beton.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        capacity: int,
        text_views: int,
        labelled: bool,
        journal: Journal | None = None,
        built: Mapping[str, Any] | None = None,
    ):
        self.path = Path(path)
        fields = [(IMAGE_TYPE, "image", b""), (ARRAY_TYPE, "tokens", array_arguments(CONTEXT))]
        if text_views:
            fields.append((ARRAY_TYPE, "text_views", array_arguments(text_views, CONTEXT)))
        fields += [(BYTES_TYPE, "caption", built_arguments(built or {})), (INT_TYPE, "row_id", b"")]
        if labelled:
            fields += [(INT_TYPE, "label", b""), (BYTES_TYPE, "class_name", b"")]
        self._fields = np.array([*fields, (INT_TYPE, "checksum", b"")], FIELD)
        self._descriptors = zlib.crc32(self._fields.tobytes())
        self._metadata = np.zeros(capacity, record_of(self._fields))
        self._records = bytes_of(self._metadata)
        self._text_shape = (text_views, CONTEXT)
        self._tables = HEADER.itemsize + self._fields.nbytes  # where the metadata begin
        self._journal = journal or Journal(self.path.with_name(self.path.name + ".journal"), "")

    def __enter__(self) -> BetonWriter:
        self._tmp = temporary(self.path)
        self._count = self._written = 0  # samples added; samples whose metadata are in the file
        self._free = math.ceil((self._tables + self._metadata.nbytes) / PAGE) * PAGE  # where the next value goes
        if self._journal.entries:
            self._file = self._tmp.open("r+b")
            self._go_on(**self._journal.entries[-1]["writer"])
        else:
            self._journal.clear()  # another job's must not outlive its file
            self._file = self._tmp.open("wb")
        self._file.seek(self._free)
        return self

    def _go_on(self, samples: int, free: int) -> None:
        """Take up a file that holds so many samples; what follows them is cut off."""
        self._file.truncate(free)
        self._file.seek(self._tables)
        stored = self._file.read(samples * self._metadata.itemsize)
        self._metadata[:samples] = np.frombuffer(stored, self._metadata.dtype)
        self._count, self._written, self._free = samples, samples, free

    def add(
        self,
        *,
        jpeg: bytes | None,
        width: int,
        height: int,
        tokens: np.ndarray,
        text_views: np.ndarray | None,
        caption: str,
        row_id: int,
        label: int | None = None,
        class_name: str | None = None,
        jpeg_crc: int | None = None,
    ) -> None:
        """Append a sample: tokens uint16 [77], text_views uint16 [K, 77]; jpeg None: it shares that of the one before.

        `jpeg_crc` is zlib.crc32(jpeg) where the caller knows it. ValueError: the sample does not fit into a page.
        """
        values = {} if jpeg is None else {"image": bytes(jpeg)}
        values["tokens"] = np.asarray(tokens, "<u2").reshape(CONTEXT).tobytes()
        if self._text_shape[0]:
            values["text_views"] = np.asarray(text_views, "<u2").reshape(self._text_shape).tobytes()
        values["caption"] = caption.encode()
        if class_name is not None:
            values["class_name"] = class_name.encode()
        sizes = [len(value) for value in values.values()]
        if sum(sizes) > PAGE:
            raise ValueError(f"a sample of {sum(sizes):,} bytes, of at most {PAGE:,}")

        if self._free % PAGE + sum(sizes) > PAGE:
            self._free = math.ceil(self._free / PAGE) * PAGE
            self._file.seek(self._free)
        ptr = np.cumsum([self._free, *sizes])
        spans = dict(zip(values, zip(ptr, sizes, strict=False), strict=True))
        record = {name: span if name in ("caption", "class_name") else span[0] for name, span in spans.items()}
        before = self._metadata[self._count - 1]
        image_ptr = before["image"]["ptr"] if jpeg is None else ptr[0]
        record |= {"image": (0, width, height, image_ptr), "row_id": row_id, "label": label, "checksum": 0}
        self._metadata[self._count] = tuple(record[name] for name in names_of(self._metadata.dtype))
        if jpeg is None:
            jpeg_crc = int(before["checksum"]) >> 32 & 0xFFFFFFFF
        elif jpeg_crc is None:
            jpeg_crc = zlib.crc32(jpeg)
        parts = [self._records[self._count, :-8], *(value for name, value in values.items() if name != "image")]
        self._metadata["checksum"][self._count] = checksum(self._descriptors, jpeg_crc, parts)
        self._file.writelines(values.values())
        self._free = int(ptr[-1])
        self._count += 1

    def save(self, **more) -> None:
        """Put all that was added on the disk, and then a line in the journal: `more`, and where to go on."""
        self._write_metadata()
        self._sync()
        self._journal.append({"writer": {"samples": self._count, "free": self._free}, **more})

    def _write_metadata(self) -> None:
        self._file.seek(self._tables + self._written * self._metadata.itemsize)
        self._file.write(self._metadata[self._written : self._count].tobytes())
        self._file.seek(self._free)
        self._written = self._count

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _allocations(self, start: int, end: int) -> np.ndarray:
        """Allocation table of some samples. An image that several share lies before the values of the first of them."""
        ptr, tokens = self._metadata["image"]["ptr"][: self._count], self._metadata["tokens"]
        first = np.searchsorted(ptr, ptr[start:end])
        size = tokens[first] - ptr[start:end]
        return allocations(self._metadata[start:end], np.arange(start, end), size, self._text_shape[0])

    def _finish(self) -> None:
        self._write_metadata()
        for start in range(0, self._count, ROWS):
            self._file.write(self._allocations(start, min(start + ROWS, self._count)).tobytes())
        header = np.array((2, len(self._fields), PAGE, self._count, self._free), HEADER)
        self._file.seek(0)
        self._file.write(header.tobytes() + self._fields.tobytes())
        self._sync()
        self._file.close()
        os.replace(self._tmp, self.path)
        sync(self.path.parent)
        self._journal.clear()

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            with suppress(OSError):  # on a full disk, closing tries once more to write what is left
                self._file.close()
            if not self._journal.entries:
                discard(self._tmp)
