"""fastbd label"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from fastbd.base import dist
from fastbd.base.console import console
from fastbd.base.errors import UserError
from fastbd.base.files import check_out, replacing
from fastbd.base.prompts import read_classes, read_templates
from fastbd.commands.demo_data import located
from fastbd.commands.evaluate import open_model
from fastbd.config.flags import LabelConfig
from fastbd.data.decode import open_decoder
from fastbd.data.pairs import Pairs
from fastbd.data.shards import open_beton
from fastbd.data.tokenizer import tokenize
from fastbd.evals.classifier import Classifier
from fastbd.evals.embedding import embed_images
from fastbd.evals.towers import Towers
from fastbd.models.precision import set_precision

CHUNK = 8192  # images compared with all classes at once


def run(config: LabelConfig) -> int:
    """Classify all images of a data file zero-shot, and write the classes for clean --cluster-labels."""
    if config.out.suffix != ".npy" or config.out.exists():
        raise UserError(f"--out {config.out} must be a new file whose name ends in .npy.")
    check_out(config.out, name="labels.npy")
    device = dist.join(config.device).device
    precision = set_precision(config.precision, device)
    state, model = open_model(config.run, config.checkpoint, device)
    beton = open_beton(located(config).data or Path(state["about"]["data"]))
    names = read_classes(config.classes)
    forms = read_templates(config.templates, names)
    prompts = tokenize([form.replace("{}", name) for name in names for form in forms])
    towers = Towers(model, precision=precision, device=device)
    classifier = Classifier(prompts, len(names), device)(towers.text)
    pairs = Pairs(beton, open_decoder("auto", 0, str(device)), model.image_size)
    images = embed_images(towers, pairs, np.arange(len(beton)))
    labels = torch.cat([(normalize(part, dim=-1) @ classifier.T).argmax(1) for part in images.split(CHUNK)])
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(config.out) as temporary, open(temporary, "wb") as file:  # np.save would add .npy to a name
        np.save(file, labels.cpu().numpy())
    found = len(labels.unique())
    console.print(
        f"{config.out}: {len(labels):,} images of {beton.path}, {found:,} of {len(names):,} classes", markup=False
    )
    return 0
