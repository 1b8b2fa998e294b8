from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from small_models import SMALL_RN
from tables import table
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bench.published_step import WATCHED, Hyper, open_clip, published, text_tower, trimmed
from fastbd.models.clip import MODELS, fresh

HYPER = Hyper(lr=1e-3, weight_decay=0.1)
WAYS = {"published": published, "open_clip": open_clip}
# Relative L2 errors against float64. bf16 leaves little of the first convolution's gradient: rounding moves numbers
# across the kink of each ReLU, and behind a batch norm there are many near it.
FLOAT32 = {"loss": 1e-5, "": 1e-4}
BF16 = {"loss": 1e-2, "visual.conv1.weight": 4e-1, "": 8e-2}


SPECS = {"tiny-rn": MODELS["tiny-rn"], "tiny-vit": MODELS["tiny-vit"], "small-rn": SMALL_RN}


@pytest.fixture(params=SPECS)
def model(request):
    """Parameters away from their zeros and ones, the temperature far from its bounds."""
    model = fresh(SPECS[request.param], 0)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=noise))
    return model


def captions(rows: int, seed: int) -> torch.Tensor:
    """Of 4, 6, 8, ... ids, the longest last."""
    noise, tokens = torch.Generator().manual_seed(seed), torch.zeros(rows, 77, dtype=torch.int64)
    for row in range(rows):
        end = 3 + 2 * row
        tokens[row, :end] = torch.randint(1, 49_406, (end,), generator=noise)
        tokens[row, 0], tokens[row, end] = 49_406, 49_407
    return tokens


def batch(views: int, rows: int = 8):
    noise = torch.Generator().manual_seed(1)
    images = [torch.randn(rows, 3, 32, 32, generator=noise) for _ in range(views)]
    return images, captions(rows, 2), captions(rows, 3).flip(0) if views == 2 else None


def text_by_hand(model, tokens):
    """One caption after another, one head after another, only up to the end token."""
    embedded = []
    for caption in tokens:
        length = 1 + int((caption == 49_407).nonzero())
        x = model.token_embedding.weight[caption[:length]] + model.positional_embedding[:length]
        for block in model.transformer.resblocks:
            attn, width = block.attn, x.shape[1]
            q, k, v = (block.ln_1(x) @ attn.in_proj_weight.T + attn.in_proj_bias).split(width, dim=1)
            size, heads = width // attn.heads, []
            for h in range(attn.heads):
                part = slice(h * size, (h + 1) * size)
                logits = q[:, part] @ k[:, part].T / math.sqrt(size)
                ahead = torch.ones_like(logits, dtype=torch.bool).triu(1)
                heads.append(logits.masked_fill(ahead, -math.inf).softmax(1) @ v[:, part])
            x = x + attn.out_proj(torch.cat(heads, dim=1))
            y = block.mlp.c_fc(block.ln_2(x))
            x = x + block.mlp.c_proj(y * torch.sigmoid(1.702 * y))
        embedded.append(model.ln_final(x[-1]) @ model.text_projection)
    return torch.stack(embedded)


def truth(model, images, tokens, tokens_aug):
    """Loss and gradients in float64 by the formulas of MMCL and SSL."""
    exact = deepcopy(model).double().train()
    image = F.normalize(exact.visual(torch.cat(images).double()), dim=1).split(len(tokens))
    texts = [F.normalize(text_by_hand(exact, t), dim=1) for t in (tokens, tokens_aug) if t is not None]
    pairs = [(image[0], texts[0]), (texts[0], image[0])]
    if tokens_aug is not None:
        pairs += [(image[0], image[1]), (texts[0], texts[1])]
    loss = -sum((exact.logit_scale.exp() * a @ b.T).log_softmax(1).diagonal().mean() for a, b in pairs) / 2
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in exact.named_parameters() if name in WATCHED}}


def relative(got, want) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def assert_close(got, want, tolerance):
    assert got.keys() == want.keys() and len(got) == 6
    errors = {name: relative(got[name], want[name]) for name in want}
    assert all(error <= tolerance.get(name, tolerance[""]) for name, error in errors.items()), errors


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients_are_those_of_the_formulas(model, way, views):
    inputs = batch(views)
    got = WAYS[way](model, HYPER)(*inputs)
    assert_close(got, truth(model, *inputs), FLOAT32 if way == "published" else BF16)


COMPILED = [("small-rn", 2, "eager"), ("tiny-rn", 2, "aot_eager"), ("tiny-vit", 1, "aot_eager")]


