import hashlib

import numpy as np

from fastbd.base import random


def test_a_sample_draws_the_same_in_any_batch():
    whole = random.uniform(3, "x", np.arange(100), 7, epoch=2, view=1)
    part = random.uniform(3, "x", [42, 7], 7, epoch=2, view=1)
    assert np.array_equal(part, whole[[42, 7]])


def splitmix64(start: int, n: int) -> list[int]:
    """The first n numbers of Steele, Lea and Flood's generator, in Python's whole numbers."""
    made = []
    for k in range(1, n + 1):
        z = (start + k * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        made.append(z ^ z >> 31)
    return made


def test_words_are_splitmix64_started_at_a_mixed_id_and_key():
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]  # published values
    ids = [0, 1, 77, 2**40, 2**63 - 1]
    key = int.from_bytes(hashlib.sha256(b"x/3/2/1").digest()[:8], "little")
    starts = [splitmix64(((i - 1) * 0x9E3779B97F4A7C15 + key) % 2**64, 1)[0] for i in ids]
    words = np.array([splitmix64(start, 5) for start in starts], np.uint64)
    assert np.array_equal(random.words(3, "x", ids, 5, epoch=2, view=1), words)
    uniform = [[(word >> 11) / 2**53 for word in row] for row in words.tolist()]
    assert random.uniform(3, "x", ids, 5, epoch=2, view=1).tolist() == uniform


def test_seed_stream_epoch_view_and_id_all_matter():
    base = random.uniform(0, "a", [5], 4)
    others = [
        random.uniform(1, "a", [5], 4),
        random.uniform(0, "b", [5], 4),
        random.uniform(0, "a", [6], 4),
        random.uniform(0, "a", [5], 4, epoch=1),
        random.uniform(0, "a", [5], 4, view=1),
    ]
    assert all(not np.any(base == other) for other in others)


def test_uniform_and_normal_have_their_moments():
    u, z = random.uniform(0, "u", np.arange(500), 400), random.normal(0, "z", np.arange(500), 400)
    n = u.size
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / np.sqrt(12 * n) and abs(u.var() - 1 / 12) < 1e-3
    assert abs(z.mean()) < 5 / np.sqrt(n) and abs(z.std() - 1) < 0.01
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 5 / np.sqrt(n)
    assert np.histogram(u, 64, (0, 1))[0].std() < 3 * np.sqrt(n / 64)
