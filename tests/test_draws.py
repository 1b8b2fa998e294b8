import numpy as np

from fastbd import draws


def test_a_sample_draws_the_same_in_any_batch():
    whole = draws.uniform(3, "x", np.arange(100), 7, epoch=2, view=1)
    part = draws.uniform(3, "x", [42, 7], 7, epoch=2, view=1)
    assert np.array_equal(part, whole[[42, 7]])


def test_seed_stream_epoch_view_and_id_all_matter():
    base = draws.uniform(0, "a", [5], 4)
    others = [
        draws.uniform(1, "a", [5], 4), draws.uniform(0, "b", [5], 4), draws.uniform(0, "a", [6], 4),
        draws.uniform(0, "a", [5], 4, epoch=1), draws.uniform(0, "a", [5], 4, view=1),
    ]  # fmt: skip
    assert all(not np.any(base == other) for other in others)


def test_uniform_and_normal_have_their_moments():
    u, z = draws.uniform(0, "u", np.arange(500), 400), draws.normal(0, "z", np.arange(500), 400)
    n = u.size
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / np.sqrt(12 * n) and abs(u.var() - 1 / 12) < 1e-3
    assert abs(z.mean()) < 5 / np.sqrt(n) and abs(z.std() - 1) < 0.01
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 5 / np.sqrt(n)
    assert np.histogram(u, 64, (0, 1))[0].std() < 3 * np.sqrt(n / 64)
