from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
from saved import assert_loads, load, prefixed, write_safetensors
from torch import nn

from fastbd.base.errors import UserError
from fastbd.data.tokenizer import tokenize
from fastbd.kernels.text_pack import pack
from fastbd.models import create, read_weights
from fastbd.models.clip import CLIP, MODELS


@pytest.fixture(scope="module")
def source():
    model = create("tiny-rn", 1)
    model.visual.bn1.running_mean.fill_(0.5)  # buffers are weights too
    return model


def published_schedule(optimizer, base, warmup, total):
    """What CleanCLIP's and PAR's programs do before each step: numpy's cosine, put into the optimizer."""

    def set_rate(step):
        rate = base * (step + 1) / warmup
        if step >= warmup:
            rate = 0.5 * (1 + np.cos(np.pi * (step - warmup) / (total - warmup))) * base
        for group in optimizer.param_groups:
            group["lr"] = rate

    return set_rate


@pytest.fixture(scope="module")
def trained():
    """A model after steps beyond the warm-up, and its optimizer."""
    model = create("tiny-rn", 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    set_rate = published_schedule(optimizer, 1e-3, warmup=2, total=5)
    for step in range(4):
        set_rate(step)
        optimizer.zero_grad()
        model.encode_image(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(step))).sum().backward()
        optimizer.step()
    assert type(optimizer.param_groups[0]["lr"]) is np.float64
    return model, optimizer


def checkpoint_of(trained, layout):
    model, optimizer = trained
    state = prefixed(model.state_dict(), "module.")
    if layout == "CleanCLIP":
        return {"epoch": 3, "name": "poisoned_mmcl", "state_dict": state, "optimizer": optimizer.state_dict()}
    if layout == "CleanCLIP, one GPU":
        return {"epoch": 3, "name": "x", "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    options = argparse.Namespace(lr=3e-6, name="par", device=torch.device("cpu"), best=np.float64(0.5))
    return {"epoch": 1, "state_dict": state, "optimizer": optimizer.state_dict(), "args": options}


@pytest.mark.parametrize("layout", ["CleanCLIP", "CleanCLIP, one GPU", "PAR"])
def test_checkpoints_of_published_programs_after_their_warm_up(layout, trained, tmp_path):
    torch.save(checkpoint_of(trained, layout), tmp_path / "weights.pt")
    assert_loads(tmp_path / "weights.pt", trained[0])


@pytest.mark.parametrize("ours", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_checkpoints_of_either_numpy(ours, trained, tmp_path):
    """In the pickle a module's name ends with a line, so that another one fits in its place; the zip is made anew."""
    path = tmp_path / "weights.pt"
    torch.save(checkpoint_of(trained, "PAR"), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    installed = np.float64.__reduce__(np.float64(1))[0].__module__.encode()
    assert whole.count(b"c" + installed + b"\nscalar\n") == 1
    path.write_bytes(whole.replace(b"c" + installed + b"\nscalar\n", b"c" + ours + b"\nscalar\n"))
    assert_loads(path, trained[0])


LAYOUTS = {
    "state dict": lambda state: state,
    "own": lambda state: {"model": state, "step": 3, "optimizer": {"state": {}}},
    "open_clip": lambda state: {"epoch": 3, "name": "x", "state_dict": prefixed(state, "module.")},
    "PAR tower class": lambda state: {n.replace("visual.", "visual.model."): t for n, t in state.items()},
    "compiled": lambda state: {"model": prefixed(state, "_orig_mod.")},
    "compiled, then DDP": lambda state: prefixed(state, "module._orig_mod."),
    "DDP, then compiled": lambda state: prefixed(state, "_orig_mod.module."),
    "compiled tower": lambda state: {n.replace("visual.", "visual._orig_mod."): t for n, t in state.items()},
    "Lightning": lambda state: {"state_dict": prefixed(state, "model."), "hyper_parameters": {"lr": 1e-3}},
    "Lightning, own name": lambda state: {"state_dict": prefixed(state, "clip._orig_mod.") | {"loss.weight": ONE}},
    "net": lambda state: {"net": prefixed(state, "module.")},
    "model_state_dict": lambda state: {"model_state_dict": state, "epoch": 3},
    "nested": lambda state: {"model": {"state_dict": prefixed(state, "net.")}},
    "averaged by torch": lambda state: prefixed(state, "module.") | {"n_averaged": torch.tensor(3)},
    "CustomTextCLIP": lambda state: {text_prefixed(name): tensor for name, tensor in state.items()},
    "CustomTextCLIP, DDP": lambda state: {f"module.{text_prefixed(name)}": t for name, t in state.items()},
}
ONE = torch.ones(1)


def text_prefixed(name):
    return name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_torch_save(layout, source, tmp_path):
    torch.save(LAYOUTS[layout](source.state_dict()), tmp_path / "weights.pt")
    assert_loads(tmp_path / "weights.pt", source)


def zeros(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("tree", "note"),
    [
        (lambda s: {"model": s, "ema": zeros(s)}, "the weights 'model' are taken, not the averaged ones 'ema'"),
        (
            lambda s: {"state_dict_ema": zeros(s), "state_dict": s},
            "the weights 'state_dict' are taken, not the averaged ones 'state_dict_ema'",
        ),
        (
            lambda s: {"model_ema": prefixed(s, "module.")},
            "the averaged weights 'model_ema' are taken, as there are no others",
        ),
        (
            lambda s: {"state_dict": prefixed(s, "net.") | prefixed(zeros(s), "model_ema.")},
            "the weights 'net' are taken, not the averaged ones 'model_ema'",
        ),
        (
            lambda s: {"state_dict": prefixed(s, "model.") | prefixed(zeros(s), "ema.module.")},
            "the weights are taken, not the averaged ones 'ema'",
        ),
        (lambda s: prefixed(s, "ema_model."), "the averaged weights 'ema_model' are taken, as there are no others"),
    ],
)
def test_averaged_weights_are_taken_where_there_are_no_others(tree, note, source, tmp_path):
    torch.save(tree(source.state_dict()), tmp_path / "weights.pt")
    assert_loads(tmp_path / "weights.pt", source)
    assert read_weights(tmp_path / "weights.pt").said(None).endswith(note)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            lambda s: prefixed(s, "student.") | prefixed(s, "teacher."),
            "weights.pt holds several models, 'student.' and 'teacher.'",
        ),
        (lambda s: s | prefixed(s, "module."), "holds .* twice, as .* and as module"),
    ],
)
def test_two_models_in_a_file(tree, message, source, tmp_path):
    torch.save(tree(source.state_dict()), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "weights.pt")


