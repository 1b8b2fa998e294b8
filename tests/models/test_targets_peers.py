"""What is exported, loaded by the real classes of open_clip, transformers and OpenAI's clip, embeds as our model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exported import disturbed, made
from PIL import Image
from torch import nn

from fastbd import cli
from fastbd.commands.export import loading
from fastbd.data.tokenizer import tokenize
from fastbd.evals.loaded import Loaded
from fastbd.kernels.constants import CLIP_STD
from fastbd.kernels.text_pack import pack
from fastbd.models import create
from fastbd.models.targets import OPENAI, cleanclip_checkpoint, open_clip_config, open_clip_name
from fastbd.training.optim import make_optimizer, moments_of

CAPTIONS = ["a dog on a mat", "two red cars", "Café No. 5 isn't open, it's 7:30!", "!", "word " * 100]
PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PADDED = torch.from_numpy(tokenize(CAPTIONS).astype("int64"))


@pytest.fixture(scope="module")
def photo():
    """An image that is neither square nor flat."""
    levels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    return Image.fromarray(levels).resize((90, 60), Image.Resampling.BICUBIC)


@pytest.fixture
def exported(study, monkeypatch, tmp_path):
    """exported(name, activation, to, file) exports a run's model: (what was written, the model)."""
    monkeypatch.chdir(study)

    def export(name, activation, to, file):
        run, model = made(study, name, activation)
        assert cli.main(["export", "--run", str(run), "--to", to, "--out", str(tmp_path / file)]) == 0
        return tmp_path / file, model

    return export


def told(to, path, model):
    """The names that are left by the lines of Python which the command prints."""
    names = {}
    exec("\n".join(loading(to, path, model.spec)), names)
    assert not names["model"].training
    assert names["model"].logit_scale.item() == model.logit_scale.item()
    return names


@torch.no_grad()
def assert_alike(model, images, texts):
    """Within 1e-6 of the longest embedding's length, which is what float32 leaves of sums in another order."""
    for ours, theirs in ((model.encode_image(PIXELS), images), (model.encode_text(pack(tokenize(CAPTIONS))), texts)):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6 * ours.norm(dim=-1).max().item())


def assert_sees(transform, model, photo):
    """Their transform makes of an image what ours does, but for few pixels a level of 256 away: they are PIL's."""
    away = (transform(photo) - Loaded(model).transform(photo)).abs() * 255 * torch.tensor(CLIP_STD)[:, None, None]
    assert away.max() < 1.01 and away.mean() < 0.05


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
@pytest.mark.parametrize(("activation", "file"), [("quickgelu", "a.b.safetensors"), ("gelu", "m.pt")])
def test_open_clip(exported, name, activation, file, photo):
    pytest.importorskip("open_clip")
    path, model = exported(name, activation, "open_clip", file)
    names = told("open_clip", path, model)
    theirs = names["model"]
    with torch.no_grad():
        assert_alike(model, theirs.encode_image(PIXELS), theirs.encode_text(PADDED))
    assert_sees(names["preprocess"], model, photo)
    assert torch.equal(names["tokenizer"](CAPTIONS), PADDED)


@pytest.mark.parametrize("activation", ["quickgelu", "gelu"])
def test_open_clip_knows_the_models_that_are_called_by_its_names(activation):
    factory = pytest.importorskip("open_clip.factory")
    for name in OPENAI:
        with torch.device("meta"):
            spec = create(name, 0, activation).spec
        assert factory.get_model_config(open_clip_name(spec)) == open_clip_config(spec)


@pytest.mark.parametrize("activation", ["quickgelu", "gelu"])
def test_transformers(exported, activation, photo):
    transformers = pytest.importorskip("transformers")
    path, model = exported("tiny-vit", activation, "hf", "folder")
    theirs, info = transformers.CLIPModel.from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        images, texts = theirs.vision_model(pixel_values=PIXELS), theirs.text_model(input_ids=PADDED)
        assert_alike(model, theirs.visual_projection(images.pooler_output), theirs.text_projection(texts.pooler_output))
    made = told("hf", path, model)["processor"](
        text=CAPTIONS, images=photo, return_tensors="pt", padding="max_length", truncation=True
    )
    assert_sees(lambda _: made["pixel_values"][0], model, photo)
    with torch.no_grad():
        texts = theirs.text_model(input_ids=made["input_ids"], attention_mask=made["attention_mask"])
        assert_alike(model, theirs.visual_projection(images.pooler_output), theirs.text_projection(texts.pooler_output))


