from __future__ import annotations

import math
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastbd.base.errors import UserError
from fastbd.kernels.text_pack import pack
from fastbd.models import create
from fastbd.models.clip import CLIP, MODELS
from fastbd.models.resnet import AttentionPool

TINY = ["tiny-rn", "tiny-vit", "small-rn10"]


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(params=TINY)
def model(request):
    """A model whose parameters are all away from their initial zeros and ones."""
    model = create(request.param, 0)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=noise))
    return model


def batch(rows=4):
    """Pixels, and captions of 4, 5, ... tokens, padded to 77."""
    noise = torch.Generator().manual_seed(1)
    tokens = torch.zeros(rows, 77, dtype=torch.int64)
    for row in range(rows):
        tokens[row, : 3 + row] = torch.randint(1, 49_406, (3 + row,), generator=noise)
        tokens[row, 0], tokens[row, 3 + row] = 49_406, 49_407
    return torch.randn(rows, 3, 32, 32, generator=noise), tokens


@pytest.mark.parametrize(
    ("name", "total", "visual"),
    [
        ("rn50", 102_007_137, 38_316_896),
        ("rn101", 119_688_033, 56_259_936),
        ("rn50x4", 178_300_601, 87_137_080),
        ("vit-b-32", 151_277_313, 87_849_216),
        ("vit-b-16", 149_620_737, 86_192_640),
        ("vit-l-14", 427_616_513, 303_966_208),
        ("vit-l-14-336", 427_944_193, 304_293_888),
    ],
)
def test_published_parameter_counts(name, total, visual):
    with torch.device("meta"):
        model = CLIP(MODELS[name])
    assert (parameters(model), parameters(model.visual)) == (total, visual)


def test_rn50_text_tower_count():
    with torch.device("meta"):
        model = CLIP(MODELS["rn50"])
    assert parameters(model) - parameters(model.visual) - 1 == 63_690_240  # 1: the logit scale


def test_parameter_names_are_openais():
    block = ["attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"]
    block += [f"{m}.{p}" for m in ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj") for p in ("weight", "bias")]
    text = ["positional_embedding", "text_projection", "logit_scale", "token_embedding.weight"]
    text += ["ln_final.weight", "ln_final.bias", *(f"transformer.resblocks.0.{p}" for p in block)]
    vision = ["conv1.weight", "class_embedding", "positional_embedding", "proj"]
    vision += [f"{m}.{p}" for m in ("ln_pre", "ln_post") for p in ("weight", "bias")]
    vision += [f"transformer.resblocks.{i}.{p}" for i in range(2) for p in block]
    assert set(create("tiny-vit", 0).state_dict()) == {*text, *(f"visual.{p}" for p in vision)}

    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    stem = [f"conv{i}.weight" for i in (1, 2, 3)] + [f"bn{i}.{p}" for i in (1, 2, 3) for p in norm]
    shortcut = ["downsample.0.weight", *(f"downsample.1.{p}" for p in norm)]
    pool = ["positional_embedding"] + [f"{x}_proj.{p}" for x in "qkvc" for p in ("weight", "bias")]
    stages = [f"layer{i}.0.{p}" for i in (1, 2, 3, 4) for p in stem + shortcut]
    expected = {*text, *(f"visual.{p}" for p in [*stem, *stages, *(f"attnpool.{p}" for p in pool)])}
    assert set(create("tiny-rn", 0).state_dict()) == expected


def test_initial_statistics():
    model = create("demo", 0)
    width, layers = 64, len(model.transformer.resblocks)
    block, pool = model.transformer.resblocks[1], model.visual.attnpool
    for tensor, std in [
        (model.token_embedding.weight, 0.02),
        (model.positional_embedding, 0.01),
        (model.text_projection, width**-0.5),
        (block.attn.in_proj_weight, width**-0.5),
        (block.attn.out_proj.weight, (2 * width * layers) ** -0.5),
        (block.mlp.c_fc.weight, (2 * width) ** -0.5),
        (block.mlp.c_proj.weight, (2 * width * layers) ** -0.5),
        *(
            (projection.weight, pool.q_proj.in_features**-0.5)
            for projection in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj)
        ),
    ]:
        assert tensor.std().item() == pytest.approx(std, rel=0.05)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert all(not m.bn3.weight.any() for stage in range(1, 5) for m in getattr(model.visual, f"layer{stage}"))
    bound = (9 * model.visual.conv3.in_channels) ** -0.5  # PyTorch's default: uniform within 1 / sqrt(fan in)
    assert 0.9 * bound < model.visual.conv3.weight.abs().max() <= bound


