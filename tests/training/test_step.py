"""The step: what it computes against plain PyTorch, and what it must not do."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from steps import (
    BATCH,
    BOTH,
    EVERY,
    MMCL,
    ONE,
    RATES,
    ROOM,
    SHALLOW_RN,
    SHALLOW_VIT,
    Waits,
    batch_of,
    captions_of,
    counting,
    make_step,
)
from tables import table
from torch._dynamo.testing import CompileCounterWithBackend

from fastbd.base.errors import UserError
from fastbd.kernels.text_pack import pack
from fastbd.methods.objectives import Objective
from fastbd.models import create
from fastbd.models.batchnorm import BatchNorm, batch_norms, share_statistics
from fastbd.models.blocks import recompute
from fastbd.models.clip import fresh
from fastbd.models.precision import has_compiler, is_compiled


def trained(model, objective: Objective, steps: int = 3, parts: int = 1, room: int = 1, **settings):
    """Losses of some steps, and the state after them; the model is left alone."""
    model = deepcopy(model).to(memory_format=torch.channels_last)
    step = make_step(model, objective, parts=parts, **settings)
    views = 2 if objective.ssl_weight else 1
    losses = [step(batch_of(views, seed, parts, room)) for seed in range(steps)]
    return [{name: value.item() for name, value in row.items()} for row in losses], model.state_dict()


def assert_alike(one, other, tolerance: float = 2e-5) -> None:
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance)
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=tolerance)


def formula(images, texts, scale, objective: Objective) -> torch.Tensor:
    """Equations 1 and 2 of Verma et al. (arXiv 2311.14948)."""
    truth = torch.arange(len(images[0]))

    def cross_entropy(rows, columns):
        return F.cross_entropy(scale * F.normalize(rows) @ F.normalize(columns).T, truth)

    mmcl = (cross_entropy(images[0], texts[0]) + cross_entropy(texts[0], images[0])) / 2
    if not objective.ssl_weight:
        return mmcl
    ssl = (cross_entropy(*images) + cross_entropy(*texts)) / 2
    return objective.mmcl_weight * mmcl + objective.ssl_weight * ssl


@pytest.mark.parametrize("objective", [MMCL, BOTH], ids=["one view", "two views"])
def test_steps_are_those_of_plain_pytorch(objective):
    """Each view by itself, F.cross_entropy, PyTorch's loop of AdamW; tiny-vit has no batch norm."""
    start = create("tiny-vit", 0)
    losses, state = trained(start, objective, steps=4)
    plain = deepcopy(start)
    decayed = [p for p in plain.parameters() if p.ndim > 1]
    exempt = [p for p in plain.parameters() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": exempt, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1, betas=(0.9, 0.99), eps=0.01, foreach=False)
    for at in range(4):
        batch = batch_of(2 if objective.ssl_weight else 1, at)
        images = [plain.encode_image(view) for view in batch.views]
        loss = formula(images, plain.encode_text(batch.texts[0]).split(BATCH), plain.logit_scale.exp(), objective)
        assert losses[at]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert losses[at]["scale"] == pytest.approx(plain.logit_scale.exp().item())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = float(RATES[at])
        optimizer.step()
        plain.logit_scale.data.clamp_(0, math.log(100))
    torch.testing.assert_close(state, plain.state_dict(), rtol=0, atol=1e-5)
    assert max(float((state[name] - start.state_dict()[name]).abs().max()) for name in state) > 1e-2


@pytest.mark.parametrize("objective", [MMCL, BOTH], ids=["one view", "two views"])
@pytest.mark.parametrize("name", ["tiny-rn", "tiny-vit", "small-rn10"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(name, objective):
    """GradCache; with batch norm over groups that fit into a part, its running statistics too."""
    model = create(name, 0)
    share_statistics(model, 8)
    assert_alike(trained(model, objective, 1, parts=2), trained(model, objective, 1))


@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("name", ["tiny-rn", "tiny-vit", "small-rn10"])
def test_recomputed_activations_are_the_same_bits(name, group):
    model = create(name, 0)
    if group:
        share_statistics(model, group)
    kept = trained(model, BOTH)
    recompute(model)
    assert_alike(trained(model, BOTH), kept, 0)


def test_recomputing_keeps_only_the_inputs_of_blocks():
    sizes = []
    for again in (False, True):
        model, kept = create("small-rn10", 0).visual, {}
        if again:
            recompute(model)

        def keep(x, kept=kept):
            kept[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(torch.randn(8, 3, 32, 32))
        sizes.append(sum(kept.values()))
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("group", [4, 12])
def test_batch_norm_of_groups_is_pytorchs_of_each(group, layout):
    """Outputs, gradients and running statistics, in float64 to 1e-7."""
    noise = torch.Generator().manual_seed(0)
    ours, theirs = BatchNorm(5).double(), torch.nn.BatchNorm2d(5).double()
    share_statistics(ours, group)
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.randn(p.shape, generator=noise))
    theirs.load_state_dict(ours.state_dict())
    found = []
    for norm in (ours, theirs):
        x = (3 + torch.randn(12, 5, 4, 3, generator=noise.manual_seed(1), dtype=torch.float64)).to(memory_format=layout)
        x.requires_grad_()
        if norm is ours:
            y, running = norm(x), [ours.running_mean, ours.running_var]
        else:
            parts, running = [], []
            for part in x.split(group):
                statistics = torch.zeros(5, dtype=x.dtype), torch.ones(5, dtype=x.dtype)
                parts.append(F.batch_norm(part, *statistics, norm.weight, norm.bias, training=True))
                running.append(torch.stack(statistics))
            y, running = torch.cat(parts), list(torch.stack(running).mean(0))
        (y**3).sum().backward()
        found.append([y, x.grad, norm.weight.grad, norm.bias.grad, *running])
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-9)  # their share is a float32
    ours.eval()
    torch.testing.assert_close(ours(x), F.batch_norm(x, *running, ours.weight, ours.bias))


def test_a_group_holds_all_views_of_its_pairs():
    """As on one of the published program's GPUs, where the views of 16 pairs went through the model together."""
    model = create("tiny-rn", 0).train()
    share_statistics(model, 8)
    batch = batch_of(2)
    images, _, _ = make_step(model, BOTH)._embed(batch.views, batch.texts[0], model)
    alone = deepcopy(model)
    share_statistics(alone, 0)
    for first in range(0, BATCH, 4):
        own = slice(first, first + 4)
        plain, augmented = alone.encode_image(torch.cat([view[own] for view in batch.views])).split(4)
        torch.testing.assert_close((images[0][own], images[1][own]), (plain, augmented), rtol=1e-4, atol=1e-5)


def test_one_step_serves_any_rates_and_weights():
    """What a captured step is told anew is read from the device."""
    model = create("tiny-vit", 0)
    fresh = trained(model, Objective(mmcl_weight=0.2, ssl_weight=3.0), steps=1)
    told = deepcopy(model)
    step = make_step(told, BOTH)
    step.weights[:2] = torch.tensor([0.2, 3.0])
    assert step(batch_of(2))["loss"].item() == pytest.approx(fresh[0][0]["loss"], rel=1e-6)
    torch.testing.assert_close(told.state_dict(), fresh[1], rtol=0, atol=1e-6)
    step.rates.fill_(0)
    before = deepcopy(told.state_dict())
    step(batch_of(2, seed=1))
    torch.testing.assert_close(told.state_dict(), before, rtol=0, atol=0)
    alone = Objective(mmcl_weight=1.0, ssl_weight=1.0)
    step = make_step(deepcopy(model), alone)
    step.weights[:2] = torch.tensor([0.0, 1.0])  # in the graph of both losses a weight of 0 leaves the other
    assert step(batch_of(2))["loss"].item() == pytest.approx(
        make_step(deepcopy(model), Objective(0.0, 1.0))(batch_of(2))["loss"].item(), rel=1e-6
    )


def test_a_step_begins_at_its_place_in_the_schedule():
    model = create("tiny-vit", 0)
    step = make_step(model, MMCL, start=5)
    for at in (5, 6):
        assert step.at.item() == at
        step(batch_of(1))
        assert {group["lr"].item() for group in step.optimizer.param_groups} == {RATES[at].item()}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("objective", [MMCL, EVERY], ids=["one view", "two views"])
def test_nothing_in_a_step_waits_for_the_device(objective, parts):
    """As far as PyTorch dispatches it: into our own operations, which on a GPU are Triton's, it does not look."""
    model = create("tiny-rn", 0)
    share_statistics(model, 8)
    step = make_step(model, objective)
    step(batch_of(2 if objective.ssl_weight else 1, 0, parts))
    with Waits() as waits:
        losses = step(batch_of(2 if objective.ssl_weight else 1, 1, parts))
        assert waits.seen == []
        losses["loss"].item()
        assert len(waits.seen) == 1


@pytest.fixture
def compilations(monkeypatch) -> CompileCounterWithBackend:
    """What counts them."""
    return counting(monkeypatch)


def test_one_compilation_serves_captions_of_any_lengths(compilations):
    """And as many batches, rates and weights as there are; the losses are the eager ones."""
    model = fresh(SHALLOW_RN, 0)
    compiled = trained(model, BOTH, steps=4, room=ROOM, compiled=True)
    assert compilations.frame_count == 1
    assert_alike(compiled, trained(model, BOTH, steps=4), 1e-3)  # four steps let rounding grow


@pytest.mark.parametrize("backend", table(["aot_eager", "inductor"], "aot_eager"))
def test_fused_towers_train_as_eager_ones_do(backend, monkeypatch):
    """A model as small as has a pool, as Inductor takes its time on a CPU too."""
    if backend == "inductor" and not has_compiler():
        pytest.skip("needs a C++ compiler")
    counter = counting(monkeypatch, backend)
    model = fresh(replace(SHALLOW_RN, vision_layers=(1, 1)), 0)
    fused = trained(model, MMCL, room=ROOM, compiled=True, fused=True)
    (graph,) = counter.graphs
    assert not [node for node in graph.graph.nodes if node.target is torch._C._nn.avg_pool2d]
    assert_alike(fused, trained(model, MMCL))


def test_fused_is_compiled_wherever_it_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--compile fused needs a C"):
        is_compiled("fused", ONE)
    (tmp_path / "g++").touch(0o700)
    assert is_compiled("fused", ONE) and is_compiled("on", ONE) and not is_compiled("auto", ONE)


@pytest.mark.parametrize("parts", table([1, 2], 2))
def test_compiled_parts_with_recomputed_activations_are_the_eager_ones(parts, compilations):
    """Running statistics too, which a second forward must not move twice; parts have one without gradients."""
    model = fresh(SHALLOW_RN, 0)
    share_statistics(model, 8)
    eager = trained(model, BOTH, steps=2)
    recompute(model)
    assert_alike(trained(model, BOTH, steps=2, parts=parts, room=ROOM, compiled=True), eager, 1e-3)
    assert compilations.frame_count == parts


def test_tokens_are_counted_once():
    captions = captions_of(BATCH, 0)
    text = pack(captions)
    assert len(text.tokens) == ((captions == 49_407).argmax(1) + 1).sum() < 77 * BATCH / 5
    assert len(pack(captions, 64).tokens) % 64 == 0


def test_only_norms_that_share_have_a_rate():
    model = create("tiny-rn", 0)
    assert all(norm.rate is None for norm in batch_norms(model))
    share_statistics(model, 8)
    assert len({id(norm.rate) for norm in batch_norms(model)}) == 1


@pytest.mark.parametrize(
    ("compiled", "parts"), table(product([False, True], [1, 2]), (False, 1), (False, 2), (True, 1))
)
def test_a_tower_that_no_term_looks_at_stays_as_it_is(compiled, parts, compilations):
    """Compiled code gives it gradients of zero, which weight decay would take for leave to shrink it."""
    model = fresh(SHALLOW_VIT, 0)
    before = deepcopy(model.state_dict())
    for objective, idle in ((Objective(0.0, 1.0, ssl_text=False), False), (Objective(0.0, 1.0, ssl_image=False), True)):
        _, state = trained(model, objective, steps=2, parts=parts, room=ROOM, compiled=compiled)
        for name in set(state) - {"logit_scale"}:
            assert torch.equal(state[name], before[name]) == (name.startswith("visual.") == idle), name
    assert compilations.frame_count == 2 * compiled * parts
