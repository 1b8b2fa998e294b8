"""Whether a PNG file holds all of its pixels."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
PASSES = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
"""First row, step, first column, step of each of Adam7's passes."""
AT_ONCE = 1 << 20  # bytes that are unpacked


def is_full(png: bytes) -> bool:
    """Whether the unpacked data are as many as the size asks for: Pillow leaves the rows that are missing black.

    False too where they cannot be unpacked so far. PNG specification (third edition), clauses 7, 8 and 11.
    """
    width, height, depth, colours, _, _, interlaced = struct.unpack(">IIBBBBB", png[16:29])
    wanted, unpacker = _length(width, height, depth * CHANNELS[colours], interlaced), zlib.decompressobj()
    try:
        for packed in _image_data(png):
            while wanted > 0 and (packed or unpacker.unconsumed_tail):
                wanted -= len(unpacker.decompress(packed, AT_ONCE))
                packed = unpacker.unconsumed_tail
            if wanted <= 0 or unpacker.eof:
                break
    except zlib.error:
        return False
    return wanted <= 0


def _length(width: int, height: int, bits: int, interlaced: int) -> int:
    """Bytes of all rows, each behind the number of its filter; `bits` of a pixel."""
    passes = PASSES if interlaced else [(0, 1, 0, 1)]
    sizes = [(len(range(top, height, down)), len(range(left, width, right))) for top, down, left, right in passes]
    return sum(rows * (1 + -(-columns * bits // 8)) for rows, columns in sizes if columns)


def _image_data(png: bytes) -> Iterator[memoryview]:
    """Data of each IDAT chunk."""
    at, view = 8, memoryview(png)
    while at + 8 <= len(png):
        length, kind = int.from_bytes(view[at : at + 4]), bytes(view[at + 4 : at + 8])
        if kind == b"IDAT":
            yield view[at + 8 : at + 8 + length]
        at += 12 + length
