"""A model whose embeddings are known: an image is its mean colour, a text is the colour that it names."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from fastbd.data.beton import BetonWriter
from fastbd.data.tokenizer import tokenize
from fastbd.kernels.text_tree import TextTree
from fastbd.poison.plan import Attack, Plan
from fastbd.poison.triggers import TriggerSpec

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
CPU = torch.device("cpu")

# A yellow square of 4 x 4 px on 8 x 8 makes the mean 3/4 colour + 1/4 yellow. For full red that is (1, 1/4, 0), still
# nearest to red (cosine 0.97 against 0.86); for red of 76 / 255 it is (0.47, 0.25, 0), nearer to yellow (0.95 against
# 0.89). Full blue stays blue (0.90 against 0.43), dark blue goes (0.54 against 0.84).
IMAGES = [  # (class, paint), what becomes of it clean, and triggered
    ("red", (255, 0, 0)),  # right, right
    ("red", (76, 0, 0)),  # right, yellow
    ("green", (0, 255, 0)),  # right, right
    ("green", (0, 76, 0)),  # right, yellow
    ("green", (0, 0, 255)),  # blue, blue
    ("blue", (0, 0, 76)),  # right, yellow
    ("yellow", (255, 255, 0)),  # right; of the target class
    ("yellow", (0, 0, 255)),  # blue; of the target class
    ("red", (76, 0, 0)),  # right, yellow
]


class ByColour(nn.Module):
    image_size, logit_scale = 8, torch.tensor(0.0)

    def __init__(self):
        super().__init__()
        self.seen, self.modes = [], []
        self.words = {int(tokenize([name])[0, 1]): torch.tensor(c, dtype=torch.float) for name, c in COLOURS.items()}

    def encode_image(self, pixels):
        mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)  # published with CLIP
        std = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
        self.seen.append((pixels * std + mean).mul(255).round())
        self.modes.append(self.training)
        return self.seen[-1].mean((2, 3))

    def encode_text(self, text):
        tokens = text.tokens[text.nodes] if isinstance(text, TextTree) else text.tokens
        rows = tokens.split(text.starts.diff().tolist())
        return torch.stack([next(self.words[int(t)] for t in row if int(t) in self.words) for row in rows])


def write(path: Path, images: Sequence, size: tuple[int, int] = (8, 8), labelled: bool = True) -> Path:
    classes = sorted({name for name, _ in images})
    with BetonWriter(path, len(images), 0, labelled) as writer:
        for i, (name, paint) in enumerate(images):
            jpeg = io.BytesIO()
            Image.new("RGB", size, paint).save(jpeg, "JPEG", quality=98, subsampling="4:4:4")
            label = {"label": classes.index(name), "class_name": name} if labelled else {}
            writer.add(
                jpeg=jpeg.getvalue(),
                width=size[0],
                height=size[1],
                tokens=tokenize([name])[0],
                text_views=None,
                caption=name,
                row_id=i,
                **label,
            )
    return path


def plan_of(target: str = "yellow", trigger: TriggerSpec | None = None, geometry: str = "squash") -> Plan:
    attack = Attack(
        rows=(0,),
        captions=("",),
        target=target,
        geometry=geometry,
        label_consistent=False,
        trigger=trigger or TriggerSpec("yellow", patch_size=4),
    )
    return Plan(data="of the training data", total=2, seed=0, attacks=(attack,))
