from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from cleanings import cleaning, resumed_after, same, start, state

from fastbd import cli
from fastbd.base.errors import UserError
from fastbd.config.flags import CleanConfig
from fastbd.data.beton import Beton
from fastbd.methods.head import Head
from fastbd.methods.method import Embedded
from fastbd.methods.supervised import Supervised
from fastbd.models.clip import tower_of

FLAGS = ("--method", "supervised", "--data", "val.beton", "--batch-size", 12)


@pytest.fixture
def here(study, monkeypatch):
    monkeypatch.chdir(study)
    start(study)
    return study


def test_loss_and_gradients_are_those_of_a_linear_layer_on_the_embedding_as_it_is():
    noise = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(4, 8, generator=noise).requires_grad_() for _ in range(2))
    method = Supervised(CleanConfig())
    method.head = Head(5, 8, 3, torch.device("cpu"))
    method.know(np.array([1, 2, 4, 8, 9]), torch.device("cpu"))
    method.head.learn(np.array([2, 0, 1, 1, 0]))
    method.head.renew(np.random.default_rng(0), std=1.0)
    loss, _ = method(Embedded([images], [texts], torch.tensor(2.0), torch.tensor([8, 1, 9, 4]), []))
    inputs = [images, method.head.linear.weight, method.head.linear.bias]
    x, w, b = (y.detach().double().requires_grad_() for y in inputs)
    logits = x @ w.T + b
    expected = (logits.exp().sum(1).log() - logits[range(4), [1, 2, 0, 1]]).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    grads = [g.double() for g in torch.autograd.grad(loss, inputs)]
    torch.testing.assert_close(grads, list(torch.autograd.grad(expected, (x, w, b))), rtol=1e-5, atol=1e-6)


def test_the_image_tower_learns_the_classes_and_the_rest_stays(here, tmp_path):
    run = cleaning(tmp_path / "run", *FLAGS, "--epochs", 8)
    model, head = run.opened.model, run.opened.method.head
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(head.labels, torch.from_numpy(Beton("val.beton").labels[run.opened.training.rows]))
    assert head.linear.weight.std().item() == pytest.approx((3 * 32) ** -0.5, rel=0.1)  # nn.Linear's own
    run.train()
    after = state(run)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], after[name])}
    assert moved == {name for name, _ in model.named_parameters() if tower_of(name) == "image"}
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    # The tuned tower is a run's: it is evaluated with the old text tower, and cleaned further.
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    further = (
        "clean",
        "--run",
        tmp_path / "run",
        "--data",
        "train.beton",
        "--epochs",
        1,
        "--batch-size",
        24,
        "--device",
        "cpu",
        "--force",
        "--eval-every",
        0,
        "--out",
        tmp_path / "further",
    )
    assert cli.main(list(map(str, further))) == 0
    start_of_it = json.loads((tmp_path / "further/metrics.jsonl").read_text().splitlines()[0])
    assert start_of_it["top1"] == json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["top1"]


def test_steps_that_are_stopped_and_gone_on_with_are_the_whole(here, tmp_path):
    whole = cleaning(tmp_path / "whole", *FLAGS)
    whole.train()
    halves = resumed_after(cleaning(tmp_path / "halves", *FLAGS), 3)
    assert 3 <= halves.opened.done < whole.opened.total
    halves.train()
    assert same(state(whole), state(halves))


def test_images_without_classes_are_refused(here, tmp_path):
    with pytest.raises(UserError, match="--method supervised needs images with classes"):
        cleaning(tmp_path / "run", *FLAGS[:2])
