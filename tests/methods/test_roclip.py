"""RoCLIP by its formula; the pool as a queue; which epochs it takes part in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from formulas import assert_near, embeddings, with_gradients
from planted import both_ways, training

from fastbd.base.errors import UserError
from fastbd.config.flags import PretrainConfig
from fastbd.methods.method import Embedded
from fastbd.methods.roclip import RoClip


def roclip(pool: int, **settings) -> RoClip:
    method = RoClip(PretrainConfig(roclip_pool=pool, **settings))
    method.attach(training(*embeddings(20)))
    return method


def test_images_are_matched_with_the_nearest_of_the_pool():
    """As published: the pool as it was before the batch, both directions, no gradient to the captions."""
    method, inputs = roclip(12), [*embeddings(6), torch.tensor(2.3)]
    method.begin(1, training(*embeddings(20)))
    method.variant(1)
    pool = method.pool.double()

    def formula(image, text, log_scale):
        nearest = (F.normalize(image, dim=1) @ pool.T).argmax(1)
        return 0.7 * both_ways(image, pool[nearest], log_scale) + 0 * text.sum()

    def ours(image, text, log_scale):
        return method(Embedded([image], [text], log_scale, None, []), None, torch.tensor([0.7, 0, 0, 0]))[0]

    found = with_gradients(ours, inputs, torch.float32)
    assert not found[2].any()
    assert_near(found, with_gradients(formula, inputs, torch.float64), 1e-5)


def test_the_pool_is_a_queue():
    method, captions = roclip(5), F.normalize(embeddings(20)[0], dim=1)
    for first, end in ((0, 3), (3, 6), (6, 8)):
        method.push(3 * captions[first:end])
    torch.testing.assert_close(method.pool, captions[[5, 6, 7, 3, 4]])
    method.push(captions)  # more than there is room for
    kept = sorted(captions[-5:].tolist())
    torch.testing.assert_close(torch.tensor(sorted(method.pool.tolist())), torch.tensor(kept))


def test_it_begins_with_captions_of_the_data():
    method = roclip(8)
    images, texts = embeddings(20)
    method.begin(0, training(images, texts))
    assert not method.pool.any()
    method.begin(1, training(images, texts))
    match = method.pool @ F.normalize(texts, dim=1).T > 1 - 1e-6
    assert (match.sum(1) == 1).all() and (match.sum(0) <= 1).all()


def test_every_period_th_epoch():
    method = roclip(8, roclip_period=3)
    assert [method.variant(epoch) for epoch in range(7)] == [False, False, True, False, False, True, False]
    embedded = Embedded(*[[x] for x in embeddings(6)], torch.tensor(2.3), None, [])
    assert not method.matching and torch.isclose(
        method(embedded)[0], both_ways(*embeddings(6), torch.tensor(2.3)), rtol=1e-5
    )
    with pytest.raises(UserError, match="cannot go with mmcl_ssl"):
        roclip(8, objective="mmcl_ssl")
