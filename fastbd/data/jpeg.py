"""The structure of a JPEG file, without its pixels."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

START, END, SCAN = 0xD8, 0xD9, 0xDA
BASELINE, EXTENDED, PROGRESSIVE = FRAMES = (0xC0, 0xC1, 0xC2)
TABLES = {0xC4, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # Huffman, quantisation, lines, restarts, comment, APPn
# Within a scan 0xFF is followed by 0 (it was data), a restart, or one more 0xFF that fills; all else ends the scan.
SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(marker, where it is) of each segment, in order, up to the marker that ends the image or the first that does not
    follow: its marker is 0, and it may be at the end of the data. ITU-T T.81, annex B."""
    at = 2 if data[:2] == bytes((0xFF, START)) else len(data)
    while True:
        while data[at : at + 2] == b"\xff\xff":
            at += 1
        marker = data[at + 1] if len(data) >= at + 2 and data[at] == 0xFF else 0
        known = marker in TABLES or marker in FRAMES or marker in (SCAN, END)
        yield (marker if known else 0), at
        if marker == END or not known:
            return
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == SCAN:
            found = SCAN_END.search(data, at)
            at = found.start() if found else len(data)


def is_whole(jpeg: np.ndarray) -> bool:
    """Whether the segments of a JPEG, uint8 [bytes], follow one another from its start to the marker that ends it.

    Bytes may follow that marker, as some cameras write them. True says nothing about the pixels; False may also be
    a rare kind of file (arithmetic, lossless or hierarchical coding).
    """
    markers = [marker for marker, _ in segments(jpeg.tobytes())]
    frames = [k for k, marker in enumerate(markers) if marker in FRAMES]
    return markers[-1] == END and len(frames) == 1 and SCAN in markers and frames[0] < markers.index(SCAN)


def last_scan(data: bytes) -> tuple[int, bool]:
    """(where the data of the last scan end, whether it is the only one and of a frame that is not progressive).

    The place is that of the marker that follows, or the end of the file.
    """
    found = list(segments(data))
    markers = [marker for marker, _ in found]
    end = found[len(markers) - markers[::-1].index(SCAN)][1] if SCAN in markers else len(data)
    return end, markers.count(SCAN) == 1 and PROGRESSIVE not in markers
