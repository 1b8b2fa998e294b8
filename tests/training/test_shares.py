"""How a step's batch is shared out."""

from __future__ import annotations

import pytest

from fastbd.base.errors import UserError
from fastbd.training.shares import Shares


def test_a_share_is_whole_parts_of_whole_groups():
    """Two processes, 4 parts each, groups of 32 images of which a pair has two: 16 pairs are the least of a part."""
    shares = Shares(processes=2, parts=4, group=32, views=2, norms=True)
    assert shares.part(128) == 16
    shares.check(128, rows=1000)
    with pytest.raises(UserError, match="--bn-group 32 does not share out the 16 images, 2 of a pair"):
        shares.check(64, rows=1000)
