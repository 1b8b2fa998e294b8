"""The .beton format, version 2 (FFCV's): its tables, what may stand in them, and the checksum of a sample.

Layout, little endian: header, field descriptors, one metadata record a sample, pages that hold the values of a sample
back to back, and the allocation table (sample, pointer, size) up to the end of the file. FFCV reads these files.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastbd.data.tokenizer import CONTEXT

PAGE = 1 << 23  # bytes; FFCV reads whole pages, so no sample may cross a border
HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("table", "<u8")])
FIELD = np.dtype([("type", "<u1"), ("name", "S16"), ("arguments", "V1024")])
ALLOCATION = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8")])
SPAN = np.dtype([("ptr", "<u8"), ("size", "<u8")])
INT_TYPE, IMAGE_TYPE, BYTES_TYPE, ARRAY_TYPE = 1, 2, 3, 4
METADATA = {0: "<f8", INT_TYPE: "<i8", IMAGE_TYPE: IMAGE, BYTES_TYPE: SPAN, ARRAY_TYPE: "<u8", 5: SPAN, 6: "<u8"}
KNOWN = {
    "image": IMAGE_TYPE,
    "tokens": ARRAY_TYPE,
    "text_views": ARRAY_TYPE,
    "caption": BYTES_TYPE,
    "row_id": INT_TYPE,
    "label": INT_TYPE,
    "class_name": BYTES_TYPE,
    "checksum": INT_TYPE,
}
LABELS = 1 << 18  # labels of other programs' files without class names are below this, or below the number of samples


class Tables(NamedTuple):
    """Views of a file's tables, and where the values between them begin and end."""

    fields: np.ndarray
    metadata: np.ndarray
    allocations: np.ndarray
    start: int
    end: int


def read_tables(data: np.ndarray) -> Tables:
    """Return the tables of a file, uint8 [bytes]. ValueError where it has none, or they do not fit together."""
    start = HEADER.itemsize
    header = data[:start].view(HEADER)[0]
    if header["version"] != 2:
        raise ValueError(f"format version {header['version']}, not 2")
    n, table = int(header["samples"]), int(header["table"])
    fields = data[start : start + int(header["fields"]) * FIELD.itemsize].view(FIELD)
    record, start = record_of(fields), start + fields.nbytes
    end = start + n * record.itemsize
    known = n * int((fields["type"] > INT_TYPE).sum()) * ALLOCATION.itemsize  # values a sample, each with a row
    if len(fields) < header["fields"] or end > table or len(data) - table < known:
        raise ValueError("its end is missing")
    if "checksum" in names_of(record) and (header["page"] != PAGE or len(data) - table > known):
        raise ValueError("its header does not fit its size")
    if not n:
        raise ValueError("it holds no samples")
    return Tables(fields, data[start:end].view(record), data[table:].view(ALLOCATION), end, table)


def record_of(fields: np.ndarray) -> np.dtype:
    """The metadata record: a C struct of the fields in their order. ValueError for fields that cannot be."""
    names, kinds = [name.decode() for name in fields["name"]], fields["type"].tolist()
    for name, kind in zip(names, kinds, strict=True):
        if kind not in METADATA or kind != KNOWN.get(name, kind):
            raise ValueError(f"its field {name!r} is of type {kind}")
    if "image" not in names or "" in names or len(set(names)) < len(names):
        raise ValueError("its fields lack the image, or have no names of their own")
    return np.dtype([(name, METADATA[kind]) for name, kind in zip(names, kinds, strict=True)], align=True)


def names_of(record: np.dtype) -> tuple[str, ...]:
    """Return the names of the record's fields."""
    return record.names or ()


def count_text_views(fields: np.ndarray) -> int:
    """Return the number of text views of a sample. ValueError where arrays of tokens are none of 77 16-bit numbers."""
    arguments = {name.decode(): bytes(value) for name, value in zip(fields["name"], fields["arguments"], strict=True)}
    views = int.from_bytes(arguments.get("text_views", b"")[:8], "little")
    for name, shape in (("tokens", (CONTEXT,)), ("text_views", (views, CONTEXT))):
        if name in arguments and (
            arguments[name] != array_arguments(*shape).ljust(1024, b"\0") or not 0 < shape[0] <= PAGE // (2 * CONTEXT)
        ):
            raise ValueError(f"its {name} are not {CONTEXT} numbers of 16 bits")
    return views


