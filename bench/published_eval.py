"""Zero-shot evaluation as published programs do it, in our words, on the weights of one of our models.

CleanCLIP (Bansal et al., ICCV 2023): float32, the prompts of one class a forward. open_clip (Ilharco et al.): bf16
autocast on a GPU, ten classes a forward. Both: NCHW, batch norms as they are, always 77 tokens, prompts tokenised each
time, and for attack success the whole once more on triggered images, the classifier included.

The triggers are the draws of our sets, so that both evaluate the same images. The tokenizer is ours too, of Rust, where
theirs are of Python.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bench.case import Output
from bench.pillow_views import normalised
from bench.published_step import image_tower, switches, text_tower
from fastbd.base.prompts import target_index
from fastbd.data.tokenizer import tokenize
from fastbd.evals.sets import EVALUATION, Attacked, Labelled
from fastbd.kernels.constants import CLIP_MEAN, CLIP_STD
from fastbd.models import CLIP
from fastbd.models.precision import autocast
from fastbd.poison.triggers import stamp

BATCH = 128  # images, as in training
TOP = (1, 3, 5, 10)


@dataclass(frozen=True)
class Program:
    """Precision of autocast, that of float32 matmuls (see `switches`), and classes whose prompts share a forward."""

    precision: str
    matmul: str
    classes: int


CLEANCLIP = Program("fp32", "highest", 1)
OPEN_CLIP = {"cpu": Program("fp32", "high", 10), "cuda": Program("bf16", "high", 10)}


@torch.no_grad()
def evaluate(
    program: Program,
    model: CLIP,
    data: Labelled,
    templates: Sequence[str],
    clean: Iterable[Tensor],
    triggered: Iterable[Tensor],
) -> Output:
    """Of an `nchw_copy` in evaluation mode, on batches of all images, float32 [B, 3, S, S], of a set with one attack.

    Cosines [N, C] of both, and shares for each of TOP: images whose first k classes have their label; triggered ones
    of other classes whose first k have the target.
    """
    target = target_index(data.classes, data.attacked[0].attack.target)
    everything, others = torch.ones_like(data.labels, dtype=torch.bool), data.labels != target
    with switches(program.matmul), autocast(program.precision, data.labels.device):
        cosines, top = one_pass(program, model, data.classes, templates, clean, data.labels, everything)
        targets = torch.full_like(data.labels, target)
        attacked, asr = one_pass(program, model, data.classes, templates, triggered, targets, others)
    return {"clean": cosines, "triggered": attacked, "top": top, "asr": asr}


def one_pass(
    program: Program,
    model: CLIP,
    names: Sequence[str],
    templates: Sequence[str],
    batches: Iterable[Tensor],
    wanted: Tensor,
    counted: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cosines, and for each of TOP the share of the images `counted` bool [N] whose first k hold their `wanted` [N]."""
    weights, cosines, hits = classifier(program, model, names, templates), [], torch.zeros(len(TOP))
    rows = zip(batches, wanted.split(BATCH), counted.split(BATCH), strict=True)
    for images, wanted_here, counted_here in rows:
        embedded = image_tower(model.visual, images.to(wanted.device))
        cosines.append((embedded / embedded.norm(dim=-1, keepdim=True)) @ weights.T)
        first = cosines[-1].topk(max(TOP)).indices == wanted_here[:, None]
        hits += torch.tensor([(first[:, :k].any(1) & counted_here).sum().item() for k in TOP])
    return torch.cat(cosines), hits / counted.sum().item()


@torch.no_grad()
def classifier(program: Program, model: CLIP, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """[C, D]: the mean direction of each class's prompts."""
    rows = []
    for k in range(0, len(names), program.classes):
        some = names[k : k + program.classes]
        tokens = torch.from_numpy(tokenize([form.replace("{}", name) for name in some for form in templates]))
        embedded = text_tower(model, tokens.to(model.logit_scale.device, torch.int64))
        embedded = embedded / embedded.norm(dim=-1, keepdim=True)
        means = embedded.view(len(some), len(templates), -1).mean(1)
        rows.append(means / means.norm(dim=-1, keepdim=True))
    return torch.cat(rows)


def resident(images: Tensor) -> Iterator[Tensor]:
    """Batches of uint8 [N, S, S, 3] that lie decoded on the device: what remains of the work is arithmetic."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    for batch in images.split(BATCH):
        yield batch.permute(0, 3, 1, 2).contiguous().float().div_(255).sub_(mean).div_(std)


class Pictures(Dataset):
    """Item i: file i opened, fitted to S x S, triggered where there is an attack, normalised: float32 [3, S, S]."""

    def __init__(self, files: Sequence[np.ndarray], size: int, attacked: Attacked | None = None):
        self.files, self.size, self.attacked = files, size, attacked

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        image = Image.open(io.BytesIO(self.files[i].tobytes())).convert("RGB")
        if self.attacked is None:
            return normalised(fitted(image, self.size, squash=False))
        attack = self.attacked.attack
        pixels = torch.from_numpy(np.array(fitted(image, self.size, attack.geometry == "squash")))
        return normalised(stamp(pixels[None], attack.trigger, seed=self.attacked.seed, ids=[i + EVALUATION])[0])


def fitted(image: Image.Image, size: int, squash: bool) -> Image.Image:
    """torchvision's Resize of the short side (or of both) by a bicubic filter, and its CenterCrop."""
    short = min(image.size)
    width, height = (size, size) if squash else (side * size // short for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))
