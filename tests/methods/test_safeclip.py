"""SafeCLIP's stages by their formulas, the mixture on planted data, the growth of the safe set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from formulas import assert_near, embeddings, with_gradients
from planted import both_ways, cross_entropy, pairs_of, training

from fastbd.base.errors import UserError
from fastbd.base.learning_rates import learning_rates
from fastbd.config.flags import PretrainConfig
from fastbd.methods.method import Embedded
from fastbd.methods.safeclip import SafeClip, upper_posterior

BATCH = torch.tensor([4, 7, 0, 9, 2, 5])
SAFE = torch.tensor([True, True, False, False, True, False])  # of the batch


def safeclip(**settings) -> SafeClip:
    return SafeClip(PretrainConfig(objective="mmcl_ssl", warm_epochs=2, **settings))


@pytest.mark.parametrize("epoch, tied, alone", [(0, [], range(6)), (2, range(6), []), (3, [0, 1, 4], [2, 3, 5])])
def test_each_stage_is_its_formula(epoch, tied, alone):
    method = safeclip()
    method.attach(training(*embeddings(10)))
    method.safe[BATCH[SAFE]] = 1
    assert method.variant(epoch) == ["ssl", "ssl", "mmcl", "split"][epoch]
    tied, alone = torch.tensor([*tied], dtype=torch.int64), torch.tensor([*alone], dtype=torch.int64)

    def formula(image, text, image_aug, text_aug, log_scale):
        mmcl = both_ways(image[tied], text[tied], log_scale) if len(tied) else 0
        halves = [
            cross_entropy(x[alone], y[alone], log_scale)
            for x, y in ((image, image_aug), (text, text_aug))
            if len(alone)
        ]
        return 0.7 * mmcl + 1.3 * sum(halves) / 2 + 0 * (image + text + image_aug + text_aug).sum()

    def ours(image, text, image_aug, text_aug, log_scale):
        embedded = Embedded([image, image_aug], [text, text_aug], log_scale, BATCH, [])
        return method(embedded, None, torch.tensor([0.7, 1.3, 0, 0]))[0]

    inputs = [*embeddings(6, count=4), torch.tensor(2.3)]
    found, true = with_gradients(ours, inputs, torch.float32), with_gradients(formula, inputs, torch.float64)
    assert_near(found, true, 1e-5)


def test_the_mixture_finds_what_was_planted():
    rng = np.random.default_rng(0)
    low, high = rng.normal(0.1, 0.05, 3000), rng.normal(0.5, 0.1, 1000)
    found = upper_posterior(torch.from_numpy(np.concatenate([low, high])).float())

    def density(x, mean, deviation, share):
        return share * np.exp(-((x - mean) ** 2) / (2 * deviation**2)) / deviation

    x = np.concatenate([low, high])
    upper = density(x, 0.5, 0.1, 0.25)
    true = upper / (upper + density(x, 0.1, 0.05, 0.75))
    assert np.abs(found.numpy() - true).mean() < 0.005 and (found[3000:] > 0.9).double().mean() > 0.95


def test_the_safe_set_grows_by_a_point_up_to_its_limit():
    cosine = torch.cat([torch.linspace(0.05, 0.15, 180), torch.linspace(0.6, 0.7, 20)])
    around, method = training(*pairs_of(cosine)), safeclip()
    method.attach(around)
    method.begin(2, around)
    assert not method.safe.any()
    counts = []
    for epoch in range(3, 6):
        method.begin(epoch, around)
        counts.append(int(method.safe.sum()))
        assert method.safe[-counts[-1] :].all()
    assert counts == [20, 22, 24]
    method.safe[:169] = 1
    method.safe[169:] = 0
    method.begin(6, around)
    assert method.safe.sum() == 170 and method.safe[-170:].all()
    method.begin(7, around)
    assert method.safe.sum() == 170


def test_one_epoch_is_slow():
    rates = safeclip(epochs=6).rates(1e-3, warmup=5, total=60)
    usual = learning_rates(1e-3, warmup=5, total=60)
    slow = torch.arange(60) // 10 == 2
    assert torch.equal(rates[~slow], usual[~slow]) and (rates[slow] == 1e-5).all()


def test_it_needs_both_losses():
    for refused in ({"objective": "mmcl"}, {"ssl_text": False}, {"ssl_weight": 0}):
        with pytest.raises(UserError, match="give --objective mmcl_ssl"):
            SafeClip(PretrainConfig(**{"objective": "mmcl_ssl"} | refused))
    with pytest.raises(UserError, match="fewer --warm-epochs"):
        safeclip(epochs=3)
