"""Which pairs are dropped, and what epochs are made of then."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import pairs_of, training

from fastbd.base.errors import UserError
from fastbd.config.flags import PretrainConfig
from fastbd.methods.progressive import Progressive

ROWS = 2 * np.arange(10) + 5


def test_the_most_similar_pairs_go_for_good():
    cosine = torch.tensor([0.1, 0.9, 0.3, 0.8, -0.5, 0.7, 0.0, 0.6, 0.2, 0.4])
    around = training(*pairs_of(cosine), ROWS)
    method = Progressive(PretrainConfig(remove_epochs=(1, 3), remove_fraction=0.3))
    method.attach(around)
    left = []
    for epoch in range(5):
        method.begin(epoch, around)
        left.append(np.unique(method.rows(epoch, ROWS)))
        assert len(method.rows(epoch, ROWS)) == 10
    third = ROWS[[0, 2, 4, 6, 7, 8, 9]]  # without 0.9, 0.8, 0.7; then 30 % of 7 are 2 more: 0.6, 0.4
    fifth = ROWS[[0, 2, 4, 6, 8]]
    assert [x.tolist() for x in left] == [x.tolist() for x in (ROWS, third, third, fifth, fifth)]
    # Nothing comes a third time before all have come twice, and which come twice changes.
    twice = [np.unique(method.rows(epoch, ROWS), return_counts=True)[1].tolist() for epoch in (4, 5)]
    assert twice[0] == [2] * 5
    method.attach(around)
    method.begin(1, around)
    assert method.rows(1, ROWS).tolist() != method.rows(2, ROWS).tolist()


def test_it_needs_epochs():
    with pytest.raises(UserError, match="give --remove-epochs"):
        Progressive(PretrainConfig())