def test_openai_state_dict_is_cast_from_half_and_its_sizes_are_dropped(source, tmp_path):
    state = {name: t.half() if t.is_floating_point() else t for name, t in source.state_dict().items()}
    sizes = {"input_resolution": 32, "context_length": 77, "vocab_size": 49_408}
    torch.save(state | {name: torch.tensor(size) for name, size in sizes.items()}, tmp_path / "weights.pt")
    assert_loads(tmp_path / "weights.pt", source, atol=2e-3)
    assert "activation quickgelu, as in OpenAI's layout" in read_weights(tmp_path / "weights.pt").said(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("ln_final.bias"), "the file lacks ln_final.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "the file holds extra, which the model lacks"),
        (
            lambda state: state.update({"ln_final.bias": torch.zeros(3)}),
            r"ln_final.bias has shape \(3,\) in the file, \(32,\) in the model",
        ),
        (
            lambda state: state.update({"ln_final.bias": torch.zeros(32, dtype=torch.int8)}),
            "ln_final.bias is int8 in the file",
        ),
        (
            lambda state: state.update({"ln_final.bias": torch.zeros(32, dtype=torch.complex64)}),
            "ln_final.bias is complex64 in the file",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if not name.startswith("visual.")],
            "the file lacks the text tower and the temperature logit_scale",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if name.startswith("visual.")],
            "the file lacks the image tower",
        ),
        (
            lambda state: (state.clear(), state.update({"layer1.0.conv1.weight": torch.zeros(1)})),
            "the file lacks the image tower and the text tower and the temperature logit_scale; "
            "the file holds layer1.0.conv1.weight, which the model lacks",
        ),
    ],
)
def test_another_model_is_named_and_changes_nothing(change, message, source, tmp_path):
    state = dict(source.state_dict())
    change(state)
    torch.save(state, tmp_path / "weights.pt")
    model = create("tiny-rn", 2)
    before = model.token_embedding.weight.clone()
    hint = "give --model with the one it was made with"
    with pytest.raises(UserError, match=f"weights.pt is a checkpoint of another model: {message}; {hint}"):
        read_weights(tmp_path / "weights.pt").load_into(model)
    assert torch.equal(model.token_embedding.weight, before)


