"""Evaluation sets: images that are kept decoded and triggered, with their classes or their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastbd.base import random
from fastbd.base.console import console, progress
from fastbd.base.errors import UserError
from fastbd.base.prompts import (
    DEFAULT_TEMPLATES,
    labels_in,
    numbered,
    read_classes,
    read_templates,
    set_of,
    target_index,
)
from fastbd.base.text import holds
from fastbd.data.beton import Beton
from fastbd.data.decode import Decoder
from fastbd.data.pairs import Pairs
from fastbd.data.resident import free_memory
from fastbd.data.shards import Shards, open_beton
from fastbd.data.tokenizer import tokenize
from fastbd.poison.plan import Attack, Plan
from fastbd.poison.triggers import stamp

# Added to the ids of evaluation images: they are no training rows, so their triggers must be draws of their own.
EVALUATION = 1 << 40
CHUNK = 256  # images decoded, or triggered, at once


@dataclass(frozen=True)
class Attacked:
    """An attack of a plan on all images of a set, uint8 [N, S, S, 3]; its triggers are drawn from `seed`."""

    attack: Attack
    seed: int
    images: Tensor


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """N images, uint8 [N, S, S, 3], and the same triggered: on the device where they fill at most half of its memory,
    else in main memory.

    `ids` int64 [N] are their rows in the file, which holds `population` such images. `about` goes into metrics.jsonl.
    """

    name: str
    about: dict[str, str]
    ids: np.ndarray
    population: int
    clean: Tensor
    attacked: tuple[Attacked, ...]

    def by_attack(self) -> list[list[Attacked]]:
        """Those of one attack together, which differ in their seeds."""
        attacks = {id(one.attack): [] for one in self.attacked}
        for one in self.attacked:
            attacks[id(one.attack)].append(one)
        return list(attacks.values())


@dataclass(frozen=True, kw_only=True)
class Labelled(EvalSet):
    """For zero-shot classification: labels int64 [N], on the device, and the T prompts of each class in a row."""

    labels: Tensor
    classes: list[str]
    prompts: np.ndarray

    @property
    def measures_asr(self) -> bool:
        """Whether an attack can succeed on an image, one that is not of its target class."""
        targets = [target_index(self.classes, one.attack.target) for one in self.attacked]
        return any(bool((self.labels != target).any()) for target in targets)


@dataclass(frozen=True, kw_only=True)
class Captioned(EvalSet):
    """For retrieval: T captions, tokens uint16 [T, 77], and the place of the image of each, int64 [T]."""

    tokens: np.ndarray
    captions: list[str]
    image_of: Tensor


def open_set(
    path: Path,
    decoder: Decoder,
    size: int,
    *,
    classes: str | None,
    templates: str | None,
    plan: Plan | None,
    geometry: str | None = None,
    subset: int = 0,
    seeds: Sequence[int] = (0,),
    device: torch.device,
    strict: bool = True,
) -> Labelled | Captioned:
    """Read a .beton with classes, or without: a set of captions.

    `subset` images of one with classes (always the same), all when 0; the fewer the captions, the easier is retrieval.
    Each attack is made once for each of the `seeds`, in its own geometry or in the one given. UserError where classes,
    templates or, if `strict`, a target do not fit; else what cannot be measured is said.
    """
    beton = open_beton(path)
    labelled = beton.class_names is not None
    rows = np.arange(len(beton)) if labelled else np.unique(beton.image_of, return_index=True)[1]
    ids = rows
    if labelled and 0 < subset < len(rows):
        ids = np.sort(random.generator(0, "eval-subset").permutation(len(rows))[:subset])
    of_kind = _classified(beton, ids, classes, templates, device) if labelled else _captioned(beton, ids, device)
    attacks = [replace(attack, geometry=geometry or attack.geometry) for attack in plan.attacks] if plan else []
    attacks = [attack for attack in attacks if _has_target(of_kind, attack.target, path, strict)]
    draw = [(attack, seed) for attack in attacks for seed in seeds]
    clean, attacked = _images(Pairs(beton, decoder, size), ids, draw, device)
    name = Path(path).stem if len(ids) == len(rows) else f"{Path(path).stem}, {len(ids)} images"
    about = {"data": str(Path(path).absolute()), **of_kind.pop("about")}
    kind = Labelled if labelled else Captioned
    return kind(name=name, about=about, ids=ids, population=len(rows), clean=clean, attacked=attacked, **of_kind)


def part_of(data: Labelled, count: int) -> Labelled:
    """`count` of its images, always the same ones; all where there are fewer."""
    places = np.sort(random.generator(0, "eval-subset").permutation(len(data.ids))[:count])
    attacked = tuple(replace(one, images=one.images[places]) for one in data.attacked)
    labels = data.labels[torch.from_numpy(places).to(data.labels.device)]
    return replace(data, ids=data.ids[places], clean=data.clean[places], attacked=attacked, labels=labels)


def _has_target(of_kind: dict, target: str, path: Path, strict: bool) -> bool:
    """Whether ASR can be measured on the set."""
    if "captions" in of_kind:
        has_it = any(holds(caption, target) for caption in of_kind["captions"])
        reason = "" if has_it else f"no caption holds '{target}'"
    else:
        try:
            target_index(of_kind["classes"], target)
            reason = ""
        except UserError as error:
            if strict:
                raise
            reason = str(error).split(",")[0]
    if reason:
        console.print(f"{path}: ASR is not measured, as {reason}", markup=False)
    return not reason


def _classified(
    beton: Beton | Shards, ids: np.ndarray, classes: str | None, templates: str | None, device: torch.device
) -> dict:
    """What a labelled set has beside its images."""
    assert beton.class_names is not None and beton.labels is not None, "a labelled set has them"
    chosen = classes or set_of(beton.class_names)
    if not chosen and numbered(beton.class_names):
        raise UserError(f"the classes of {beton.path} are named by numbers: say with --classes what they are called.")
    names = read_classes(chosen) if chosen else beton.class_names
    labels = np.asarray(labels_in(names, beton.class_names))[beton.labels[ids]]
    forms = read_templates(templates, names)
    prompts = tokenize([form.replace("{}", name) for name in names for form in forms])
    own = "those in the class list" if getattr(names, "templates", None) else DEFAULT_TEMPLATES
    about = _about(beton) | {"class_list": chosen or "the data's", "templates": templates or own}
    return dict(about=about, classes=names, labels=torch.from_numpy(labels).to(device), prompts=prompts)


def _about(beton: Beton | Shards) -> dict:
    """Return what tells the set from others of its name: a file may be built anew."""
    return {"content": beton.fingerprint[:16]}


def _captioned(beton: Beton | Shards, ids: np.ndarray, device: torch.device) -> dict:
    """What a captioned set has beside its images, whose first rows are `ids`."""
    place = np.full(len(beton), -1)
    place[beton.image_of[ids]] = np.arange(len(ids))
    image_of = place[beton.image_of]
    rows = np.flatnonzero(image_of >= 0)
    captions = [beton.caption(row) for row in rows.tolist()]
    places = torch.from_numpy(image_of[rows]).to(device)
    return dict(about=_about(beton), tokens=beton.tokens(rows), captions=captions, image_of=places)


def _images(
    pairs: Pairs, ids: np.ndarray, attacks: Sequence[tuple[Attack, int]], device: torch.device
) -> tuple[Tensor, tuple[Attacked, ...]]:
    """The images of rows `ids`, decoded once, and their copies with the triggers of (attack, seed).

    Drawn once as well: to draw triggers for each evaluation would cost more than to embed the images.
    """
    clean, *triggered = _room(len(ids), pairs.size, 1 + len(attacks), device)
    squash = any(attack.geometry == "squash" for attack, _ in attacks)
    starts = range(0, len(ids), CHUNK)
    with progress("evaluation set", len(ids)) as advance:
        for first, sources in zip(starts, pairs.sources([ids[k : k + CHUNK] for k in starts]), strict=True):
            images, place = pairs.each(sources), slice(first, first + len(sources))
            cropped = pairs.squares(images).to(device)
            squashed = pairs.squares(images, squash=True).to(device) if squash else cropped
            clean[place] = cropped
            for out, (attack, seed) in zip(triggered, attacks, strict=True):
                base = squashed if attack.geometry == "squash" else cropped
                out[place] = stamp(base, attack.trigger, seed=seed, ids=ids[place] + EVALUATION)
            advance(len(images))
    return clean, tuple(Attacked(*which, images) for which, images in zip(attacks, triggered, strict=True))


def _room(count: int, size: int, copies: int, device: torch.device) -> Sequence[Tensor]:
    """Memory for `copies` of the images: on the device where it is at most half of what is free there."""
    shape, need = (copies, count, size, size, 3), copies * count * size * size * 3
    if device.type == "cuda" and 2 * need <= torch.cuda.mem_get_info(device)[0]:
        return torch.empty(shape, dtype=torch.uint8, device=device).unbind()
    if need > (free := free_memory()):
        raise UserError(
            f"an evaluation set of {count:,} images and {copies - 1} triggered copies needs {need / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free: evaluate part of it, with --eval-subset (evaluate: --subset)."
        )
    return torch.empty(shape, dtype=torch.uint8).unbind()