@pytest.mark.parametrize(("model", "views", "backend"), table(COMPILED, COMPILED[0]), indirect=["model"])
def test_compiled_steps_are_those_of_the_formulas_and_follow_the_eager_ones(model, views, backend):
    """Those that are watched are trained: the compiler follows Adam from one parameter to the next."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in WATCHED)
    images, *texts = batch(views)
    eager, compiled = open_clip(model, HYPER), open_clip(model, HYPER, backend)
    assert_close(compiled(images, *trimmed(*texts)), truth(model, images, *texts), BF16)
    eager(images, *texts)
    for _ in range(2):  # not closer: Adam's first updates double what rounding does to the sign of a gradient
        want, got = eager(images, *texts)["loss"], compiled(images, *trimmed(*texts))["loss"]
        assert got.item() == pytest.approx(want.item(), rel=2e-2)


def test_text_tower_equals_the_one_by_hand(model):
    tokens, exact = captions(6, 4), deepcopy(model).double()
    want = text_by_hand(exact, tokens)
    for length in (16, 77):
        assert relative(text_tower(exact, tokens[:, :length]), want) < 1e-12


@pytest.mark.parametrize("way", WAYS)
def test_the_given_model_stays_as_it_was(model, way):
    before = deepcopy(model.state_dict())
    images, *texts = batch(1)
    step = WAYS[way](model.eval(), HYPER)
    first, second = step(images, *texts)["loss"], step(images, *texts)["loss"]
    assert second < first  # the copy learns
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.fixture
def updates():
    """Of each update of any optimizer: [(value before, gradient, weight decay, the parameter)]."""
    seen = []

    def before(optimizer, *_):
        groups = optimizer.param_groups
        seen.append([(p.detach().clone(), p.grad.clone(), g["weight_decay"], p) for g in groups for p in g["params"]])

    hook = register_optimizer_step_pre_hook(before)
    yield seen
    hook.remove()


@pytest.mark.parametrize("way", WAYS)
def test_first_update_done_by_hand(model, way, updates):
    images, *texts = batch(1)
    model.logit_scale.data.fill_(4.5)
    WAYS[way](model, HYPER)(images, *texts)
    (parameters,) = updates
    assert len(parameters) == len(list(model.parameters()))
    for before, gradient, decay, after in parameters:  # Adam's first step: the gradient over its own size
        step = gradient / (gradient.abs() + HYPER.eps)
        torch.testing.assert_close(after, before * (1 - HYPER.lr * decay) - HYPER.lr * step, rtol=1e-4, atol=1e-6)


# Parameters of one dimension that have none of the names which CleanCLIP exempts: batch norms of shortcuts, and the
# class embedding.
ODD = {"ModifiedResNet": 4, "VisionTransformer": 1, "SmallResNet": 2}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_decayed(model, way, updates):
    images, *texts = batch(1)
    WAYS[way](model, HYPER)(images, *texts)
    decayed = [p for _, _, decay, p in updates[0] if decay == HYPER.weight_decay]
    assert sum(p.ndim >= 2 for p in decayed) == sum(p.ndim >= 2 for p in model.parameters())
    assert sum(p.ndim < 2 for p in decayed) == (ODD[type(model.visual).__name__] if way == "published" else 0)
    assert {decay for _, _, decay, _ in updates[0]} == {0, HYPER.weight_decay}


@pytest.mark.parametrize("way", WAYS)
def test_the_temperature_stays_within_its_bounds(model, way, updates):
    images, *texts = batch(1)
    for outside, bound in ((6.0, math.log(100)), (-1.0, 0.0)):
        model.logit_scale.data.fill_(outside)
        WAYS[way](model, HYPER)(images, *texts)
        (scale,) = (p for before, _, _, p in updates[-1] if before.ndim == 0)
        assert scale.item() == pytest.approx(bound)


def switches():
    cudnn = torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark


@pytest.mark.parametrize("way", WAYS)
def test_precision_and_layout_inside_a_step(model, way):
    """Seen by the first convolution of the copy."""
    seen = []

    def look(convolution, _, y):
        seen.append((switches(), y.dtype, y.is_contiguous(), convolution.weight.is_contiguous()))

    before = switches()
    model.to(memory_format=torch.channels_last).visual.conv1.register_forward_hook(look)
    images, *texts = batch(1)
    WAYS[way](model, HYPER)(images, *texts)
    matmul, dtype = ("highest", torch.float32) if way == "published" else ("high", torch.bfloat16)
    assert seen == [((matmul, True, True), dtype, True, True)]
    assert switches() == before


@pytest.mark.parametrize("way", WAYS)
def test_switches_come_back_after_an_error(model, way, monkeypatch):
    (image,), *texts = batch(1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = switches()
    with pytest.raises(RuntimeError, match="channels"):
        WAYS[way](model, HYPER)([image[:, :2]], *texts)
    assert switches() == before


@pytest.mark.parametrize(("longest", "aug", "length"), [(8, None, 8), (9, None, 16), (3, 17, 24), (73, 5, 77)])
def test_text_is_trimmed_to_a_multiple_of_8(longest, aug, length):
    texts = [torch.zeros(2, 77, dtype=torch.int64) for _ in (longest, aug) if _]
    for text, end in zip(texts, (longest, aug), strict=False):
        text[0, 2] = text[1, end - 1] = 49_407
    got = trimmed(*texts)
    for text, cut in zip(texts, got, strict=False):
        assert cut.shape == (2, length) and torch.equal(cut, text[:, :length])
    assert aug or got[1] is None
