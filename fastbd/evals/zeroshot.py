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
from fastbd.data.tokenizer import longest, tokenize
from fastbd.errors import UserError
from fastbd.evals.metrics import accuracy, attack, mean_by_class
from fastbd.kernels.augment import normalise
from fastbd.log import progress
from fastbd.poison.plan import Plan
from fastbd.poison.triggers import stamp
from fastbd.precision import autocast
from fastbd.prompts import labels_in, read_classes, read_templates, target_index

# Added to the ids of evaluation images: they are no training rows, so their triggers must be draws of their own.
EVALUATION = 1 << 40


@dataclass(frozen=True)
class EvalSet:
    """N labelled images: clean and (with a plan) triggered, uint8 [N, S, S, 3] in memory."""

    name: str
    ids: np.ndarray
    clean: Tensor
    labels: Tensor
    classes: list[str]
    prompts: np.ndarray
    plan: Plan | None = None
    attacked: Tensor | None = None
    target: int = -1


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
    target = target_index(names, plan.target) if plan else -1
    forms = read_templates(templates)
    prompts = tokenize([form.replace("{}", name) for name in names for form in forms])
    pairs = Pairs(beton, decoder, size)
    clean = torch.empty(len(ids), size, size, 3, dtype=torch.uint8)
    attacked = torch.empty_like(clean) if plan else None
    with progress("evaluation set", len(ids)) as advance:
        for first in range(0, len(ids), 256):
            part = ids[first : first + 256]
            place = slice(first, first + len(part))
            clean[place] = pairs.decoded(part, np.zeros(len(part), bool))
            if plan:
                images = pairs.decoded(part, np.ones(len(part), bool)) if plan.geometry == "squash" else clean[place]
                attacked[place] = stamp(images, plan.trigger, seed=asr_seed, ids=part + EVALUATION)
            advance(len(part))
    name = Path(path).stem if len(ids) == len(beton) else f"{Path(path).stem}, {len(ids)} images"
    return EvalSet(name, ids, clean, torch.from_numpy(labels[ids]), names, prompts, plan, attacked, target)


@torch.no_grad()
def evaluate(model: nn.Module, data: EvalSet, *, precision: str, device: torch.device, batch: int = 512) -> dict:
    """One row of metrics.jsonl, without step and epoch. The model is left in the mode it came in.

    UserError when the model gives no finite numbers: it would look perfectly cleaned.
    """

    def embed(tower: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        with autocast(precision, device):
            parts = [tower(part.to(device)).float() for part in inputs.split(batch)]
        return torch.cat(parts)

    def cosines(images: Tensor) -> Tensor:
        """float32 [N, C]: outside autocast, as bf16 would tie one image in ten."""
        embedded = embed(lambda part: model.encode_image(normalise(part)), images)
        logits = torch.nn.functional.normalize(embedded, dim=-1) @ classifier.T
        if not logits.isfinite().all():
            raise UserError("the model gives numbers that are not finite, so there is nothing to evaluate: lower --lr.")
        return logits.cpu()

    began, training = time.perf_counter(), model.training
    model.eval()
    prompts = torch.from_numpy(data.prompts[:, : longest(data.prompts)].astype(np.int64))
    classifier = mean_by_class(embed(model.encode_text, prompts), len(data.classes))
    row = {"set": data.name, **accuracy(cosines(data.clean), data.labels)}
    if data.plan:
        row |= {"target": data.plan.target, "trigger": data.plan.trigger.name}
        row |= attack(cosines(data.attacked), data.labels, data.target)
    model.train(training)
    return {**row, "seconds": round(time.perf_counter() - began, 3)}
