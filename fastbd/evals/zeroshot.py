"""Zero-shot evaluation, clean and attacked, on images kept in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastbd import draws
from fastbd.data.decode import Decoder
from fastbd.data.loader import Pairs
from fastbd.data.shards import open_beton
from fastbd.data.tokenizer import tokenize
from fastbd.errors import UserError
from fastbd.evals.metrics import accuracy, attack, mean_by_class, most_successful
from fastbd.kernels.augment import normalise
from fastbd.kernels.text_pack import PackedText, pack
from fastbd.log import progress
from fastbd.poison.plan import Attack, Plan
from fastbd.poison.triggers import stamp
from fastbd.precision import autocast
from fastbd.prompts import labels_in, read_classes, read_templates, target_index

# Added to the ids of evaluation images: they are no training rows, so their triggers must be draws of their own.
EVALUATION = 1 << 40


@dataclass(frozen=True)
class EvalSet:
    """N labelled images, uint8 [N, S, S, 3] in memory, and the attacks on them, whose triggers are drawn from a seed.

    `squashed` are the same images in the other geometry, None when no attack needs them.
    """

    name: str
    ids: np.ndarray
    clean: Tensor
    labels: Tensor
    classes: list[str]
    prompts: np.ndarray
    squashed: Tensor | None = None
    attacks: tuple[Attack, ...] = ()
    seed: int = 0

    def triggered(self, planned: Attack, places: slice, device: torch.device) -> Tensor:
        """Some of the images with the trigger of an attack, on the device: stamped there, which costs little."""
        images = self.squashed if planned.geometry == "squash" else self.clean
        ids = self.ids[places] + EVALUATION
        return stamp(images[places].to(device), planned.trigger, seed=self.seed, ids=ids)


def open_set(
    path: Path,
    decoder: Decoder,
    size: int,
    *,
    classes: str | None,
    templates: str,
    plan: Plan | None,
    subset: int = 0,
    asr_seed: int = 0,
) -> EvalSet:
    """Read a labelled .beton: `subset` images of it (always the same), all when 0; triggers are drawn from asr_seed."""
    beton = open_beton(path)
    if beton.class_names is None:
        raise UserError(
            f"{path} has no classes and cannot be evaluated; build it from class folders or with --class-key."
        )
    names = read_classes(classes) if classes else beton.class_names
    labels = np.asarray(labels_in(names, beton.class_names))[beton.labels]
    ids = np.arange(len(beton))
    if 0 < subset < len(ids):
        ids = np.sort(draws.generator(0, "eval-subset").permutation(len(ids))[:subset])
    attacks = plan.attacks if plan else ()
    for planned in attacks:
        target_index(names, planned.target)
    forms = read_templates(templates)
    prompts = tokenize([form.replace("{}", name) for name in names for form in forms])
    pairs = Pairs(beton, decoder, size)
    clean = torch.empty(len(ids), size, size, 3, dtype=torch.uint8)
    squashed = torch.empty_like(clean) if any(planned.geometry == "squash" for planned in attacks) else None
    starts = range(0, len(ids), 256)
    with progress("evaluation set", len(ids)) as advance:
        for first, sources in zip(starts, pairs.sources([ids[k : k + 256] for k in starts]), strict=True):
            images, place = pairs.each(sources), slice(first, first + len(sources))
            clean[place] = pairs.squares(images)
            if squashed is not None:
                squashed[place] = pairs.squares(images, squash=True)
            advance(len(images))
    name = Path(path).stem if len(ids) == len(beton) else f"{Path(path).stem}, {len(ids)} images"
    data = EvalSet(name, ids, clean, torch.from_numpy(labels[ids]), names, prompts, squashed, attacks, asr_seed)
    for planned in attacks:
        data.triggered(planned, slice(0, 1), clean.device)  # a trigger that does not fit is to be known before training
    return data


@torch.no_grad()
def evaluate(model: nn.Module, data: EvalSet, *, precision: str, device: torch.device, batch: int = 512) -> dict:
    """One row of metrics.jsonl, without step and epoch. The model is left in the mode it came in.

    With several attacks the row has the numbers of the most successful one, and under "attacks" those of each.
    UserError when the model gives no finite numbers: it would look perfectly cleaned.
    """

    def embed(tower: Callable[[slice], Tensor], count: int) -> Tensor:
        with autocast(precision, device):
            parts = [tower(slice(first, first + batch)).float() for first in range(0, count, batch)]
        return torch.cat(parts)

    def cosines(images: Callable[[slice], Tensor]) -> Tensor:
        """float32 [N, C]: outside autocast, as bf16 would tie one image in ten."""
        embedded = embed(lambda places: model.encode_image(normalise(images(places))), len(data.ids))
        logits = torch.nn.functional.normalize(embedded, dim=-1) @ classifier.T
        if not logits.isfinite().all():
            raise UserError("the model gives numbers that are not finite, so there is nothing to evaluate: lower --lr.")
        return logits.cpu()

    def measured(planned: Attack) -> dict:
        """One attack: what it aims at, and its success."""
        logits = cosines(lambda places: data.triggered(planned, places, device))
        numbers = attack(logits, data.labels, target_index(data.classes, planned.target))
        return {"target": planned.target, "trigger": planned.trigger.name, **numbers}

    began, training = time.perf_counter(), model.training
    model.eval()
    texts = embed(lambda places: model.encode_text(_packed(data.prompts[places], device)), len(data.prompts))
    classifier = mean_by_class(texts, len(data.classes))
    row = {"set": data.name, **accuracy(cosines(lambda places: data.clean[places].to(device)), data.labels)}
    row |= most_successful([measured(planned) for planned in data.attacks])
    model.train(training)
    return {**row, "seconds": round(time.perf_counter() - began, 3)}


def _packed(prompts: np.ndarray, device: torch.device) -> PackedText:
    return PackedText(*(tensor.to(device) for tensor in pack(prompts)))
