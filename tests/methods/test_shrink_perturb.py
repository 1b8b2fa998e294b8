from __future__ import annotations

import json

import pytest
import torch
from cleanings import cleaning, start, state

from fastbd.base import random
from fastbd.models import create


@pytest.fixture
def here(study, monkeypatch):
    monkeypatch.chdir(study)
    start(study)
    return study


def test_each_parameter_is_shrunk_and_disturbed_and_no_buffer(here, tmp_path):
    before = torch.load(here / "runs/start/ckpt_last.pt", weights_only=True)["model"]
    flags = ("--method", "shrink_perturb", "--shrink", 0.6, "--perturb", 0.2)
    found = [state(cleaning(tmp_path / str(seed), *flags, "--seed", seed)) for seed in (3, 4)]
    noise = [dict(create("tiny-rn", noise_seed(seed)).named_parameters()) for seed in (3, 4)]
    assert {"logit_scale", "visual.bn1.weight"} <= noise[0].keys() and "visual.bn1.running_var" in before
    for name, old in before.items():
        for after, fresh in zip(found, noise, strict=True):
            expected = 0.6 * old.double() + 0.2 * fresh[name].double() if name in fresh else old
            torch.testing.assert_close(after[name].double(), expected.double(), rtol=1e-6, atol=1e-7)
    assert not torch.equal(found[0]["text_projection"], found[1]["text_projection"])


def noise_seed(seed: int) -> int:
    return int(random.generator(seed, "shrink-perturb").integers(2**63))


def test_with_the_seed_of_the_pre_training_the_fresh_weights_are_not_those_that_the_model_began_with(here, tmp_path):
    """runs/start, of seed 0, has never been trained."""
    before = torch.load(here / "runs/start/ckpt_last.pt", weights_only=True)["model"]["text_projection"]
    assert torch.equal(before, create("tiny-rn", 0).text_projection)
    flags = ("--method", "shrink_perturb", "--shrink", 0, "--perturb", 1, "--seed", 0)
    fresh = state(cleaning(tmp_path / "run", *flags))["text_projection"]
    together = torch.stack([before.flatten(), fresh.flatten()])
    assert abs(torch.corrcoef(together)[0, 1]) < 0.1 and fresh.std() == pytest.approx(before.std().item(), rel=0.1)


def test_then_it_is_cleanclip(here, tmp_path):
    """By 1 and by 0 nothing is changed."""
    losses = []
    for name, flags in (("plain", ()), ("same", ("--method", "shrink_perturb", "--shrink", 1, "--perturb", 0))):
        cleaning(tmp_path / name, "--epochs", 1, "--rows", 72, *flags).train()
        losses.append([json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1] and len(losses[0]) == 3
