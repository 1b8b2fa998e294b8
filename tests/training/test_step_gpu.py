"""The step on a GPU: captured and compiled against eager, no waiting, memory. What a CPU can do is tested there too."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from steps import BATCH, BOTH, EVERY, MMCL, RATES, batch_of, make_step

from fastbd.base.dist import World
from fastbd.data.loader import Batch
from fastbd.kernels.text_pack import PackedText
from fastbd.models import CLIP, create
from fastbd.models.batchnorm import batch_norms, share_statistics
from fastbd.models.blocks import recompute
from fastbd.models.precision import set_precision
from fastbd.training.readback import Readback

needs_gpu = pytest.mark.gpu
CPU, GPU = World(0, 1, torch.device("cpu")), World(0, 1, torch.device("cuda", 0))
WORLDS = [pytest.param(CPU, id="cpu"), pytest.param(GPU, id="gpu", marks=needs_gpu)]
ROOM = 512  # tokens in each part


@pytest.fixture(autouse=True)
def float32_without_tf32():
    """As --precision fp32 has it, whatever a test before has set."""
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark
    set_precision("fp32", GPU.device)
    yield
    torch.set_float32_matmul_precision(before[0])
    cudnn.allow_tf32, cudnn.benchmark = before[1:]


def moved(batch: Batch, world: World) -> Batch:
    texts = tuple(PackedText(*(x.to(world.device) for x in text)) for text in batch.texts)
    return Batch(batch.ids.to(world.device), tuple(view.to(world.device) for view in batch.views), texts)


def batches(objective, world: World, parts: int = 1, room: int = ROOM, count: int = len(RATES)) -> list[Batch]:
    views = 2 if objective.ssl_weight else 1
    return [moved(batch_of(views, seed, parts, room), world) for seed in range(count)]


def placed(model: CLIP, world: World, group: int = 0) -> CLIP:
    """A copy on the device as a run makes it, its batch norms over groups of images that share one rate (0: none)."""
    model = deepcopy(model).to(world.device, memory_format=torch.channels_last)
    if group:
        share_statistics(model, group)
    return model


def trained(model: CLIP, objective, world: World, group: int = 0, parts: int = 1, **settings):
    """Losses of all steps, the state after them, and the step."""
    step = make_step(placed(model, world, group), objective, world, parts=parts, **settings)
    data = batches(objective, world, parts)
    losses = [{name: value.item() for name, value in step(batch).items()} for batch in data]
    return losses, step.model.state_dict(), step


def assert_alike(one, other) -> None:
    """In float32 to 1e-3: sums of atomic additions come in any order, and eight steps amplify it."""
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=2e-3)


@pytest.mark.parametrize("world", WORLDS)
def test_norms_of_a_placed_model_share_one_rate(world):
    model = placed(create("tiny-rn", 0), world, group=8)
    step = make_step(model, MMCL, world, parts=2)
    step(*batches(MMCL, world, parts=2, count=1))
    assert len({id(norm.rate) for norm in batch_norms(model)}) == 1
    # All parts count alike: the last of two moves the statistics by half of the momentum, which is 0.1.
    assert step.norms[0].rate.device == world.device and step.norms[0].rate.item() == pytest.approx(0.05)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["tiny-rn", "tiny-vit"])
def test_eager_steps_in_parts_are_the_cpus_of_whole_batches(name, world):
    """Batch norm over groups of 8 images, which fit into a part."""
    model = create(name, 0)
    losses, state, _ = trained(model, EVERY, world, group=8, parts=2)
    assert_alike((losses, {key: value.cpu() for key, value in state.items()}), trained(model, EVERY, CPU, group=8))


@needs_gpu
@pytest.mark.parametrize("settings", [{}, {"parts": 2}, {"compiled": True}], ids=["plain", "parts", "compiled"])
@pytest.mark.parametrize("objective", [MMCL, EVERY], ids=["one view", "two views"])
@pytest.mark.parametrize("name", ["tiny-rn", "tiny-vit"])
def test_captured_steps_are_the_eager_ones(name, objective, settings):
    """A batch in parts is the whole one, as the groups of batch norm fit into a part."""
    model = create(name, 0)
    captured = trained(model, objective, GPU, group=8, captured=True, **settings)
    assert len(captured[2].call.graphs) == 1
    assert_alike(captured, trained(model, objective, GPU, group=8))


@needs_gpu
def test_a_graph_serves_any_rates_weights_and_lengths():
    step = make_step(placed(create("tiny-vit", 0), GPU), BOTH, GPU, captured=True)
    data = batches(BOTH, GPU)
    for batch in data[:5]:
        step(batch)
    told = deepcopy(step.model)
    step.weights[:2] = torch.tensor([0.0, 2.0])
    step.rates.fill_(0)
    loss = step(data[5])
    assert loss["loss"].item() == pytest.approx(loss["ssl_image"].item() + loss["ssl_text"].item(), rel=1e-5)
    torch.testing.assert_close(step.model.state_dict(), told.state_dict(), rtol=0, atol=0)
    assert len(step.call.graphs) == 1


@needs_gpu
def test_each_shape_has_a_graph_and_none_disturbs_another():
    model = create("tiny-rn", 0)
    step, eager = (make_step(placed(model, GPU), MMCL, GPU, captured=captured) for captured in (True, False))
    step.rates, eager.rates = torch.full((40,), 1e-3).cuda(), torch.full((40,), 1e-3).cuda()
    small, large = (batches(MMCL, GPU, room=room, count=4) for room in (ROOM, 2 * ROOM))
    for k in range(16):
        batch = (small, large)[k // 2 % 2][k % 4]
        assert step(batch)["loss"].item() == pytest.approx(eager(batch)["loss"].item(), rel=2e-3)
    assert len(step.call.graphs) == 2


@needs_gpu
@pytest.mark.parametrize("captured", [False, True])
def test_steps_and_their_losses_wait_for_nothing(captured):
    step = make_step(placed(create("tiny-rn", 0), GPU), BOTH, GPU, captured=captured)
    data, readback, rows = batches(BOTH, GPU), Readback(4), []
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


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["tiny-rn", "tiny-vit"])
def test_bf16_follows_fp32(name, world):
    model = create(name, 0)
    full, half = (trained(model, BOTH, world, precision=precision)[0] for precision in ("fp32", "bf16"))
    for mine, theirs in zip(half[:4], full[:4], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.05)


@needs_gpu
def test_recomputing_saves_memory():
    peaks = []
    for again in (False, True):
        model = create("vit-b-32", 0)
        if again:
            recompute(model)
        step = make_step(model.cuda(), MMCL, GPU, precision="bf16")
        batch = moved(batch_of(1, room=ROOM), GPU)
        batch = replace(batch, views=(torch.randn(BATCH, 3, 224, 224, device="cuda"),))
        step(batch)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(batch)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del step, model
        torch.cuda.empty_cache()
    assert peaks[1] < peaks[0]


def test_a_run_as_the_device_allows_is_near_the_plain_one(study, fastbd):
    """Through the command line: on a GPU it is compiled and captured, in bf16."""
    arguments = ("pretrain", "--objective", "mmcl_ssl", "--data", "train.beton", "--plan", "train.poison.json",
                 "--eval-data", "val.beton", "--model", "tiny-rn", "--batch-size", 60, "--templates", "demo",
                 "--epochs", 2, "--bn-group", 24, "--log-every", 2)  # fmt: skip
    fastbd(*arguments, "--out", "runs/fast", cwd=study)
    fastbd(*arguments, "--compile", "off", "--graph", "off", "--precision", "fp32", "--out", "runs/plain", cwd=study)
    fast, plain = (
        [json.loads(line)["loss"] for line in (study / f"runs/{name}/log.jsonl").read_text().splitlines()]
        for name in ("fast", "plain")
    )
    assert fast == pytest.approx(plain, rel=0.1)
