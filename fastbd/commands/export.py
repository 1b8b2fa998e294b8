"""fastbd export"""

from __future__ import annotations

import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbd.base import files
from fastbd.base.console import console
from fastbd.base.errors import UserError
from fastbd.base.files import write_text
from fastbd.base.run_folder import read
from fastbd.base.signals import held_back
from fastbd.commands.evaluate import open_model, table
from fastbd.config.flags import ExportConfig
from fastbd.data.tokenizer import CONTEXT, vocabulary
from fastbd.models.clip import CLIP, ModelSpec
from fastbd.models.layouts import hugging_face
from fastbd.models.targets import (
    check_holds,
    cleanclip_checkpoint,
    hugging_face_config,
    hugging_face_images,
    open_clip_config,
    open_clip_name,
    openai_name,
)
from fastbd.models.weight_files import write_safetensors
from fastbd.report.card import evaluated, model_card
from fastbd.training.optim import moments_of

SUFFIXES = {"open_clip": (".safetensors", ".pt"), "openai": (".pt",), "hf": (), "cleanclip": (".pt",)}


def run(config: ExportConfig) -> int:
    """Write a run's model as another program loads it, and its card; print how that is done."""
    check_out(config)
    state, model = open_model(config.run, config.checkpoint, torch.device("cpu"))
    check_holds(config.to, model, state["about"]["model"])
    card = _card(config, state, model.spec)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    if config.to == "hf":
        with files.new_folder(config.out) as new:
            write_hugging_face(new, model)
            (new / "README.md").write_text(card)
    else:
        _write_file(config, state, model)
        write_text(_card_of(config.out), card)
    said = "\n    ".join(loading(config.to, config.out, model.spec))
    console.print(f"{config.out}: the model of {config.run}, epoch {state['epoch']:g}\n    {said}", markup=False)
    return 0


def check_out(config: ExportConfig) -> None:
    """Raise a UserError where what is to be written has a wrong name, is there already, or could not be written."""
    to, out, suffixes = config.to, config.out, SUFFIXES[config.to]
    if suffixes and out.suffix not in suffixes:
        raise UserError(f"--to {to} makes a file: let the name of --out {out} end in {' or '.join(suffixes)}.")
    if not suffixes and out.suffix in (".pt", ".safetensors"):
        raise UserError(f"--to {to} makes a folder: leave {out.suffix} off the name of --out {out}.")
    if to == "open_clip" and "siglip" in out.stem.lower():
        raise UserError(f"open_clip gives a model that is called {out.stem} SigLIP's tokenizer: choose another --out.")
    made = [out, *([_card_of(out)] if suffixes else []), *([_json(out)] if to == "open_clip" else [])]
    for path in made:
        if os.path.lexists(path):
            raise UserError(f"{path} is there already: choose another --out, or remove it.")
    files.check_out(out, name=f"model{suffixes[0]}" if suffixes else None)


def _json(out: Path) -> Path:
    """Return the path of open_clip's model config; open_clip calls the model as the file."""
    return out.with_suffix(".json")


def _card_of(out: Path) -> Path:
    """Return the path of the model card of a file."""
    return out.with_name(f"{out.name}.md")


def weights_of(model: CLIP) -> dict[str, Tensor]:
    """Return the model's weights, each alone in memory, by OpenAI's names."""
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def _write_file(config: ExportConfig, state: dict, model: CLIP) -> None:
    with held_back(), files.replacing(config.out) as temporary:
        if config.out.suffix == ".safetensors":
            write_safetensors(temporary, weights_of(model))
        else:
            tree = _cleanclip(config, state, model) if config.to == "cleanclip" else weights_of(model)
            with open(temporary, "wb") as file:
                torch.save(tree, file)
    if config.to == "open_clip":
        files.write_json(_json(config.out), open_clip_config(model.spec))


def _cleanclip(config: ExportConfig, state: dict, model: CLIP) -> dict[str, Any]:
    decayed = state["optimizer"]["param_groups"][0]
    settings = {name: decayed[name] for name in ("betas", "eps", "weight_decay")} | {"lr": float(decayed["lr"])}
    moments = moments_of(model, state["optimizer"], state["config"].get("exempt", "vectors"))
    return cleanclip_checkpoint(model, moments, settings, int(state["epoch"]), read(config.run).name)


def write_hugging_face(folder: Path, model: CLIP) -> None:
    """Write into a folder what CLIPModel, CLIPTokenizer and CLIPProcessor read."""
    write_safetensors(folder / "model.safetensors", hugging_face(model.state_dict()))
    tokens, merges = vocabulary()
    start, end = list(tokens)[-2:]
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    about = {
        "config.json": hugging_face_config(model.spec),
        "preprocessor_config.json": hugging_face_images(model.image_size),
        "vocab.json": tokens,
        "tokenizer_config.json": special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT},
        "special_tokens_map.json": special,
    }
    for name, value in about.items():
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "LICENSE-tokenizer").write_text(_licence(), encoding="utf-8")


def _licence() -> str:
    """Return OpenAI's licence of the merges, which are not to be handed on without it."""
    text = resources.files("fastbd.data").joinpath("clip_merges.txt").read_text(encoding="utf-8")
    return re.sub("^# ?", "", text.partition("\n\n")[0] + "\n", flags=re.MULTILINE)


def loading(to: str, out: Path, spec: ModelSpec) -> list[str]:
    """Return the lines of Python that load what was written, or the flags of the programs that do."""
    if to == "open_clip":
        known = open_clip_name(spec)
        added = [] if known else [f'open_clip.add_model_config("{_json(out)}")']
        name = known or out.stem
        made = f'open_clip.create_model_and_transforms("{name}", pretrained="{out}")'
        tokenizer = f'tokenizer = open_clip.get_tokenizer("{name}")'
        return ["import open_clip", *added, f"model, _, preprocess = {made}", "model.eval()", tokenizer]
    if to == "openai":
        exact = f'model.load_state_dict(torch.load("{out}"))  # clip.load() has rounded the weights to half precision'
        return ["import clip, torch", f'model, preprocess = clip.load("{out}", device="cpu")', exact]
    if to == "hf":
        return [
            "from transformers import CLIPModel, CLIPProcessor",
            f'model = CLIPModel.from_pretrained("{out}")',
            f'processor = CLIPProcessor.from_pretrained("{out}")',
        ]
    return [f"CleanCLIP: --model_name {openai_name(spec)} --checkpoint {out}", f"PAR: --load-pretrained-clip {out}"]


def _card(config: ExportConfig, state: dict, spec: ModelSpec) -> str:
    found = read(config.run)
    rows = evaluated(found, state["step"])
    lines = loading(config.to, Path(config.out.name), spec)
    kind = "" if config.to == "cleanclip" else "python"
    shown = table(Path(found.name), rows) if rows else ""
    return model_card(found, state["step"], state["epoch"], shown, [f"```{kind}", *lines, "```"])