def test_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(5)
    expected_next = torch.rand(3)
    torch.manual_seed(5)
    one = create("tiny-rn", 7).state_dict()
    assert torch.equal(torch.rand(3), expected_next)
    two, other = create("tiny-rn", 7).state_dict(), create("tiny-rn", 8).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["visual.conv1.weight"], other["visual.conv1.weight"])
    torch.manual_seed(7)
    assert torch.equal(create("tiny-rn", None).visual.conv1.weight, one["visual.conv1.weight"])


def test_unknown_name_lists_the_names():
    with pytest.raises(UserError, match="'rn18'.*'demo', 'small-rn10', 'rn50', .*'tiny-vit'"):
        create("rn18", 0)


def test_forward_is_both_towers_and_the_scale(model):
    pixels, tokens = batch()
    captions = pack(tokens.numpy())
    image, text, log_scale = model.eval()(pixels, captions)
    assert image.shape == text.shape == (4, model.embed_dim)
    assert log_scale.item() == pytest.approx(math.log(1 / 0.07), abs=0.2)
    torch.testing.assert_close(image, model.encode_image(pixels))
    torch.testing.assert_close(text, model.encode_text(captions))
    assert (image.norm(dim=1) - 1).abs().min() > 1e-3  # raw


def plain_text(model, tokens):
    """The text tower on padded captions, with PyTorch's attention and a mask."""
    x = (model.token_embedding(tokens) + model.positional_embedding).transpose(0, 1)
    mask = torch.full((77, 77), -torch.inf, dtype=x.dtype).triu(1)
    for block in model.transformer.resblocks:
        h, own = block.ln_1(x), block.attn
        x = (
            x
            + F.multi_head_attention_forward(
                h,
                h,
                h,
                h.shape[-1],
                own.heads,
                own.in_proj_weight,
                own.in_proj_bias,
                None,
                None,
                False,
                0.0,
                own.out_proj.weight,
                own.out_proj.bias,
                attn_mask=mask,
                need_weights=False,
            )[0]
        )
        x = x + block.mlp(block.ln_2(x))
    return model.ln_final(x)[tokens.argmax(1), torch.arange(len(tokens))] @ model.text_projection


