"""Heavy weight decay (Verma et al., arXiv 2311.14948, try 0.2 to 100): the one that is given is the one that applies.

Their program loads the checkpoint's optimizer, and with it the decay of pre-training.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cleanings import cleaning, start, state

from fastbd.base.learning_rates import learning_rates
from fastbd.data.beton import Beton


@pytest.mark.parametrize(
    ("flags", "decay"),
    [((), 10), (("--method", "finetune"), 10), (("--keep-optimizer",), 0.1)],
    ids=["cleanclip", "finetune", "as published"],
)
def test_what_has_no_gradient_shrinks_by_rate_times_decay(flags, decay, study, monkeypatch, tmp_path):
    """Words that no caption has."""
    monkeypatch.chdir(study)
    start(study)
    run = cleaning(tmp_path / "run", "--weight-decay", 10, "--warmup", 3, "--lr", 1e-2, "--rows", 72, *flags)
    before = {name: value.clone() for name, value in state(run).items()}
    run.train()
    after, beton = state(run), Beton("train.beton")
    rows = np.arange(len(beton))
    used = np.union1d(beton.tokens(rows), beton.text_view(rows))
    absent = np.setdiff1d(np.arange(len(before["token_embedding.weight"])), used)
    share = np.prod(1 - decay * learning_rates(1e-2, warmup=3, total=run.opened.total).double().numpy())
    assert share < (0.8 if decay == 10 else 0.999) and len(absent) > 40_000
    torch.testing.assert_close(
        after["token_embedding.weight"][absent], before["token_embedding.weight"][absent] * share, rtol=1e-5, atol=1e-9
    )
