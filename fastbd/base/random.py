"""Random numbers as a pure function of (seed, stream, epoch, view, sample id).

No state: any rank, batch size, decode backend or resume point draws the same numbers for a sample.
"""

from __future__ import annotations

import hashlib

import numpy as np

# Arrays of no axes: numpy would make one of a scalar in each operation.
_GOLDEN, _MIX_1, _MIX_2, _30, _27, _31, _11 = (
    np.array(value, np.uint64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 30, 27, 31, 11)
)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's output function (Steele, Lea and Flood 2014), a bijection of 64-bit words."""
    x = x ^ (x >> _30)
    x *= _MIX_1
    x ^= x >> _27
    x *= _MIX_2
    x ^= x >> _31
    return x


def _key(seed: int, stream: str, epoch: int, view: int) -> np.uint64:
    digest = hashlib.sha256(f"{stream}/{seed}/{epoch}/{view}".encode()).digest()
    return np.frombuffer(digest[:8], np.uint64)[0]


def words(seed: int, stream: str, ids, n: int, *, epoch: int = 0, view: int = 0) -> np.ndarray:
    """uint64 [len(ids), n], uniform; `stream` names the use, so that two uses never share numbers."""
    start = _mix(np.asarray(ids).astype(np.uint64) * _GOLDEN + _key(seed, stream, epoch, view))
    return _mix(start[:, None] + np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN)


def uniform(seed: int, stream: str, ids, n: int, *, epoch: int = 0, view: int = 0) -> np.ndarray:
    """float64 [len(ids), n] in [0, 1)."""
    return (words(seed, stream, ids, n, epoch=epoch, view=view) >> _11) * 2.0**-53


def normal(seed: int, stream: str, ids, n: int, *, epoch: int = 0, view: int = 0) -> np.ndarray:
    """float64 [len(ids), n], standard normal (Box-Muller)."""
    u = uniform(seed, stream, ids, 2 * n, epoch=epoch, view=view)
    return np.sqrt(-2 * np.log1p(-u[:, :n])) * np.cos(2 * np.pi * u[:, n:])


def generator(seed: int, stream: str) -> np.random.Generator:
    """A numpy generator for draws that concern a whole data set, such as a permutation."""
    return np.random.Generator(np.random.Philox(key=_key(seed, stream, 0, 0)))