@pytest.mark.parametrize("room", [1, 64])
def test_packed_text_has_the_outputs_and_gradients_of_padded_text(model, room):
    """In float64, to 1e-9: packing leaves out what nothing depends on."""
    model = model.double()
    _, tokens = batch(6)
    weights = torch.randn(6, model.embed_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = []
    for embedded in (plain_text(model, tokens), model.encode_text(pack(tokens.numpy(), room))):
        model.zero_grad()
        (embedded * weights).sum().backward()
        found.append({"embedded": embedded} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == 6 + 12 * len(model.transformer.resblocks)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


def test_text_is_read_at_the_end_token_and_only_up_to_it(model):
    _, tokens = batch()
    text = pack(tokens.numpy(), 64)
    embedded = model.encode_text(text)
    behind, before = text.tokens.clone(), text.tokens.clone()
    behind[text.starts[-1] :] = 1000
    before[2] = 1000  # of the first caption
    assert torch.equal(model.encode_text(text._replace(tokens=behind)), embedded)
    changed = model.encode_text(text._replace(tokens=before))
    assert torch.equal(changed[1:], embedded[1:]) and not torch.allclose(changed[0], embedded[0], atol=1e-4)


def reference_transformer(transformer, x, mask):
    """The same blocks by torch.nn.TransformerEncoderLayer."""
    for block in transformer.resblocks:
        width = x.shape[-1]
        layer = nn.TransformerEncoderLayer(
            width,
            block.attn.heads,
            4 * width,
            dropout=0,
            batch_first=True,
            norm_first=True,
            activation=lambda y: y * torch.sigmoid(1.702 * y),
        )
        ours = block.state_dict()
        pairs = {"self_attn": "attn", "norm1": "ln_1", "norm2": "ln_2", "linear1": "mlp.c_fc", "linear2": "mlp.c_proj"}
        layer.load_state_dict(
            {
                name: ours[next(name.replace(theirs, pairs[theirs]) for theirs in pairs if name.startswith(theirs))]
                for name in layer.state_dict()
            }
        )
        x = layer(x, src_mask=mask)
    return x


def test_text_tower_equals_torch_nn(model):
    _, tokens = batch()
    x = model.token_embedding(tokens) + model.positional_embedding
    x = reference_transformer(model.transformer, x, nn.Transformer.generate_square_subsequent_mask(77))
    expected = torch.stack([model.ln_final(x)[row, 3 + row] for row in range(4)]) @ model.text_projection
    torch.testing.assert_close(model.encode_text(pack(tokens.numpy())), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["tiny-vit"], indirect=True)
def test_vision_transformer_equals_torch_nn(model):
    pixels, _ = batch()
    tower = model.visual
    patches = F.unfold(pixels, 8, stride=8).transpose(1, 2) @ tower.conv1.weight.flatten(1).T
    x = torch.cat([tower.class_embedding.expand(4, 1, -1), patches], dim=1) + tower.positional_embedding
    x = reference_transformer(tower.transformer, tower.ln_pre(x), None)
    torch.testing.assert_close(tower(pixels), tower.ln_post(x[:, 0]) @ tower.proj, rtol=1e-4, atol=1e-5)


def test_attention_pool_equals_all_queries():
    torch.manual_seed(0)
    pool = AttentionPool(side=3, width=16, heads=4, embed_dim=8)
    x = torch.randn(5, 16, 3, 3)
    full = nn.MultiheadAttention(16, 4, batch_first=True)
    full.in_proj_weight.data = torch.cat([pool.q_proj.weight, pool.k_proj.weight, pool.v_proj.weight])
    full.in_proj_bias.data = torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias])
    full.out_proj.weight.data, full.out_proj.bias.data = torch.eye(16), torch.zeros(16)
    positions = x.flatten(2).transpose(1, 2)
    sequence = torch.cat([positions.mean(1, keepdim=True), positions], dim=1) + pool.positional_embedding
    expected = pool.c_proj(full(sequence, sequence, sequence)[0][:, 0])
    torch.testing.assert_close(pool(x), expected, rtol=1e-5, atol=1e-6)


def test_fresh_residual_blocks_are_their_shortcuts():
    stage = create("tiny-rn", 0).visual.layer2
    x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    shortcut = F.conv2d(F.avg_pool2d(x, 2), stage[0].downsample[1].weight)
    expected = F.batch_norm(shortcut, None, None, training=True).relu()
    torch.testing.assert_close(stage(x), expected, rtol=1e-4, atol=1e-5)


