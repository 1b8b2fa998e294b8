from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from colours import COLOURS, CPU, write

from fastbd.base.dist import World
from fastbd.base.evaluation import Evaluation
from fastbd.data.beton import Beton
from fastbd.data.decode import open_decoder
from fastbd.data.loader import batches
from fastbd.data.pairs import Pairs
from fastbd.evals.monitor import Monitor, rotation
from fastbd.evals.towers import Towers
from fastbd.kernels.augment import normalise
from fastbd.models import create

ROWS = np.arange(2, 40)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Pairs:
    """Paints of all kinds; a caption is one of four colours."""
    noise, names = np.random.default_rng(0), list(COLOURS)
    images = [(names[k % 4], tuple(noise.integers(256, size=3).tolist())) for k in range(40)]
    path = write(tmp_path_factory.mktemp("monitor") / "pairs.beton", images, size=(40, 36), labelled=False)
    return Pairs(Beton(path), open_decoder("pil", 1, "cpu"), 32)


@pytest.fixture
def watched(pairs):
    model = create("tiny-vit", 0)
    monitor = Monitor(Towers(model, precision="fp32", device=CPU), pairs, ROWS)
    monitor.start()
    return model, monitor


def turned(watched, image: torch.Tensor, text: torch.Tensor) -> dict[str, float]:
    """What the monitor says when the embeddings have been multiplied by these matrices."""
    model, monitor = watched
    with torch.no_grad():
        model.visual.proj.copy_(model.visual.proj @ image)
        model.text_projection.copy_(model.text_projection @ text)
    monitor.towers.refresh()
    return monitor()


def test_the_views_are_those_of_training(pairs, watched):
    model, monitor = watched
    world = World(0, 1, CPU)
    (batch,) = batches(
        pairs,
        ROWS,
        len(ROWS),
        seed=0,
        policies=("plain", "auto_augment"),
        text_view=None,
        world=world,
        epoch=0,
        start=0,
    )
    order = np.argsort(batch.ids)
    for found, wanted in zip((monitor.plain, monitor.augmented), batch.views, strict=True):
        assert found.dtype == torch.uint8
        torch.testing.assert_close(normalise(found), wanted[order])


def test_numbers_of_an_unchanged_model(watched):
    model, monitor = watched
    row = monitor()
    assert row.keys() <= Evaluation.__annotations__.keys()
    assert row["drift_image"] == row["drift_text"] == 0
    assert max(row["drift_image_aligned"], row["drift_text_aligned"]) < 1e-6
    with torch.no_grad():
        plain, augmented = (F.normalize(model.encode_image(normalise(x))) for x in (monitor.plain, monitor.augmented))
        texts = F.normalize(torch.cat([model.encode_text(text) for text in monitor.texts]))
        logits, target = model.logit_scale.exp() * plain @ texts.T, torch.arange(len(ROWS))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert row["val_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert (
        row["agreement"] == pytest.approx((plain * augmented).sum(1).mean().item(), rel=1e-4) and row["agreement"] < 1
    )
    monitor.augmented = monitor.plain
    assert monitor()["agreement"] == pytest.approx(1, abs=1e-6)


def test_a_joint_rotation_is_all_drift_and_none_aligned(watched):
    before, dim = watched[1](), watched[0].visual.proj.shape[1]
    negated = turned(watched, -torch.eye(dim), -torch.eye(dim))
    assert (negated["drift_image"], negated["drift_text"]) == (pytest.approx(4), pytest.approx(4))
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)))[0]
    row = turned(watched, turn, turn)
    assert row["drift_image"] > 0.1 and row["drift_text"] > 0.1
    for found in (negated, row):
        assert max(found["drift_image_aligned"], found["drift_text_aligned"]) < 1e-6
        assert found["val_loss"] == pytest.approx(before["val_loss"], rel=1e-4)


def test_one_tower_turned_cannot_be_undone(watched):
    dim = watched[0].visual.proj.shape[1]
    flip = torch.ones(dim).index_fill(0, torch.arange(dim // 2), -1).diag()
    row = turned(watched, torch.eye(dim), flip)
    assert row["drift_image"] == 0 and 0 < row["drift_text"] <= 4
    assert row["drift_image_aligned"] > 0 and row["drift_text_aligned"] > 0
    assert row["drift_image_aligned"] + row["drift_text_aligned"] < row["drift_text"]


def test_rotation_by_hand():
    points = torch.tensor([[1.0, 0], [0, 2], [3, 1]])
    quarter = torch.tensor([[0.0, 1], [-1, 0]])
    torch.testing.assert_close(rotation(points, points @ quarter), quarter)
