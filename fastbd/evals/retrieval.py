"""Image-text retrieval, clean and attacked, and the validation loss, from raw embeddings."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbd.base.errors import UserError
from fastbd.base.evaluation import Evaluation, evaluation_of
from fastbd.base.prompts import read_templates
from fastbd.base.text import holds
from fastbd.data.tokenizer import tokenize
from fastbd.evals.classifier import Classifier
from fastbd.evals.metrics import averaged, blocks, geometry, most_successful, ranks, rate, unit
from fastbd.evals.sets import Attacked, Captioned
from fastbd.evals.towers import Towers
from fastbd.kernels.contrastive import contrastive_loss

KS = (1, 5, 10)


def recall(images: Tensor, texts: Tensor, image_of: Tensor, ks: tuple[int, ...] = KS) -> dict[str, float | None]:
    """R@k both ways: images [I, D], texts [T, D], the image of each text, int64 [T]; R@1 with intervals.

    i2t: images with any of their texts among the first k texts; t2i: texts with their image among the first k. Equal
    scores are in the order of their indices. An image without a text is never found.
    """
    images, texts = unit(images), unit(texts)
    places = torch.arange(len(images), device=images.device)
    i2t, t2i = [], []
    for here in blocks(len(images), len(texts)):
        scores = images[here] @ texts.T
        strange = image_of != places[here, None]
        best = scores.masked_fill(strange, -math.inf).argmax(1)
        i2t.append(ranks(scores, best).masked_fill(strange.all(1), max(ks)))
    for here in blocks(len(texts), len(images)):
        t2i.append(ranks(texts[here] @ images.T, image_of[here]))
    row: dict[str, float | None] = {}
    for way, found in (("i2t", torch.cat(i2t)), ("t2i", torch.cat(t2i))):
        hits = torch.stack([(found < k).sum() for k in ks]).tolist()
        row |= {f"{way}_r{k}": count / len(found) for k, count in zip(ks, hits, strict=True)}
        if 1 in ks:
            row |= rate(f"{way}_r1", hits[ks.index(1)], len(found))
    return row


def attack(images: Tensor, texts: Tensor, is_target: Tensor, ks: tuple[int, ...] = KS) -> dict[str, float | None]:
    """Attack success of triggered images [I, D] over texts [T, D], of which bool [T] are the target's.

    With intervals. By PAR (arXiv 2412.00727): any of the first k texts is the target's. By the code of Verma et al.
    (arXiv 2311.14948), which has one text an image: at least k // 2 of them, and one.
    """
    images, texts = unit(images), unit(texts)
    first = min(max(ks), len(texts))
    nearest = [(images[here] @ texts.T).topk(first).indices for here in blocks(len(images), len(texts))]
    found = is_target[torch.cat(nearest)].cumsum(1)
    rules = {f"asr_par_r{k}": (k, 1) for k in ks} | {f"asr_cleanclip_r{k}": (k, max(1, k // 2)) for k in ks}
    hits = torch.stack([(found[:, min(k, first) - 1] >= needed).sum() for k, needed in rules.values()]).tolist()
    row: dict[str, float | None] = {}
    for name, count in zip(rules, hits, strict=True):
        row |= rate(name, count, len(images))
    return row


def similar_captions(texts: Tensor, is_target: Tensor, target: Tensor, count: int = 20) -> Tensor:
    """The target's captions, bool [T], and the `count` texts [T, D] nearest to the target's class embedding [D].

    The set of Verma et al.'s code: the class embedding is that of the zero-shot classifier, and the nearest texts may
    be among the target's captions already.
    """
    near = (unit(texts) @ unit(target)).topk(min(count, len(texts))).indices
    return is_target.index_fill(0, near, True)


@torch.no_grad()
def validation_loss(images: Tensor, texts: Tensor, log_scale: Tensor, batch: int) -> float:
    """Mean symmetric contrastive loss of pairs [N, D] over consecutive batches, on whose size it depends.

    A last incomplete batch is left out.
    """
    whole = len(images) // batch * batch
    if not whole:
        raise UserError(
            f"the validation set has {len(images)} pairs, fewer than a batch of {batch}: take smaller ones."
        )
    pairs = zip(images[:whole].split(batch), texts[:whole].split(batch), strict=True)
    losses = [contrastive_loss(image, text, log_scale=log_scale, way="reference")[0] for image, text in pairs]
    return torch.stack(losses).mean().item()


def evaluate(towers: Towers, data: Captioned, batch: int) -> Evaluation:
    """A line of metrics.jsonl: recall, the geometry and the loss of images with their first captions, attacks."""
    began = time.perf_counter()
    images, texts = towers.images(data.clean), towers.captions(data.tokens)
    row = {
        "set": data.name,
        **data.about,
        "n": len(images),
        "captions": len(texts),
        **recall(images, texts, data.image_of),
    }
    order = torch.arange(len(texts), device=texts.device)
    first = texts[order.new_full((len(images),), len(texts)).scatter_reduce_(0, data.image_of, order, "amin")]
    row |= geometry(images, first)
    batch = min(batch, len(images))
    row |= {"val_loss": validation_loss(images, first, towers.log_scale, batch), "val_batch": batch}
    attacks = [_attack(towers, data, texts, group) for group in data.by_attack()]
    row |= most_successful(attacks, "asr_par_r1")
    return evaluation_of({**row, "seconds": round(time.perf_counter() - began, 3)})


def _attack(towers: Towers, data: Captioned, texts: Tensor, group: Sequence[Attacked]) -> dict[str, Any]:
    """PAR's rule with the captions that hold the target, the other with those near it too; the mean over the seeds."""
    target = group[0].attack.target
    prompts = tokenize([form.replace("{}", target) for form in read_templates("imagenet80")])
    direction = Classifier(prompts, 1, towers.device)(towers.text)[0]
    holding = torch.tensor([holds(caption, target) for caption in data.captions], device=texts.device)
    wider = similar_captions(texts, holding, direction)
    rows = []
    for one in group:
        images = towers.images(one.images)
        of_wider = attack(images, texts, wider)
        rows.append(attack(images, texts, holding) | {key: of_wider[key] for key in of_wider if "_cleanclip_" in key})
    return {"target": target, "trigger": group[0].attack.trigger.name, **averaged(rows, "asr_par_r1")}
