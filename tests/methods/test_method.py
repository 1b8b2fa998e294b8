"""The seam: what a method can do to a step."""

from __future__ import annotations

import copy

import pytest
import torch
from steps import BATCH, BOTH, MMCL, ONE, RATES, batch_of
from torch import nn

from fastbd.methods.method import Method
from fastbd.models import create
from fastbd.models.batchnorm import batch_norms
from fastbd.training.optim import make_optimizer
from fastbd.training.step import Step


class Probe(Method):
    """A linear head on the image embedding, which learns a number that belongs to the row."""

    def __init__(self, objective=MMCL):
        super().__init__(objective)
        torch.manual_seed(0)
        self.head = nn.Linear(32, 1)
        self.register_buffer("of_row", torch.linspace(-1, 1, BATCH))

    def forward(self, embedded, group=None, weights=None):
        loss, parts = super().forward(embedded, group, weights)
        error = (self.head(embedded.images[0].float())[:, 0] - self.of_row[embedded.rows]).square().mean()
        return loss + error, parts | {"error": error.detach()}


class Still(Method):
    frozen_norms = fixed_scale = True


def made(method: Method, model=None, parts: int = 1) -> Step:
    model = model or create("tiny-rn", 0)
    optimizer = make_optimizer(model.train(), method, lr=1.0, weight_decay=0.1, betas=(0.9, 0.99), eps=0.01)
    return Step(model, method, optimizer, RATES, precision="fp32", world=ONE, parts=parts)


def test_a_methods_own_parameters_learn_by_row():
    step = made(Probe())
    errors = [float(step(batch_of(1))["error"]) for _ in range(8)]
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("objective", [MMCL, BOTH], ids=["one view", "two views"])
def test_in_parts_they_have_the_gradient_of_the_whole(objective):
    results = []
    for parts in (1, 2):
        model = create("tiny-vit", 0)
        step = made(Probe(objective), model, parts)
        step(batch_of(2 if objective.ssl_weight else 1, parts=parts))
        results.append([*model.state_dict().values(), *step.method.state_dict().values()])
    for whole, split in zip(*results, strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5)


def test_norms_and_temperature_can_be_left_alone():
    model = create("tiny-rn", 0)
    before = copy.deepcopy(model.state_dict())
    step = made(Still(MMCL), model)
    step(batch_of(1))
    model.train()  # as what follows in the same memory does
    step.restart(RATES)
    step(batch_of(1))
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and "logit_scale" not in changed
    assert not {name for name in changed if "running" in name}
    assert all(norm.weight is not None and not norm.training for norm in batch_norms(model))


def test_a_step_that_starts_again_does_what_a_new_one_does():
    start = create("tiny-rn", 0)
    used, fresh = made(Probe(), copy.deepcopy(start)), made(Probe(), copy.deepcopy(start))
    begin = copy.deepcopy(used.method.state_dict())
    places = {name: p.data_ptr() for name, p in used.model.named_parameters()}
    for seed in range(3):
        used(batch_of(1, seed))
    used.model.load_state_dict(start.state_dict())
    used.method.load_state_dict(begin)
    used.restart(RATES)
    for seed in range(3):
        ours, theirs = used(batch_of(1, seed)), fresh(batch_of(1, seed))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert places == {name: p.data_ptr() for name, p in used.model.named_parameters()}