def test_small_resnet_halves_the_size_and_doubles_the_width():
    tower = create("small-rn10", 0).visual
    x, sizes = torch.randn(2, 32, 32, 32, generator=torch.Generator().manual_seed(0)), []
    for block in tower.stages:
        x = block(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(32, 16, 16), (64, 8, 8), (128, 4, 4), (256, 4, 4)]
    # ten layers with weights, as the name says: the stem, two a block, the projection
    convolutions = [m for m in tower.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == 10


def test_basic_block_is_two_convolutions_and_a_pooled_shortcut():
    block = create("small-rn10", 0).visual.stages[1].train()
    x = torch.randn(4, 32, 8, 8, generator=torch.Generator().manual_seed(0))

    def norm(y):
        return (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt()

    shortcut = norm(F.conv2d(F.avg_pool2d(x, 2), block.downsample[1].weight))
    y = norm(F.conv2d(x, block.conv1.weight, stride=2, padding=1)).relu()
    expected = (norm(F.conv2d(y, block.conv2.weight, padding=1)) + shortcut).relu()
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_channels_last_changes_nothing(model):
    pixels, _ = batch()
    expected = model.encode_image(pixels)
    model = model.to(memory_format=torch.channels_last)
    actual = model.encode_image(pixels.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_parameter(model):
    pixels, tokens = batch()
    image, text, log_scale = model(pixels, pack(tokens.numpy()))
    logits = log_scale.exp() * F.normalize(image) @ F.normalize(text).T
    F.cross_entropy(logits, torch.arange(4)).backward()
    still = {name for name, p in model.named_parameters() if not p.grad.abs().max() > 1e-9}
    # a constant added to all keys moves no softmax: zero up to rounding, by theory
    assert still <= {"visual.attnpool.k_proj.bias"}


@pytest.mark.parametrize("name", TINY)
def test_compiles_to_one_graph(name):
    model = create(name, 0).eval()
    pixels, tokens = batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    text = pack(tokens.numpy())
    for mine, theirs in zip(compiled(pixels, text), model(pixels, text), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", TINY)
def test_runs_under_bf16_autocast(name):
    model = create(name, 0)
    pixels, tokens = batch()
    captions = pack(tokens.numpy())
    image, text, _ = model(pixels, captions)
    with torch.autocast("cpu", torch.bfloat16):
        low_image, low_text, _ = model(pixels, captions)
    assert F.cosine_similarity(low_image.float(), image).min() > 0.98
    assert F.cosine_similarity(low_text.float(), text).min() > 0.98


@pytest.fixture
def builders(tmp_path, monkeypatch):
    """A module of one's own, `builders`, in the current folder."""
    (tmp_path / "builders.py").write_text(
        "import random\n"
        "import numpy as np\n"
        "import torch\n"
        "from fastbd.models.clip import CLIP, MODELS\n"
        "ONE = CLIP(MODELS['tiny-vit'])\n"
        "def drawn(activation):\n"
        "    model = CLIP(MODELS['tiny-vit'])\n"
        "    for draw in (np.random.randn, random.random):\n"
        "        model.logit_scale.data += draw()\n"
        "    return model\n"
        "def same(activation):\n"
        "    return ONE\n"
        "def shared(activation):\n"
        "    model = CLIP(MODELS['tiny-vit'])\n"
        "    model.visual = ONE.visual\n"
        "    return model\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "builders"
    sys.modules.pop("builders", None)


def test_a_model_of_ones_own_is_a_function_of_the_seed_whatever_it_draws_from(builders):
    one, other = create(f"{builders}:drawn", 7), create(f"{builders}:drawn", -8)
    np.random.seed(3), random.seed(3)
    two = create(f"{builders}:drawn", 7)
    assert torch.equal(one.logit_scale, two.logit_scale) and not torch.equal(one.logit_scale, other.logit_scale)
    np.random.seed(3), random.seed(3)
    here = np.random.randn(), random.random()
    np.random.seed(3), random.seed(3)
    create("tiny-vit", 7)
    assert (np.random.randn(), random.random()) == here


def test_weights_that_were_given_before_are_refused(builders):
    """Two runs in one process would train the same."""
    kept = create(f"{builders}:same", 0)
    for name in ("same", "shared"):
        with pytest.raises(UserError, match=rf"the model builders:{name} has weights that it has given before"):
            create(f"{builders}:{name}", 0)
    assert kept is not None
