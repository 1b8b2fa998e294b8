"""Zero-shot evaluation, clean and attacked, on images kept in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastbd import draws
from fastbd.data.beton import Beton
from fastbd.data.decode import Decoder
from fastbd.data.loader import Pairs
from fastbd.data.tokenizer import longest, tokenize
from fastbd.errors import UserError
from fastbd.evals.metrics import accuracy, attack, mean_by_class
from fastbd.kernels.augment import normalise
from fastbd.poison.plan import Plan
from fastbd.poison.triggers import stamp
from fastbd.precision import autocast
from fastbd.prompts import labels_in, read_classes, read_templates, target_index


@dataclass(frozen=True)
class EvalSet:
    """N labelled images: clean and (with a plan) fitted for the trigger, uint8 [N, S, S, 3] in memory."""

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
    seed: int = 0,
) -> EvalSet:
    """Read a labelled .beton; `subset` images drawn from `seed`, all when 0."""
    beton = Beton(path)
    if beton.class_names is None:
        raise UserError(
            f"{path} has no classes and cannot be evaluated; build it from class folders or with --class-key."
        )
    names = read_classes(classes) if classes else beton.class_names
    labels = np.asarray(labels_in(names, beton.class_names))[beton.labels]
    ids = np.arange(len(beton))
    if 0 < subset < len(ids):
        ids = np.sort(draws.generator(seed, "eval-subset").permutation(len(ids))[:subset])
    target = target_index(names, plan.target) if plan else -1
    prompts = tokenize([t.replace("{}", name) for name in names for t in read_templates(templates)])
    pairs = Pairs(beton, decoder, size)
    clean, attacked = _decode(pairs, ids, squash=False), None
    if plan:
        attacked = _decode(pairs, ids, squash=True) if plan.geometry == "squash" else clean
        stamp(attacked[:1], plan.trigger, seed=0, ids=ids[:1])  # a patch that does not fit shows here, not epochs later
    return EvalSet(Path(path).stem, ids, clean, torch.from_numpy(labels[ids]), names, prompts, plan, attacked, target)


def _decode(pairs: Pairs, ids: np.ndarray, squash: bool) -> Tensor:
    parts = [ids[start : start + 256] for start in range(0, len(ids), 256)]
    return torch.cat([pairs.decoded(part, np.full(len(part), squash)) for part in parts])


@torch.no_grad()
def evaluate(
    model: nn.Module, data: EvalSet, *, precision: str, device: torch.device, asr_seed: int = 0, batch: int = 512
) -> dict:
    """One row of metrics.jsonl, without step and epoch. The model is left in the mode it came in."""
    began, training = time.perf_counter(), model.training
    model.eval()
    with autocast(precision, device):
        classifier = text_classifier(model, data.prompts, len(data.classes), device, batch)
        row = {"set": data.name, **accuracy(_logits(model, classifier, data.clean, device, batch), data.labels)}
        if data.plan:
            trigger = data.plan.trigger
            logits = torch.cat(
                [
                    _logits(model, classifier, stamp(images, trigger, seed=asr_seed, ids=ids), device, batch)
                    for images, ids in zip(
                        data.attacked.split(batch), np.split(data.ids, range(batch, len(data.ids), batch)), strict=True
                    )
                ]
            )
            row |= {"target": data.plan.target, "trigger": trigger.name, **attack(logits, data.labels, data.target)}
    model.train(training)
    return {**row, "seconds": round(time.perf_counter() - began, 3)}


def text_classifier(model: nn.Module, prompts: np.ndarray, classes: int, device: torch.device, batch: int) -> Tensor:
    """[C, D]: the mean of each class's normalised prompt embeddings, normalised."""
    tokens = torch.from_numpy(prompts[:, : longest(prompts)].astype(np.int64))
    return mean_by_class(
        torch.cat([model.encode_text(part.to(device)).float() for part in tokens.split(batch)]), classes
    )


def _logits(model: nn.Module, classifier: Tensor, images: Tensor, device: torch.device, batch: int) -> Tensor:
    """float32 [N, C] on the CPU: cosines of images uint8 [N, S, S, 3] and classes."""
    parts = []
    for part in images.split(batch):
        embedded = model.encode_image(normalise(part.to(device))).float()
        parts.append((nn.functional.normalize(embedded, dim=-1) @ classifier.T).cpu())
    return torch.cat(parts)
