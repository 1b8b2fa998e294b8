"""Weights saved by the real classes of transformers and open_clip give the embeddings that these compute."""

from __future__ import annotations

import json

import pytest
import torch
from saved import load

from fastbd.base.errors import UserError
from fastbd.data.tokenizer import tokenize
from fastbd.kernels.text_pack import pack
from fastbd.models import read_weights
from fastbd.models.layouts import Found
from fastbd.models.origin import origin

CAPTIONS = ["a dog on a mat", "two red cars", "the quick brown fox jumps over the lazy dog", "!"]
NAMED = {"quick_gelu": "quickgelu", "gelu": "gelu"}


def pixels():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def padded():
    return torch.from_numpy(tokenize(CAPTIONS).astype("int64"))


def disturbed(model):
    """The model with all parameters away from their initial zeros and ones."""
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    return model.eval()


def assert_embeds(model, images, texts):
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels()), images, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.encode_text(pack(tokenize(CAPTIONS))), texts, rtol=1e-4, atol=1e-5)


@pytest.fixture
def clip_model():
    """tiny-vit as transformers' CLIPModel, by hidden_act and eos_token_id."""
    transformers = pytest.importorskip("transformers")

    def make(hidden_act="quick_gelu", eos=49_407, heads=2):
        common = dict(hidden_act=hidden_act, projection_dim=32)
        text = dict(
            hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=heads, eos_token_id=eos
        )
        vision = dict(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=1,
            image_size=32,
            patch_size=8,
        )
        config = transformers.CLIPConfig(text_config=common | text, vision_config=common | vision, projection_dim=32)
        return disturbed(transformers.CLIPModel(config))

    return make


def embeddings(model):
    """Of transformers' model: both pooled outputs, projected; its get_image_features differs between versions."""
    with torch.no_grad():
        images, texts = model.vision_model(pixel_values=pixels()), model.text_model(input_ids=padded())
        return model.visual_projection(images.pooler_output), model.text_projection(texts.pooler_output)


@pytest.mark.parametrize("eos", [2, 49_407])
@pytest.mark.parametrize("hidden_act", NAMED)
def test_hugging_faces_safetensors_and_config(clip_model, hidden_act, eos, tmp_path):
    theirs = clip_model(hidden_act, eos)
    theirs.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    assert weights.origin == (NAMED[hidden_act], "as config.json beside it says", (1, 2))
    ours = load(tmp_path, "tiny-vit", weights.origin.activation)
    assert_embeds(ours, *embeddings(theirs))
    assert ours.logit_scale.item() == theirs.logit_scale.item()
    other = load(tmp_path, "tiny-vit", {"quickgelu": "gelu", "gelu": "quickgelu"}[weights.origin.activation])
    with pytest.raises(AssertionError):
        assert_embeds(other, *embeddings(theirs))


@pytest.mark.parametrize("prefix", ["", "module.", "model.clip."])
@pytest.mark.parametrize("positions", [False, True])
def test_hugging_faces_bin(clip_model, prefix, positions, tmp_path):
    """As transformers wrote it up to version 4: with torch.save, and up to 4.30 with the positions."""
    theirs = clip_model()
    state = dict(theirs.state_dict())
    if positions:
        state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "pytorch_model.bin")
    assert read_weights(tmp_path).origin.activation == "quickgelu"
    assert_embeds(load(tmp_path, "tiny-vit"), *embeddings(theirs))


def test_hugging_faces_shards(clip_model, tmp_path):
    theirs = clip_model()
    theirs.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_embeds(load(tmp_path, "tiny-vit"), *embeddings(theirs))


@pytest.mark.parametrize(
    ("kind", "config", "lacks"),
    [
        ("CLIPVisionModelWithProjection", "vision_config", "the text tower and the temperature logit_scale"),
        ("CLIPTextModelWithProjection", "text_config", "the image tower and the temperature logit_scale"),
    ],
)
def test_one_tower_of_hugging_faces_is_refused(clip_model, kind, config, lacks, tmp_path):
    transformers = pytest.importorskip("transformers")
    getattr(transformers, kind)(getattr(clip_model().config, config)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"of another model: the file lacks {lacks}; "):
        load(tmp_path, "tiny-vit")