def array_arguments(*shape: int) -> bytes:
    """Arguments of a uint16 array field: 32 sizes, length of the dtype's description, the description."""
    dtype = json.dumps(np.dtype("<u2").descr).encode()
    sizes = [*shape, *[0] * (32 - len(shape)), len(dtype)]
    return np.array(sizes, "<u8").tobytes() + dtype


def built_arguments(flags: Mapping[str, Any]) -> bytes:
    """Arguments of the field `caption`, which FFCV does not read: flags of build as JSON; none where there are none."""
    return json.dumps(flags).encode() if flags else b""


def read_built(fields: np.ndarray) -> dict[str, Any]:
    """The inverse of built_arguments, from the fields of a file. ValueError where they are none of its."""
    told = next((bytes(value).rstrip(b"\0") for value in fields["arguments"][fields["name"] == b"caption"]), b"")
    flags = json.loads(told) if told else {}
    if not isinstance(flags, dict):
        raise ValueError("what it says of its build is no table of flags")
    return flags


def check_ranges(tables: Tables, jpeg_size: np.ndarray, text_views: int) -> None:
    """Raise a ValueError where a value lies outside of the pages, or a size or a label is one that cannot be."""
    metadata, start, end = tables.metadata, tables.start, tables.end
    image = metadata["image"]
    if not min(image["width"].min(), image["height"].min(), jpeg_size.min()):
        raise ValueError("an image has no size")
    for name, (ptr, size) in spans(metadata, jpeg_size, text_views).items():
        if ptr.min() < start or ptr.max() > end or np.max(size) > end - start or (ptr + size).max() > end:
            raise ValueError(f"a {name} lies outside of its pages")
    names = names_of(metadata.dtype)
    if "label" in names:
        most = len(metadata) if "class_name" in names else max(LABELS, len(metadata))
        if metadata["label"].min() < 0 or metadata["label"].max() >= most:
            raise ValueError("its labels are not those of classes")


def spans(metadata: np.ndarray, jpeg_size: np.ndarray, text_views: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the pointers, uint64 [N], and sizes in bytes, uint64 [N] or a scalar, of each field with values, by name.

    They come in the order of the fields, in which the values lie in the file.
    """
    fixed = {"image": jpeg_size, "tokens": np.uint64(2 * CONTEXT), "text_views": np.uint64(2 * CONTEXT * text_views)}
    found = {}
    for name in names_of(metadata.dtype):
        column = metadata[name]
        if name in fixed:
            found[name] = (column["ptr"] if name == "image" else column), fixed[name]
        elif column.dtype == SPAN:
            found[name] = column["ptr"], column["size"]
    return found


def bytes_of(metadata: np.ndarray) -> np.ndarray:
    """The records [N] as uint8 [N, bytes]; copies of records may leave out what lies between their fields."""
    return metadata.view(np.uint8).reshape(len(metadata), metadata.itemsize)


def allocations(metadata: np.ndarray, rows: np.ndarray, jpeg_size: np.ndarray, text_views: int) -> np.ndarray:
    """Allocation table, [B, values], of `rows` int64 [B] with this metadata [B], as `build` writes it."""
    columns = spans(metadata, jpeg_size, text_views).values()
    table = np.empty((len(rows), len(columns)), ALLOCATION)
    table["sample"] = rows[:, None]
    for k, (ptr, size) in enumerate(columns):
        table["ptr"][:, k], table["size"][:, k] = ptr, size
    return table


def checksum(descriptors: int, image: int, parts: Iterable) -> int:
    """Return the int64 of a sample's field `checksum`, which is the last of its record.

    The high half is the CRC-32 of its image; the low half is that of the file's field descriptors, which is continued
    over `parts`: the bytes of the record before this field, and those of the sample's other values in their order.
    """
    crc = descriptors
    for part in parts:
        crc = zlib.crc32(part, crc)
    return int(np.uint64(image << 32 | crc).astype(np.int64))
