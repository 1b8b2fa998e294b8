from __future__ import annotations

import pytest
import torch
from tables import table
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastbd.models.clip import CLIP, MODELS
from fastbd.models.resnet import BasicBlock, Bottleneck
from fastbd.training import roofline
from fastbd.training.roofline import Op, Rates, image_ops, measure_rates, step_seconds, text_ops

CPU = torch.device("cpu")
H200 = Rates(matmul=790e12, bandwidth=4.3e12)
IF_MEMORY_COST_NOTHING = Rates(H200.matmul, float("inf"))
CAPTION = 12.64  # tokens of CC3M's mean caption


def on_meta(name: str) -> CLIP:
    with torch.device("meta"):
        return CLIP(MODELS[name])


@pytest.fixture(scope="module")
def rn50() -> CLIP:
    return on_meta("rn50")


def flops(ops) -> float:
    return sum(op.flops for op in ops)


def elements(ops) -> float:
    return sum(op.elements for op in ops)


@pytest.mark.parametrize("name", table(MODELS, "tiny-rn", "tiny-vit", "small-rn10", "demo"))
def test_image_flops_are_those_of_torchs_counter(name):
    model = on_meta(name)
    with FlopCounterMode(display=False) as counter:
        model.visual(torch.empty(2, 3, model.image_size, model.image_size, device="meta")).sum().backward()
    assert 2 * flops(image_ops(model.visual, model.image_size)) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["tiny-rn", "rn50", "vit-l-14"])
def test_text_flops_are_those_of_the_towers_matrices_and_of_causal_attention(name):
    """Every matrix of the tower is used as a linear layer, by all tokens or, the last one, by the end token."""
    model, tokens = on_meta(name), 7
    matrices = [p for p in model.transformer.parameters() if p.ndim == 2]
    with FlopCounterMode(display=False) as counter:
        for matrix in matrices:
            F.linear(torch.empty(tokens, matrix.shape[1], device="meta", requires_grad=True), matrix).sum().backward()
        (
            torch.empty(1, len(model.text_projection), device="meta", requires_grad=True) @ model.text_projection
        ).backward(torch.empty(1, model.embed_dim, device="meta"))
    width, pairs = len(model.text_projection), torch.ones(tokens, tokens).tril().sum().item()
    scores_and_mix = len(model.transformer.resblocks) * 2 * (2 * pairs * width)
    assert len(matrices) == 4 * len(model.transformer.resblocks)
    assert flops(text_ops(model, tokens)) == counter.get_total_flops() + 3 * scores_and_mix


def test_elements_of_a_block_done_by_hand():
    """Two 3x3 convolutions [2, 4, 4] -> [5, 2, 2] -> [5, 2, 2]; a shortcut by way of [2, 2, 2]."""
    x, pooled, y = 2 * 4 * 4, 2 * 2 * 2, 5 * 2 * 2
    convolutions = 3 * (x + y) + 3 * (y + y) + 3 * (pooled + y)
    pool = 2 * (x + pooled)
    least = convolutions + pool + 3 * 8 * y + 5 * y  # three norms, one sum
    assert elements(roofline._convolutional(BasicBlock(2, 5, stride=2), 2, 4)) == least


def test_elements_of_a_block_without_shortcut_layers_done_by_hand():
    """1x1, 3x3, 1x1 convolutions [16, 3, 3] -> [4, 3, 3] -> [4, 3, 3] -> [16, 3, 3]."""
    wide, narrow = 16 * 9, 4 * 9
    convolutions = 3 * (wide + narrow) + 3 * (narrow + narrow) + 3 * (narrow + wide)
    norms = 2 * narrow + wide
    least = convolutions + 8 * norms + 5 * wide
    assert elements(roofline._convolutional(Bottleneck(16, 4, stride=1), 16, 3)) == least


def test_elements_of_a_text_tower_done_by_hand():
    """One block of width 32, five tokens, embeddings of 32."""
    x = 5 * 32
    linear = 3 * (4 + 2 + 5 + 5) * x
    attention = (4 + 8) * x  # query, key, value, output; forward's four, their gradients
    gelu = 5 * 4 * x
    end = 5 * 32 + 3 * (32 + 32)
    norms = 2 * (5 + 3) * x  # with the sums before them
    assert elements(text_ops(on_meta("tiny-rn"), 5)) == linear + attention + gelu + norms + end


def test_elements_of_a_vision_transformer_done_by_hand():
    """Two blocks of width 64 over 16 patches of 8 x 8 pixels and the class; pixels get no gradient."""
    patches = 2 * (3 * 32 * 32 + 16 * 64)
    x = 17 * 64
    block = 3 * 16 * x + 12 * x + 20 * x + 2 * (5 + 3) * x
    ends = 5 * x + 5 * 64 + 3 * (64 + 32)
    assert elements(image_ops(on_meta("tiny-vit").visual, 32)) == patches + 2 * block + ends


def test_a_layer_of_unknown_work_is_refused():
    with pytest.raises(TypeError, match="GroupNorm"):
        list(roofline._convolutional(nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)), 4, 8))


def in_turn(ops, rates) -> float:
    return sum(max(op.flops / rates.matmul, 2 * op.elements / rates.bandwidth) for op in ops)


def saved_by_the_pool(rn50, rates) -> float:
    """Seconds an image: the independent count makes keys and values of all 50 positions, of width 2,048."""
    rows, width = 50, 2048
    projections = 3 * [Op(rows * 3 * width, 2 * rows * width * 2 * width)]
    attention = [Op(2 * (1 + rows) * width, 4 * rows * width), Op(4 * (1 + rows) * width, 8 * rows * width)]
    ends = [*roofline._linear(1, width, width), *roofline._linear(1, width, 1024)]
    pool = list(roofline._attention_pool(rn50.visual.attnpool))
    assert flops(pool) < 0.15 * flops([*projections, *attention, *ends])
    return in_turn([*projections, *attention, *ends], rates) - in_turn(pool, rates)


