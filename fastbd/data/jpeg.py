"""The structure of a JPEG file, without its pixels."""

from __future__ import annotations

import re

import numpy as np

START, END, SCAN = 0xD8, 0xD9, 0xDA
FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive
TABLES = {0xC4, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # Huffman, quantisation, lines, restarts, comment, APPn
# Within a scan 0xFF is followed by 0 (it was data), a restart, or one more 0xFF that fills; all else ends the scan.
SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def is_whole(jpeg: np.ndarray) -> bool:
    """Whether the segments of a JPEG, uint8 [bytes], follow one another from its start to the marker that ends it.

    Bytes may follow that marker, as some cameras write them. True says nothing about the pixels; False may also be
    a rare kind of file (arithmetic, lossless or hierarchical coding). ITU-T T.81, annex B.
    """
    data, at, has_frame, has_scan = jpeg.tobytes(), 2, False, False
    if data[:2] != bytes((0xFF, START)):
        return False
    while True:
        while data[at : at + 2] == b"\xff\xff":
            at += 1
        if len(data) < at + 2 or data[at] != 0xFF:
            return False
        marker = data[at + 1]
        if marker == END:
            return has_scan
        if marker in FRAMES and not has_frame:
            has_frame = True
        elif not (marker in TABLES or (marker == SCAN and has_frame)):
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == SCAN:
            has_scan, found = True, SCAN_END.search(data, at)
            if not found:
                return False
            at = found.start()
