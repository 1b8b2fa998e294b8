"""JPEG files, damaged in the places where it makes a difference."""

from __future__ import annotations

import numpy as np

NOISE = np.random.default_rng(3).integers(0, 256, 200, np.uint8).tobytes()


def marker(jpeg: bytes, *codes: int) -> int:
    """Where the first of these markers is."""
    return min(jpeg.index(bytes((0xFF, code))) for code in codes if bytes((0xFF, code)) in jpeg)


def scan_of(jpeg: bytes) -> int:
    """Where the data of the first scan begin."""
    header = marker(jpeg, 0xDA) + 2
    return header + int.from_bytes(jpeg[header : header + 2], "big")


def damaged(jpeg: bytes) -> dict[str, tuple[bytes, bool]]:
    """Of each damage: the file, and whether its segments still follow one another to the end."""
    size, scan, frame = len(jpeg), scan_of(jpeg), marker(jpeg, 0xC0, 0xC2)
    middle, huffman = (scan + size) // 2, marker(jpeg, 0xC4)

    def over(at: int, new: bytes) -> bytes:
        return jpeg[:at] + new + jpeg[at + len(new) :]

    cut = {
        "empty": 0,
        "after its start": 2,
        "in the tables": 20,
        "before the frame": frame,
        "in the frame": frame + 6,
        "before the scan": marker(jpeg, 0xDA),
        "at the scan": scan,
        "a byte into the scan": scan + 1,
        "a tenth into the scan": scan + (size - scan) // 10,
        "in the middle of the scan": middle,
        "in the middle": size // 2,
        "1 % before the end": size - size // 100,
        "3 bytes": size - 3,
        "the end marker": size - 2,
        "half the end marker": size - 1,
    }
    return {
        **{f"cut: {name}": (jpeg[:at], False) for name, at in cut.items()},
        "zeros: second half": (over(size // 2, bytes(size - size // 2)), False),
        "zeros: scan": (over(scan, bytes(size - scan)), False),
        "zeros: end marker": (over(size - 2, bytes(2)), False),
        "zeros: headers": (over(0, bytes(200)), False),
        "zeros: 20 bytes of the scan": (over(middle, bytes(20)), True),
        "an unknown marker in the scan": (over(middle, b"\xff\x40"), False),
        "noise in the scan": (over(middle, NOISE), False),
        "a bit of the scan": (over(middle, bytes([jpeg[middle] ^ 16])), True),
        "an early end marker": (over(middle, b"\xff\xd9"), True),
        "no such Huffman code": (over(huffman + 5, b"\xff" * 16), True),
        "another height": (over(frame + 5, b"\x01\x80"), True),
        "no image": (b"no image", False),
        "another format": (b"GIF89a" + bytes(30), False),
    }


def harmless(jpeg: bytes) -> dict[str, bytes]:
    """The file with what a decoder skips."""
    scan = marker(jpeg, 0xDA)
    return {
        "as it is": jpeg,
        "zeros behind it": jpeg + bytes(100),
        "noise behind it": jpeg + NOISE,
        "another file behind it": jpeg + jpeg,
        "a marker filled up": jpeg[:scan] + b"\xff\xff" + jpeg[scan:],
        "a comment that looks like an end": jpeg[:scan] + b"\xff\xfe\x00\x06\xff\xd9\xff\xda" + jpeg[scan:],
    }
