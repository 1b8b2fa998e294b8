"""Damage to data files, and what all that a verb reads of them comes to."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from fastbd.base.errors import UserError
from fastbd.data.beton import Beton, BetonWriter
from fastbd.data.verify import check_whole

ROWS = 6


def write(path: Path, views: int, labelled: bool) -> Path:
    """A small file, whose rows 2 and 3 share an image."""
    rng = np.random.default_rng(views)
    with BetonWriter(path, ROWS, views, labelled) as writer:
        for i in range(ROWS):
            about = {"label": i % 3, "class_name": "abc"[i % 3]} if labelled else {}
            writer.add(
                jpeg=None if i == 3 else rng.bytes(60 + i),
                width=20 + i - (i == 3),
                height=10,
                row_id=7 * i,
                caption=f"caption {i} é",
                tokens=rng.integers(0, 49408, 77).astype(np.uint16),
                text_views=rng.integers(0, 49408, (views, 77)).astype(np.uint16),
                **about,
            )
    return path


def content(data: Beton) -> str:
    """A digest of all that is read of a file, but for its fingerprint."""
    rows, digest = np.arange(len(data)), hashlib.sha256()
    named = data.class_names
    for column in (data.width, data.height, data.row_id, data.image_of, np.array(-1 if named is None else data.labels)):
        digest.update(np.ascontiguousarray(column).tobytes() + b"|")
    for k in range(data.num_text_views):
        digest.update(data.text_view(rows, k).tobytes())
    digest.update(data.tokens(rows).tobytes() + repr(named).encode())
    for i in rows.tolist():
        digest.update(data.jpeg(i).tobytes() + data.caption(i).encode() + b"|")
    return digest.hexdigest()


def read(path: Path) -> tuple[str, str, bool]:
    """(content, fingerprint, whether it can be verified, and is whole). UserError."""
    data = Beton(path)
    found = content(data), data.fingerprint
    if data.has_checksums:
        check_whole(data, quiet=True)
    return *found, data.has_checksums


def tables_and_values(raw: bytes) -> np.ndarray:
    """Places of the bytes that mean something: the long rest of the first page is padding."""
    used = np.frombuffer(raw, np.uint8) != 0
    places = np.flatnonzero(used)
    near = np.unique(np.clip(places[:, None] + np.arange(-2, 9), 0, len(raw) - 1))
    return near


def mutated(raw: bytes, places: np.ndarray, rng: np.random.Generator, kinds: int = 5) -> bytes:
    """The bytes with a flipped bit, random bytes, a run of zeros, a cut, or a block copied from elsewhere."""
    data, at, length = bytearray(raw), int(rng.choice(places)), int(rng.integers(1, 64))
    match int(rng.integers(kinds)):
        case 0:
            data[at] ^= 1 << int(rng.integers(8))
        case 1:
            data[at : at + length] = rng.bytes(length)[: len(data) - at]
        case 2:
            data[at : at + length] = bytes(min(length, len(data) - at))
        case 3:
            del data[at:]
        case 4:
            source = int(rng.choice(places))
            data[at : at + length] = data[source : source + length][: len(data) - at].ljust(
                min(length, len(data) - at), b"\0"
            )
    return bytes(data)


def outcome(path: Path, raw: bytes, whole: tuple[str, str, bool]) -> str:
    """Write the bytes and read them: "same", "sentence", "other content", or what went wrong."""
    path.write_bytes(raw)
    try:
        found = read(path)
    except UserError as error:
        return "sentence" if path.name in str(error) else f"does not name the file: {error}"
    except Exception as error:  # the fault that is looked for
        return f"{type(error).__name__}: {error}"
    return "same" if found[0] == whole[0] else "other content"
