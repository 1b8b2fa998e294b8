"""Other programs' forms of a model: which models each of them can hold, and what it wants beside the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastbd.base.errors import UserError
from fastbd.kernels.constants import CLIP_MEAN, CLIP_STD
from fastbd.kernels.text_pack import END
from fastbd.models.clip import CLIP, CONTEXT, MODELS, VOCABULARY, ModelSpec
from fastbd.models.origin import HIDDEN_ACT
from fastbd.models.resnet import ModifiedResNet
from fastbd.models.vit import VisionTransformer

TARGETS = ("open_clip", "openai", "hf", "cleanclip")
OPENAI = {
    "rn50": "RN50",
    "rn101": "RN101",
    "rn50x4": "RN50x4",
    "vit-b-32": "ViT-B/32",
    "vit-b-16": "ViT-B/16",
    "vit-l-14": "ViT-L/14",
    "vit-l-14-336": "ViT-L/14@336px",
}
"""OpenAI's names of the models that it has published."""
EPS = 1e-5  # of all norms


def check_holds(target: str, model: CLIP, name: str) -> None:
    """Raise a UserError where another program cannot make the model that is called `name` here."""
    if why := _unfit(target, model):
        others = [other for other in TARGETS if not _unfit(other, model)]
        instead = f"choose --to {' or '.join(others)}" if others else "there is no other form that could"
        raise UserError(f"--to {target} cannot hold the model {name}: {why}; {instead}.")


def _unfit(target: str, model: CLIP) -> str | None:
    """Return why a target cannot hold a model, as a clause; None where it can."""
    spec = model.spec
    if spec.small:
        return "its ResNet for small images is fastbd's own"
    if type(model) is not CLIP or type(model.visual) not in (ModifiedResNet, VisionTransformer):
        return "its towers are not CLIP's"
    if target == "open_clip":
        return None
    if target == "hf":
        return None if spec.patch else "transformers makes CLIP with a vision transformer alone, and this is a ResNet"
    if spec.activation != "quickgelu":
        return "it has the exact GELU, and OpenAI's code makes QuickGELU alone"
    if spec.text_heads != spec.text_width // 64:
        made = spec.text_width // 64
        return f"OpenAI's code makes {made} heads of a text tower {spec.text_width} wide, and it has {spec.text_heads}"
    if spec.image_size % (spec.patch or 32):
        return f"OpenAI's code takes its images for a multiple of {spec.patch or 32} px, not for {spec.image_size}"
    if target == "cleanclip" and openai_name(spec) is None:
        return f"the program makes OpenAI's models alone ({', '.join(OPENAI.values())})"
    return None


def openai_name(spec: ModelSpec) -> str | None:
    """Return OpenAI's name of a model of these sizes, whatever its activation; None where it has published none."""
    sizes = replace(spec, activation="quickgelu")
    return next((theirs for name, theirs in OPENAI.items() if MODELS[name] == sizes), None)


def open_clip_name(spec: ModelSpec) -> str | None:
    """Return open_clip's name of a model of these sizes and with this activation; None where it has none."""
    if (name := openai_name(spec)) is None:
        return None
    name = name.replace("/", "-").replace("@336px", "-336")
    return f"{name}-quickgelu" if spec.activation == "quickgelu" else name


def open_clip_config(spec: ModelSpec) -> dict[str, Any]:
    """Return what open_clip.add_model_config() reads; the images' normalisation is open_clip's default."""
    layers = spec.vision_layers[0] if spec.patch else list(spec.vision_layers)
    return {
        "embed_dim": spec.embed_dim,
        **({"quick_gelu": True} if spec.activation == "quickgelu" else {}),
        "vision_cfg": {
            "image_size": spec.image_size,
            "layers": layers,
            "width": spec.vision_width,
            "patch_size": spec.patch,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": VOCABULARY,
            "width": spec.text_width,
            "heads": spec.text_heads,
            "layers": spec.text_layers,
        },
    }


def hugging_face_config(spec: ModelSpec) -> dict[str, Any]:
    """Return CLIPModel's config.json, for a model with a vision transformer."""
    (act,) = (theirs for theirs, ours in HIDDEN_ACT.items() if ours == spec.activation)
    both = {"hidden_act": act, "layer_norm_eps": EPS, "projection_dim": spec.embed_dim}
    text = {
        "model_type": "clip_text_model",
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "hidden_size": spec.text_width,
        "intermediate_size": 4 * spec.text_width,
        "num_hidden_layers": spec.text_layers,
        "num_attention_heads": spec.text_heads,
        "bos_token_id": END - 1,
        "eos_token_id": END,
        "pad_token_id": END,
    }
    vision = {
        "model_type": "clip_vision_model",
        "image_size": spec.image_size,
        "patch_size": spec.patch,
        "hidden_size": spec.vision_width,
        "intermediate_size": 4 * spec.vision_width,
        "num_hidden_layers": spec.vision_layers[0],
        "num_attention_heads": spec.vision_width // 64,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": spec.embed_dim,
        "torch_dtype": "float32",
        "text_config": text | both,
        "vision_config": vision | both,
    }


def hugging_face_images(image_size: int) -> dict[str, Any]:
    """Return CLIPImageProcessor's preprocessor_config.json: the short side is resized, and the middle cut out."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }


def cleanclip_checkpoint(
    model: CLIP, moments: Mapping[str, Mapping[str, Tensor]], settings: Mapping[str, Any], epoch: int, name: str
) -> dict[str, Any]:
    """Return a checkpoint of CleanCLIP's program, by which it evaluates a model, cleans it or goes on to train it.

    `moments` are AdamW's of each parameter by its name, none for a fresh optimizer, and `settings` its settings.
    """
    names = [_swapped(parameter) for parameter, _ in model.named_parameters()]
    groups = [[n for n in names if _EXEMPT.search(n)], [n for n in names if not _EXEMPT.search(n)]]
    order = [*groups[0], *groups[1]]
    decays = 0.0, settings["weight_decay"]
    common = {"lr": settings["lr"], "betas": settings["betas"], "eps": settings["eps"], "amsgrad": False}
    places = {parameter: place for place, parameter in enumerate(order)}
    return {
        "epoch": epoch,
        "name": name,
        "state_dict": {f"module.{key}": tensor.contiguous() for key, tensor in model.state_dict().items()},
        "optimizer": {
            "state": {
                places[parameter]: {key: value.contiguous() for key, value in found.items()}
                for parameter, found in moments.items()
            },
            "param_groups": [
                {**common, "weight_decay": decay, "params": [places[parameter] for parameter in group]}
                for decay, group in zip(decays, groups, strict=True)
            ],
        },
    }


_EXEMPT = re.compile("bn|ln|bias|logit_scale")
"""Parts of the names of parameters that CleanCLIP's program does not decay; they are its optimizer's first group."""


def _swapped(parameter: str) -> str:
    """Return the parameter that is in OpenAI's order where this one is in ours: its attention pool has keys first."""
    return re.sub(r"(?<=attnpool\.)[qk](?=_proj)", lambda found: {"q": "k", "k": "q"}[found[0]], parameter)
