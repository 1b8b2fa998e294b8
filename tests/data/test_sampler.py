from __future__ import annotations

import numpy as np
import pytest

from fastbd.base.errors import UserError
from fastbd.data.sampler import batches, permutation


def test_permutation_holds_every_id_once():
    for n in (1, 2, 1000):
        assert sorted(permutation(n, seed=3, epoch=5)) == list(range(n))


def test_permutation_depends_on_seed_and_epoch_only():
    first = permutation(500, seed=1, epoch=2)
    assert np.array_equal(first, permutation(500, seed=1, epoch=2))
    assert not np.array_equal(first, permutation(500, seed=1, epoch=3))
    assert not np.array_equal(first, permutation(500, seed=2, epoch=2))


def test_permutation_is_uniform():
    # Where id 0 ends up over 2,000 epochs: each of 5 places 400 times, standard deviation 18.
    places = [int(np.flatnonzero(permutation(5, seed=0, epoch=epoch) == 0)[0]) for epoch in range(2000)]
    assert np.abs(np.bincount(places, minlength=5) - 400).max() < 5 * 18


@pytest.mark.parametrize("world", [2, 4, 8])
def test_global_batches_are_the_same_for_any_world_size(world):
    alone = list(batches(101, 16, seed=7, epoch=1))
    ranks = [list(batches(101, 16, seed=7, epoch=1, rank=rank, world=world)) for rank in range(world)]
    assert len(alone) == 6  # 101 // 16: the last five pairs are left out
    for step, batch in enumerate(alone):
        assert np.array_equal(np.concatenate([rank[step] for rank in ranks]), batch)
    assert len(set(np.concatenate(alone).tolist())) == 96


def test_start_skips_whole_steps():
    whole = list(batches(101, 16, seed=7, epoch=1, rank=1, world=2))
    rest = list(batches(101, 16, seed=7, epoch=1, rank=1, world=2, start=4))
    assert [b.tolist() for b in rest] == [b.tolist() for b in whole[4:]]


def test_a_batch_that_cannot_be_shared_is_the_users_mistake():
    with pytest.raises(UserError, match="16 cannot be shared by 3"):
        next(batches(101, 16, seed=0, epoch=0, world=3))