def test_the_model_that_weights_fit_is_named(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match="checkpoint of another model: .*; give --model tiny-rn"):
        load(tmp_path / "weights.pt", "tiny-vit")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(value, source, tmp_path):
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    state["ln_final.bias"][3] = value
    torch.save(state, tmp_path / "weights.pt")
    model = create("tiny-rn", 2)
    before = model.token_embedding.weight.clone()
    with pytest.raises(UserError, match="weights.pt has NaN or infinite numbers in ln_final.bias"):
        read_weights(tmp_path / "weights.pt").load_into(model)
    assert torch.equal(model.token_embedding.weight, before)


def test_a_folder_of_the_hub_and_a_sharded_file(source, tmp_path):
    with pytest.raises(UserError, match="is a folder without ckpt_last.pt or model.safetensors or "):
        load(tmp_path)
    state = source.state_dict()
    halves = {"a.safetensors": list(state)[::2], "b.safetensors": list(state)[1::2]}
    for name, half in halves.items():
        write_safetensors(tmp_path / name, {key: state[key] for key in half})
    places = {key: name for name, half in halves.items() for key in half}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_loads(tmp_path, source)
    assert_loads(index, source)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match="There is no checkpoint .*b.safetensors"):
        load(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", state)
    assert_loads(tmp_path, source)


@pytest.mark.parametrize("config", [{"model_cfg": 3}, {"preprocess_cfg": {"mean": [0.5, 0.5]}}, {"preprocess_cfg": []}])
def test_an_odd_config_beside_the_weights_is_named(source, tmp_path, config):
    write_safetensors(tmp_path / "model.safetensors", source.state_dict())
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="a config beside .*model.safetensors"):
        load(tmp_path)


def test_a_run_folder(source, tmp_path):
    about = {"model": "tiny-rn", "activation": "gelu"}
    torch.save({"fastbd": "0.1.0", "about": about, "model": source.state_dict()}, tmp_path / "ckpt_last.pt")
    assert_loads(tmp_path, source)
    assert read_weights(tmp_path).origin[:2] == ("gelu", "as it records")


@pytest.mark.parametrize(("name", "activation"), [("tiny-vit", "gelu"), ("tiny-rn", "gelu")])
def test_the_wrong_activation_on_the_same_weights_shows(name, activation, tmp_path):
    made = create(name, 1, activation)
    torch.save(made.state_dict(), tmp_path / "laion.pt")
    weights = read_weights(tmp_path / "laion.pt")
    assert weights.origin.activation == activation
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = captions()
    right, wrong = load(tmp_path / "laion.pt", name, activation).eval(), load(tmp_path / "laion.pt", name).eval()
    made.eval()
    assert torch.equal(right.encode_text(texts), made.encode_text(texts))
    assert torch.equal(right.encode_image(pixels), made.encode_image(pixels))
    assert (wrong.encode_text(texts) - made.encode_text(texts)).abs().max() > 1e-3
    if name == "tiny-vit":  # a ResNet has ReLU
        assert (wrong.encode_image(pixels) - made.encode_image(pixels)).abs().max() > 1e-3


def captions():
    return pack(tokenize(["a dog on a mat", "two red cars"]))


def test_gelu_is_the_exact_one():
    gelu = create("tiny-vit", 0, "gelu").transformer.resblocks[0].mlp.gelu
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    torch.testing.assert_close(gelu(x), x / 2 * (1 + torch.erf(x / 2**0.5)), rtol=1e-12, atol=1e-12)
    activations = {type(m) for m in create("tiny-vit", 0, "gelu").modules() if "GELU" in type(m).__name__}
    assert activations == {nn.GELU}


def test_openais_largest_model_at_336_px():
    """14 px patches: 24 x 24 of them and the class token; nothing else differs from ViT-L/14."""
    with torch.device("meta"):
        large, larger = CLIP(MODELS["vit-l-14"]), CLIP(MODELS["vit-l-14-336"])
    shapes = [{name: tuple(t.shape) for name, t in model.state_dict().items()} for model in (large, larger)]
    assert shapes[1] == shapes[0] | {"visual.positional_embedding": (577, 1024)}
    assert larger.image_size == 336