@pytest.mark.parametrize("kind", ["CLIPTokenizer", "AutoTokenizer"])
def test_transformers_tokenizer(exported, kind):
    transformers = pytest.importorskip("transformers")
    path, _ = exported("tiny-vit", "quickgelu", "hf", "folder")
    tokenizer = getattr(transformers, kind).from_pretrained(path)
    found = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    ends = found == tokenizer.eos_token_id
    padding = ends.cumsum(1) - ends > 0  # by the end token, where OpenAI's program has zeros
    assert np.array_equal(np.where(padding, 0, found), PADDED.numpy())
    assert len(tokenizer) == 49_408
    assert tokenizer.decode(found[0], skip_special_tokens=True) == CAPTIONS[0]


@pytest.mark.parametrize("name", ["small_models:openai_vit", "small_models:openai_rn"])
def test_openais_clip(exported, name, photo):
    clip = pytest.importorskip("clip")
    path, model = exported(name, "quickgelu", "openai", "m.pt")
    names = told("openai", path, model)
    theirs = names["model"]
    assert_sees(names["preprocess"], model, photo)
    with torch.no_grad():
        assert_alike(model, theirs.encode_image(PIXELS), theirs.encode_text(PADDED))
    assert torch.equal(clip.tokenize(CAPTIONS, truncate=True).long(), PADDED)


def test_pars_program(tmp_path):
    """It loads what begins with module into open_clip's model."""
    open_clip = pytest.importorskip("open_clip")
    model = disturbed(create("small_models:openai_rn", 1))
    settings = {"lr": 2e-3, "betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.3}
    torch.save(cleanclip_checkpoint(model, {}, settings, 3, "poisoned"), tmp_path / "epoch_3.pt")
    saved = torch.load(tmp_path / "epoch_3.pt", map_location="cpu")["state_dict"]
    assert all(name.startswith("module.") for name in saved)
    theirs = open_clip.CLIP(**open_clip_config(model.spec)).eval()
    theirs.load_state_dict({name.removeprefix("module."): tensor for name, tensor in saved.items()})
    with torch.no_grad():
        assert_alike(model, theirs.encode_image(PIXELS), theirs.encode_text(PADDED))


def published_optimizer(model):
    """As CleanCLIP's program makes it: what is not decayed first, by the names of the parameters."""
    exempt = [p for name, p in model.named_parameters() if any(part in name for part in ("bn", "ln", "bias", "logit"))]
    decayed = [p for p in model.parameters() if all(p is not other for other in exempt)]
    return torch.optim.AdamW([{"params": exempt, "weight_decay": 0}, {"params": decayed, "weight_decay": 0.1}], lr=1e-3)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["small_models:openai_vit", "small_models:openai_rn"])
def test_cleanclips_program(name, wrapped, tmp_path):
    """Its model is that of OpenAI's package, its start from a checkpoint is told here in other words."""
    clip = pytest.importorskip("clip.model")
    model = disturbed(create(name, 1))
    optimizer = make_optimizer(model, lr=2e-3, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-7)
    model.encode_image(PIXELS).square().sum().backward()
    model.encode_text(pack(tokenize(CAPTIONS))).square().sum().backward()
    model.logit_scale.grad = torch.tensor(0.5)
    optimizer.step()
    moments = moments_of(model, optimizer.state_dict())
    settings = {"lr": 2e-3, "betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.3}
    torch.save(cleanclip_checkpoint(model, moments, settings, 3, "poisoned"), tmp_path / "epoch_3.pt")

    saved = torch.load(tmp_path / "epoch_3.pt")
    theirs = clip.build_model(dict(model.state_dict())).float()
    nn.init.zeros_(theirs.visual.conv1.weight)
    bare = {key.removeprefix("module."): value for key, value in saved["state_dict"].items()}
    assert bare.keys() == theirs.state_dict().keys() and len(bare) == len(saved["state_dict"])
    theirs.load_state_dict(bare)
    if wrapped:  # by DDP, whose names begin with the same word
        theirs = nn.ModuleDict({"module": theirs})
        theirs.load_state_dict(saved["state_dict"])
    again = published_optimizer(theirs)
    again.load_state_dict(saved["optimizer"])
    assert (saved["epoch"], saved["name"]) == (3, "poisoned")
    named = {key.removeprefix("module."): parameter for key, parameter in theirs.named_parameters()}
    assert named.keys() == moments.keys() == dict(model.named_parameters()).keys()
    for key, parameter in named.items():
        assert torch.equal(again.state[parameter]["exp_avg"], moments[key]["exp_avg"]), key
        assert torch.equal(again.state[parameter]["exp_avg_sq"], moments[key]["exp_avg_sq"]), key
        assert torch.equal(parameter, model.state_dict()[key])
    assert [(g["weight_decay"], g["betas"], g["eps"]) for g in again.param_groups] == [
        (0.0, (0.8, 0.9), 1e-7),
        (0.3, (0.8, 0.9), 1e-7),
    ]
    theirs.requires_grad_(True)
    for parameter in theirs.parameters():
        parameter.grad = torch.zeros_like(parameter)
    again.step()