def test_heads_that_the_weights_do_not_tell(clip_model, tmp_path):
    clip_model(heads=4).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="config.json says 4 heads of the text tower, the model has 2"):
        load(tmp_path, "tiny-vit")


@pytest.mark.parametrize("hidden_act", ["gelu_pytorch_tanh", "relu"])
def test_an_activation_that_is_not_there(clip_model, hidden_act, tmp_path):
    clip_model(hidden_act).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=f"model.safetensors has config.json beside it that says hidden_act {hidden_act}"
    ):
        load(tmp_path, "tiny-vit")


@pytest.fixture
def open_clip_model():
    """tiny-vit or tiny-rn as open_clip makes it: CLIP or CustomTextCLIP."""
    open_clip = pytest.importorskip("open_clip")

    def make(name, kind, quick_gelu):
        vision = dict(layers=2, width=64, patch_size=8) if name == "tiny-vit" else dict(layers=(1, 1, 1, 1), width=4)
        if name == "tiny-rn":
            vision["head_width"] = 64
        text = dict(width=32, heads=2, layers=1)
        model = getattr(open_clip, kind)(
            embed_dim=32, vision_cfg=dict(image_size=32, **vision), text_cfg=text, quick_gelu=quick_gelu
        )
        return disturbed(model)

    return make


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_open_clips_models(open_clip_model, name, kind, quick_gelu, wrapped, tmp_path):
    theirs = open_clip_model(name, kind, quick_gelu)
    saved = torch.compile(theirs, backend="eager") if wrapped else theirs
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
    run = "2026_11_29-00_00_00-model_ViT-B-32-lr_0.001-b_64-j_4-p_amp"
    run = run.replace("32", "32-quickgelu") if quick_gelu else run
    tree = {"epoch": 3, "name": run, "state_dict": saved.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(tree, tmp_path / "epoch_3.pt")
    weights = read_weights(tmp_path / "epoch_3.pt")
    assert weights.origin.activation == ("quickgelu" if quick_gelu else "gelu")
    with torch.no_grad():
        expected = theirs.encode_image(pixels()), theirs.encode_text(padded())
    assert_embeds(load(tmp_path / "epoch_3.pt", name, weights.origin.activation), *expected)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_open_clips_folder_for_the_hub(open_clip_model, quick_gelu, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    theirs = open_clip_model("tiny-vit", "CLIP", quick_gelu)
    save_file(
        {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()},
        tmp_path / "open_clip_model.safetensors",
    )
    config = {
        "model_cfg": {"embed_dim": 32} | ({"quick_gelu": True} if quick_gelu else {}),
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    weights = read_weights(tmp_path)
    assert weights.origin.activation == ("quickgelu" if quick_gelu else "gelu")
    assert weights.said(None).endswith(
        "normalised by the mean [0.5, 0.5, 0.5], here by OpenAI's: expect lower accuracy"
    )
    with torch.no_grad():
        expected = theirs.encode_image(pixels()), theirs.encode_text(padded())
    assert_embeds(load(tmp_path, "tiny-vit", weights.origin.activation), *expected)


OURS = ("RN50", "RN101", "RN50x4", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")


def test_names_of_published_weights_tell_what_open_clips_table_says(tmp_path):
    table = pytest.importorskip("open_clip.pretrained")._PRETRAINED
    nothing, checked = Found({}, False, False, ()), 0
    for model in OURS:
        for about in table[model].values():
            expected = "quickgelu" if about.get("quick_gelu") else "gelu"
            files = [tmp_path / about["url"].split("/")[-1]] if about.get("url") else []
            if hub := about.get("hf_hub"):
                snapshot = f"models--{hub.strip('/').replace('/', '--')}/snapshots/0"
                files.append(tmp_path / snapshot / "open_clip_pytorch_model.bin")
            for file in files:
                assert origin(file, {}, nothing).activation == expected, file
                checked += 1
    assert checked > 50
