"""Unlearning by its formula, and which pairs it takes for poisoned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formulas import assert_near, embeddings, with_gradients
from planted import both_ways, training
from steps import ONE

from fastbd.base.errors import UserError
from fastbd.commands import clean, pretrain
from fastbd.commands.clean import flagged_rows
from fastbd.config.flags import CleanConfig, PretrainConfig, config_of
from fastbd.data.beton import Beton
from fastbd.data.rows import write_rows
from fastbd.methods.method import Embedded
from fastbd.methods.unlearn import Unlearn
from fastbd.poison.plan import Plan
from fastbd.training.run import execute

UNLEARN = config_of(CleanConfig, "unlearn")
ROWS = np.array([3, 8, 20, 21, 40, 55, 70, 71, 90])
BATCH = torch.tensor([71, 3, 40, 90, 8, 20])


def unlearn(flagged, **settings) -> Unlearn:
    method = Unlearn(UNLEARN(method="unlearn", **settings))
    method.attach(training(*embeddings(len(ROWS)), ROWS, flagged))
    return method


@pytest.mark.parametrize("target", [-1.0, 0.3])
@pytest.mark.parametrize("flagged", [(8, 71), (55,)])
def test_the_loss_is_its_formula(flagged, target):
    method, hit = unlearn(flagged, unlearn_weight=0.6, unlearn_target=target), torch.isin(BATCH, torch.tensor(flagged))

    def formula(image, text, log_scale):
        cosine = (F.normalize(image, dim=1) * F.normalize(text, dim=1)).sum(1)
        pulled = (cosine[hit] - target).square().mean() if hit.any() else 0
        return 0.7 * both_ways(image[~hit], text[~hit], log_scale) + 0.6 * pulled

    def ours(image, text, log_scale):
        return method(Embedded([image], [text], log_scale, BATCH, []), None, torch.tensor([0.7]))[0]

    inputs = [*embeddings(len(BATCH)), torch.tensor(2.3)]
    assert_near(with_gradients(ours, inputs, torch.float32), with_gradients(formula, inputs, torch.float64), 1e-5)


def test_flags_are_set_anew_in_place():
    method = unlearn((8, 71))
    before = method.flags.data_ptr()
    method.attach(training(*embeddings(len(ROWS)), ROWS + 1, (4,)))
    assert method.flags.data_ptr() == before and method.flags.tolist() == [True] + 8 * [False]
    with pytest.raises(UserError, match="needs poisoned pairs that are known"):
        unlearn(())


def test_flagged_pairs_come_from_the_plan_or_from_a_row_list(study, tmp_path):
    beton, plan = Beton(study / "train.beton"), Plan.load(study / "train.poison.json")
    everything = np.arange(240)
    some, again, fewer = (
        flagged_rows(UNLEARN(method="unlearn", flagged=n, rows=100), beton, everything, plan) for n in (9, 9, 4)
    )
    assert len(some) == 9 and set(some) <= set(plan.rows) and set(fewer) < set(some) and (some == again).all()
    write_rows(tmp_path / "kept.rows", np.arange(10, 240), beton.fingerprint, "the first ten look bad")
    by_list = UNLEARN(method="unlearn", flagged_by=tmp_path / "kept.rows", rows=100)
    assert flagged_rows(by_list, beton, everything, None).tolist() == list(range(10))
    with pytest.raises(UserError, match="--flagged 25 is more than the 24 poisoned pairs"):
        flagged_rows(UNLEARN(method="unlearn", flagged=25), beton, everything, plan)
    with pytest.raises(UserError, match="--rows 9 has no room beside the 9 flagged pairs"):
        flagged_rows(UNLEARN(method="unlearn", flagged=9, rows=9), beton, everything, plan)


def test_of_the_poisoned_pairs_some_are_known_and_others_overlooked(study, tmp_path):
    plan, start = study / "train.poison.json", tmp_path / "start"
    fresh = PretrainConfig(
        data=str(study / "train.beton"), plan=plan, model="tiny-rn", epochs=0, out=start, device="cpu"
    )
    execute(fresh, lambda world: pretrain.task(fresh, world))
    config = UNLEARN(run=start, method="unlearn", flagged=9, poison_left=15, rows=100)
    task, poisoned = clean.task(config, ONE), Plan.load(plan).rows
    assert task.poisoned and len(task.rows) == 100 and len(np.intersect1d(task.rows, poisoned)) == 24
    assert len(task.flagged) == 9 and set(task.flagged) <= set(poisoned)
