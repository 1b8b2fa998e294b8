"""The step on a GPU: captured and compiled against eager, no waiting, memory."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from steps import BATCH, BOTH, EVERY, MMCL, RATES, batch_of, make_step

from fastbd.data.loader import Batch
from fastbd.dist import World
from fastbd.fit import Shares, batch_that_fits
from fastbd.kernels.text_pack import PackedText
from fastbd.models import create
from fastbd.models.batchnorm import share_statistics
from fastbd.models.blocks import recompute
from fastbd.readback import Readback

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = World(0, 1, torch.device("cuda", 0))


def on_gpu(batch: Batch) -> Batch:
    """With room for 512 tokens in each part."""
    views = tuple(view.cuda() for view in batch.views)
    return Batch(batch.ids, views, tuple(PackedText(*(x.cuda() for x in text)) for text in batch.texts))


def batches(objective, parts: int = 1, room: int = 512, count: int = len(RATES)) -> list[Batch]:
    views = 2 if objective.ssl_weight else 1
    return [on_gpu(batch_of(views, seed, parts, room)) for seed in range(count)]


def trained(model, objective, parts: int = 1, **settings):
    """Losses of all steps, and the state after them."""
    model = deepcopy(model).cuda().to(memory_format=torch.channels_last)
    for norm in (module for module in model.modules() if getattr(module, "rate", None) is not None):
        norm.rate = norm.rate.cuda()
    step = make_step(model, objective, GPU, parts=parts, **settings)
    losses = [{name: value.item() for name, value in step(batch).items()} for batch in batches(objective, parts)]
    return losses, model.state_dict(), step


@pytest.mark.parametrize("settings", [{}, {"parts": 2}, {"compiled": True}], ids=["plain", "parts", "compiled"])
@pytest.mark.parametrize("objective", [MMCL, EVERY], ids=["one view", "two views"])
@pytest.mark.parametrize("name", ["tiny-rn", "tiny-vit"])
def test_captured_steps_are_the_eager_ones(name, objective, settings):
    """In float32 to 1e-3: sums of atomic additions come in any order, and eight steps amplify it."""
    model = create(name, 0)
    share_statistics(model, 8)
    eager, state, _ = trained(model, objective, **settings | {"compiled": False})
    captured, captured_state, step = trained(model, objective, captured=True, **settings)
    assert len(step.call.graphs) == 1
    for mine, theirs in zip(captured, eager, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)
    torch.testing.assert_close(captured_state, state, rtol=0, atol=2e-3)


def test_a_graph_serves_any_rates_weights_and_lengths():
    step = make_step(create("tiny-vit", 0).cuda(), BOTH, GPU, captured=True)
    data = batches(BOTH)
    for batch in data[:5]:
        step(batch)
    told = deepcopy(step.model)
    step.weights[:2] = torch.tensor([0.0, 2.0])
    step.rates.fill_(0)
    loss = step(data[5])
    assert loss["loss"].item() == pytest.approx(loss["ssl_image"].item() + loss["ssl_text"].item(), rel=1e-5)
    torch.testing.assert_close(step.model.state_dict(), told.state_dict(), rtol=0, atol=0)
    assert len(step.call.graphs) == 1


def test_each_shape_has_a_graph_and_none_disturbs_another():
    step = make_step(create("tiny-rn", 0).cuda(), MMCL, GPU, captured=True)
    eager = make_step(create("tiny-rn", 0).cuda(), MMCL, GPU)
    step.rates, eager.rates = torch.full((40,), 1e-3).cuda(), torch.full((40,), 1e-3).cuda()
    small, large = batches(MMCL, count=4), batches(MMCL, room=1024, count=4)
    for k in range(16):
        batch = (small, large)[k // 2 % 2][k % 4]
        assert step(batch)["loss"].item() == pytest.approx(eager(batch)["loss"].item(), rel=2e-3)
    assert len(step.call.graphs) == 2


@pytest.mark.parametrize("captured", [False, True])
def test_steps_and_their_losses_wait_for_nothing(captured):
    step, readback = make_step(create("tiny-rn", 0).cuda(), BOTH, GPU, captured=captured), Readback(4)
    data, rows = batches(BOTH), []
    for batch in data[:4]:
        readback.add(step(batch))
    try:
        torch.cuda.set_sync_debug_mode("error")
        for k, batch in enumerate(data[4:]):
            readback.add(step(batch))
            if k == 1:
                readback.send({"step": 6})
            rows += readback.arrived()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rows += readback.arrived(wait=True)
    assert [row["step"] for row in rows] == [6] and rows[0]["loss"] > 0


@pytest.mark.parametrize("name", ["tiny-rn", "tiny-vit"])
def test_bf16_follows_fp32(name):
    model = create(name, 0)
    full, half = (trained(model, BOTH, precision=precision)[0] for precision in ("fp32", "bf16"))
    for mine, theirs in zip(half[:4], full[:4], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.05)


def test_recomputing_saves_memory():
    peaks = []
    for again in (False, True):
        model = create("vit-b-32", 0)
        if again:
            recompute(model)
        step = make_step(model.cuda(), MMCL, GPU, precision="bf16")
        batch = on_gpu(batch_of(1, room=512))
        views = (torch.randn(BATCH, 3, 224, 224, device="cuda"),)
        step(Batch(batch.ids, views, batch.texts))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(Batch(batch.ids, views, batch.texts))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del step, model
        torch.cuda.empty_cache()
    assert peaks[1] < peaks[0]


def test_the_largest_batch_fits_and_a_larger_one_does_not():
    """With memory cut to 4 GB: a batch of twice the size is not found, and the model is as it was."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (4 << 30) / torch.cuda.get_device_properties(0).total_memory))
    model = create("small-rn10", 0).cuda()
    before, shares = deepcopy(model.state_dict()), Shares(processes=1, parts=1, group=0, views=1, norms=True)

    def found(most: int) -> int:
        return batch_that_fits(model, MMCL, shares, texts=1, tokens=12.6, most=most, precision="bf16", world=GPU)

    try:
        largest = found(1 << 20)
        assert largest > 64 and 0.9 * largest < found(2 * largest) < 1.2 * largest
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_compiled_and_captured_run_through_the_command_line(study, fastbd):
    arguments = ("pretrain", "--objective", "mmcl_ssl", "--data", "train.beton", "--plan", "train.poison.json",
                 "--eval-data", "val.beton", "--model", "tiny-rn", "--batch-size", 24, "--templates", "demo",
                 "--epochs", 3, "--bn-group", 24, "--log-every", 5)  # fmt: skip
    fastbd(*arguments, "--out", "runs/fast", cwd=study)
    fastbd(*arguments, "--compile", "off", "--graph", "off", "--precision", "fp32", "--out", "runs/plain", cwd=study)
    fast, plain = (
        [json.loads(line)["loss"] for line in (study / f"runs/{name}/log.jsonl").read_text().splitlines()]
        for name in ("fast", "plain")
    )
    assert fast == pytest.approx(plain, rel=0.1)