def test_rn50_moves_as_much_as_an_independent_count_found(rn50):
    """That one was made from a table of layer shapes; it differs in the attention pool, by a megabyte."""
    ops = list(image_ops(rn50.visual, 224))
    assert 2 * elements(ops) / 1e6 == pytest.approx(407, abs=1.5)
    assert 1 / (in_turn(ops, H200) + saved_by_the_pool(rn50, H200)) == pytest.approx(8530, rel=0.002)


@pytest.mark.parametrize(
    ("rates", "batch", "views", "tokens", "pairs_per_s"),
    [
        (H200, 128, 1, CAPTION, 7818),
        (H200, 256, 1, CAPTION, 7980),
        (H200, 128, 2, CAPTION, 3990),
        (H200, 128, 1, 32, 7336),
        (H200, 128, 1, 77, 6406),
        (IF_MEMORY_COST_NOTHING, 128, 1, CAPTION, 20969),
        (IF_MEMORY_COST_NOTHING, 128, 2, CAPTION, 20969 / 2),
    ],
)
def test_steps_of_rn50_on_an_h200(rn50, rates, batch, views, tokens, pairs_per_s):
    """The independent count lets a token attend to all of its caption: 1 % of the step at 77 tokens."""
    found = step_seconds(rn50, rates, batch=batch, views=views, texts=views, tokens=tokens, precision="bf16")
    found += batch * views * saved_by_the_pool(rn50, rates)
    assert batch / found == pytest.approx(pairs_per_s, rel=0.003 if tokens < 77 else 0.01)


def test_a_step_is_its_parts(rn50):
    def seconds(rates=H200, batch=64, views=1, texts=1, tokens=CAPTION, precision="bf16"):
        return step_seconds(rn50, rates, batch=batch, views=views, texts=texts, tokens=tokens, precision=precision)

    update = 28 * 102_007_137 / H200.bandwidth
    assert seconds(batch=0) == pytest.approx(update)
    one, two, text = seconds(), seconds(views=2, texts=2), seconds(views=0)
    assert two - update == pytest.approx(2 * (one - update))
    image = one - text
    assert seconds(views=2) == pytest.approx(one + image)
    assert seconds(batch=128) - update == pytest.approx(2 * (one - update))
    # Memory alone counts where multiplying costs nothing, and elements of fp32 are twice as large.
    endless = Rates(float("inf"), H200.bandwidth)
    narrow, wide = (seconds(endless, precision=name) - update for name in ("bf16", "tf32"))
    assert wide == pytest.approx(2 * narrow)


class Watch(TorchDispatchMode):
    """Notes what is multiplied, with which arithmetic, and how much is copied."""

    def __init__(self):
        super().__init__()
        self.multiplied, self.copied = set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            self.multiplied.add((args[0].dtype, args[0].shape[0], torch.get_float32_matmul_precision()))
            assert args[0].double().std() > 0.5  # no zeros
        if function is torch.ops.aten.copy_.default:
            self.copied.append(args[0].numel() * args[0].element_size())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("precision", "dtype", "arithmetic"),
    [("fp32", torch.float32, "highest"), ("tf32", torch.float32, "high"), ("bf16", torch.bfloat16, "highest")],
)
def test_rates_are_measured_in_the_runs_own_arithmetic(monkeypatch, precision, dtype, arithmetic):
    monkeypatch.setitem(roofline.SIDES, "cpu", (64,))
    monkeypatch.setitem(roofline.COPIED, "cpu", 1 << 16)
    before = torch.get_float32_matmul_precision()
    with Watch() as watch:
        rates = measure_rates(CPU, precision)
    assert watch.multiplied == {(dtype, 64, arithmetic)}
    assert watch.copied == (1 + roofline.TRIES) * [1 << 16]
    assert torch.get_float32_matmul_precision() == before
    assert 0 < rates.matmul < float("inf") and 0 < rates.bandwidth < float("inf")


def test_the_shortest_call_counts(monkeypatch):
    """The first call warms up; a rate comes from the best of the others: 2 n^3 FLOPs, every byte read and written."""
    monkeypatch.setitem(roofline.SIDES, "cpu", (10,))
    monkeypatch.setitem(roofline.COPIED, "cpu", 300)
    clock = [0.0, 5.0, 7.0, 11.0, 14.0] * 2
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: clock.pop(0))
    assert measure_rates(CPU, "fp32") == Rates(2 * 10**3 / 2.0, 2 * 300 / 2.0)


def test_matrices_grow_until_a_product_takes_long(monkeypatch):
    """The best rate counts: a large matrix may be slower than one that fits into the cache."""
    monkeypatch.setitem(roofline.SIDES, "cpu", (10, 20, 40))
    clock = [*(0.002 * k for k in range(5)), *(1 + 0.02 * k for k in range(5))]
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: clock.pop(0))
    assert roofline.matmul_rate(CPU, "fp32") == pytest.approx(max(2 * 10**3 / 0.002, 2 * 20**3 / 0.02))
    assert not clock  # no product of 40


def test_measuring_leaves_the_random_state_as_it_is(monkeypatch):
    """Else a run that is resumed, and so measures once more, had another one than a run that was not stopped."""
    monkeypatch.setitem(roofline.SIDES, "cpu", (16,))
    monkeypatch.setitem(roofline.COPIED, "cpu", 16)
    before = torch.get_rng_state()
    measure_rates(CPU, "fp32")
    assert torch.equal(torch.get_rng_state(), before)
