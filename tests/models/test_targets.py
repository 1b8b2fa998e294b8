"""Other programs' forms of a model: the names of weights, what each can hold, files of safetensors, an optimizer."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest
import torch
from exported import disturbed
from small_models import openai_rn, openai_vit

from fastbd.base.errors import UserError
from fastbd.models import create, read_weights
from fastbd.models.clip import CLIP, MODELS
from fastbd.models.layouts import hugging_face, weights_in
from fastbd.models.targets import (
    OPENAI,
    TARGETS,
    check_holds,
    cleanclip_checkpoint,
    hugging_face_config,
    open_clip_config,
    open_clip_name,
)
from fastbd.models.weight_files import read_file, write_safetensors
from fastbd.training.optim import EXEMPT, make_optimizer, moments_of


def on_meta(name, **changes):
    with torch.device("meta"):
        return CLIP(replace(MODELS[name], **changes))


def test_hugging_faces_names_are_read_back_as_ours():
    state = disturbed(create("tiny-vit", 1)).state_dict()
    theirs = hugging_face(state)
    assert "vision_model.encoder.layers.1.self_attn.k_proj.bias" in theirs
    assert not any(part in name for name in theirs for part in ("resblocks", "in_proj", "ln_", "c_fc"))
    assert theirs["text_projection.weight"].shape == state["text_projection"].T.shape
    found = weights_in(theirs)
    assert found.hugging_face and found.tensors.keys() == state.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in state.items())


def test_safetensors_are_read_back(tmp_path):
    kinds = {
        "steps": torch.tensor(7),
        "whole": torch.arange(3, dtype=torch.int32),
        "turned": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).T,
        "half": torch.ones(3, dtype=torch.float16),
        "brain": torch.ones(1, dtype=torch.bfloat16),
        "yes": torch.tensor([True, False, True]),
        "last": torch.full((2, 1, 2), -0.5),
        "none": torch.zeros(0, 2),
    }
    path = tmp_path / "x.safetensors"
    write_safetensors(path, kinds)
    read = read_file(path)
    assert read.keys() == kinds.keys()
    assert all(torch.equal(read[name], kinds[name]) and read[name].dtype == kinds[name].dtype for name in kinds)
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert all(entry["data_offsets"][0] % kinds[name].dtype.itemsize == 0 for name, entry in header.items())


def test_safetensors_are_read_by_their_own_library(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    state = disturbed(create("tiny-rn", 1)).state_dict()
    write_safetensors(tmp_path / "x.safetensors", state)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize("name", OPENAI)
def test_every_published_model_has_its_forms(name):
    for target in TARGETS:
        if target != "hf" or MODELS[name].patch:
            check_holds(target, on_meta(name), name)


@pytest.mark.parametrize(
    ("name", "changes", "target", "said"),
    [
        (
            "rn50",
            {},
            "hf",
            "--to hf cannot hold the model X: transformers makes CLIP with a vision transformer alone, and this is a "
            "ResNet; choose --to open_clip or openai or cleanclip.",
        ),
        (
            "demo",
            {},
            "openai",
            "--to openai cannot hold the model X: OpenAI's code makes 1 heads of a text tower 64 wide, and it has 2; "
            "choose --to open_clip.",
        ),
        (
            "vit-b-32",
            {"activation": "gelu"},
            "cleanclip",
            "--to cleanclip cannot hold the model X: it has the exact GELU, and OpenAI's code makes QuickGELU alone; "
            "choose --to open_clip or hf.",
        ),
        (
            "vit-b-32",
            {"image_size": 240},
            "openai",
            "--to openai cannot hold the model X: OpenAI's code takes its images for a multiple of 32 px, not for 240; "
            "choose --to open_clip or hf.",
        ),
        (
            "vit-b-32",
            {"text_layers": 3},
            "cleanclip",
            "--to cleanclip cannot hold the model X: the program makes OpenAI's models alone (RN50, RN101, RN50x4, "
            "ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px); choose --to open_clip or openai or hf.",
        ),
        (
            "small-rn10",
            {},
            "open_clip",
            "--to open_clip cannot hold the model X: its ResNet for small images is fastbd's own; there is no other "
            "form that could.",
        ),
    ],
)
def test_what_a_program_cannot_make_is_refused(name, changes, target, said):
    with pytest.raises(UserError) as raised:
        check_holds(target, on_meta(name, **changes), "X")
    assert str(raised.value) == said


class Own(CLIP):
    pass


def test_a_model_with_towers_of_its_own_is_refused():
    replaced = on_meta("tiny-vit")
    replaced.visual = torch.nn.Linear(3, 32)
    with torch.device("meta"):
        own = Own(MODELS["tiny-vit"])
    for model in (replaced, own):
        with pytest.raises(UserError, match="cannot hold the model mine: its towers are not CLIP's; there is no other"):
            check_holds("open_clip", model, "mine")


def test_names_and_activations_of_configs():
    assert [open_clip_name(MODELS[name]) for name in ("rn50x4", "vit-l-14-336", "demo")] == [
        "RN50x4-quickgelu",
        "ViT-L-14-336-quickgelu",
        None,
    ]
    gelu = replace(MODELS["vit-b-32"], activation="gelu")
    assert open_clip_name(gelu) == "ViT-B-32" and "quick_gelu" not in open_clip_config(gelu)
    assert hugging_face_config(gelu)["text_config"]["hidden_act"] == "gelu"
    assert hugging_face_config(MODELS["vit-b-32"])["vision_config"]["hidden_act"] == "quick_gelu"


@pytest.mark.parametrize("activation", ["gelu", "quickgelu"])
def test_the_config_of_open_clip_beside_the_weights_tells_the_activation(activation, tmp_path):
    model = create("tiny-rn", 1, activation)
    torch.save(model.state_dict(), tmp_path / "laion.pt")  # a name that would tell of GELU
    (tmp_path / "laion.json").write_text(json.dumps(open_clip_config(model.spec)))
    assert read_weights(tmp_path / "laion.pt").origin[:2] == (activation, "as laion.json beside it says")
    (tmp_path / "laion.json").write_text('{"quick_gelu": true}')  # of something else
    assert read_weights(tmp_path / "laion.pt").origin[:2] == ("gelu", "as its name says laion")


def trained(model, *others, exempt="vectors"):
    optimizer = make_optimizer(model, *others, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8, exempt=exempt)
    for module in (model, *others):
        for place, parameter in enumerate(module.parameters()):
            parameter.grad = torch.full_like(parameter, place + 1.0)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("exempt", EXEMPT)
def test_moments_are_those_of_each_parameter_by_name(exempt):
    model = openai_rn("quickgelu")
    moments = moments_of(model, trained(model, exempt=exempt), exempt)
    for place, (name, parameter) in enumerate(model.named_parameters()):
        torch.testing.assert_close(moments[name]["exp_avg"], torch.full_like(parameter, 0.1 * (place + 1)))
    fresh = make_optimizer(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8).state_dict()
    assert moments_of(model, fresh) == {}
    assert moments_of(model, trained(model, torch.nn.Linear(32, 7))) == {}  # with a method's head


def test_cleanclips_optimizer_has_the_undecayed_first_and_keys_before_queries():
    model = openai_rn("quickgelu")
    moments = moments_of(model, trained(model))
    settings = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    saved = cleanclip_checkpoint(model, moments, settings, 3, "x")
    exempt, decayed = saved["optimizer"]["param_groups"]
    assert (exempt["weight_decay"], decayed["weight_decay"]) == (0, 0.1)
    assert exempt["params"] + decayed["params"] == list(range(len(moments)))
    keys, queries = (
        next(place for place, state in saved["optimizer"]["state"].items() if torch.equal(state["exp_avg"], one))
        for one in (moments[f"visual.attnpool.{x}_proj.weight"]["exp_avg"] for x in "kq")
    )
    assert list(moments).index("visual.attnpool.q_proj.weight") < list(moments).index("visual.attnpool.k_proj.weight")
    assert queries == keys + 1 and keys in decayed["params"]
    shortcut = moments["visual.layer1.0.downsample.1.weight"]["exp_avg"]  # a gain whose name does not tell
    assert sum(torch.equal(saved["optimizer"]["state"][place]["exp_avg"], shortcut) for place in decayed["params"]) == 1


def test_cleanclips_checkpoint_without_moments_is_that_of_a_fresh_optimizer():
    model = openai_vit("quickgelu")
    settings = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    saved = cleanclip_checkpoint(model, {}, settings, 0, "x")
    groups = [[torch.nn.Parameter(torch.zeros(1)) for _ in g["params"]] for g in saved["optimizer"]["param_groups"]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    optimizer.load_state_dict(saved["optimizer"])
    assert not optimizer.state and sum(map(len, groups)) == len(list(model.parameters()))
