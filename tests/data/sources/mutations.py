"""Damage to files, drawn from a seed: what disks, editors, half-written programs and attackers do."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence

COUNT = int(os.environ.get("FASTBD_MUTATIONS", 200))
"""Mutations of each kind of source that a test tries; 3,000 take minutes."""

SPECIAL = (
    b'"', b'""', b"'", b",", b";", b"\t", b"|", b"\n", b"\r", b"\r\n", b"\n\n", b"\0", b"\xff", b"\xef\xbb\xbf",
    b"\xc3", b"\xed\xa0\xbd", b"\xe2\x80\xa8", b"\\", b"\\ud83d", b"{", b"}", b"[", b"]", b":", b"null", b"NaN",
    b"1e999", b"9" * 5000, b"[" * 5000, b" ", b"../", b"/", b"=", b"\x1a",
)  # fmt: skip


def mutations(data: bytes, count: int = COUNT, seed: int = 0, special: Sequence[bytes] = SPECIAL) -> Iterator[bytes]:
    """`count` damaged versions of the data, each with one to three changes and none the same as the data."""
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        damaged = data
        while damaged == data:
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                damaged = rng.choice(CHANGES)(damaged, rng, special)
        yield damaged


def _span(data: bytes, rng: random.Random) -> tuple[int, int]:
    """(begin, end) of a span that is mostly short."""
    begin = rng.randrange(len(data) + 1)
    return begin, min(len(data), begin + int(len(data) ** rng.random()))


def _flip(data: bytes, rng: random.Random, special: Sequence[bytes]) -> bytes:
    if not data:
        return data
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def _overwrite(data: bytes, rng: random.Random, special: Sequence[bytes]) -> bytes:
    begin, end = _span(data, rng)
    return data[:begin] + rng.choice((bytes(end - begin), rng.randbytes(end - begin))) + data[end:]


def _delete(data: bytes, rng: random.Random, special: Sequence[bytes]) -> bytes:
    begin, end = _span(data, rng)
    return data[:begin] + data[end:]


def _duplicate(data: bytes, rng: random.Random, special: Sequence[bytes]) -> bytes:
    begin, end = _span(data, rng)
    return data[:end] + data[begin:]


def _splice(data: bytes, rng: random.Random, special: Sequence[bytes]) -> bytes:
    begin, end = _span(data, rng)
    place = rng.randrange(len(data) + 1)
    return data[:place] + data[begin:end] + data[place:]


def _insert(data: bytes, rng: random.Random, special: Sequence[bytes]) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(special) + data[place:]


def _truncate(data: bytes, rng: random.Random, special: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


CHANGES = (_flip, _overwrite, _delete, _duplicate, _splice, _insert, _insert, _truncate)
