"""The text tower, forward and backward: all 77 tokens, as published programs do, against trimmed captions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.case import Case, Output, Provider
from bench.pictures import demo_pictures
from fastbd.data.tokenizer import longest, tokenize
from fastbd.models import create

TOLERANCE = {"": 1e-5}  # another order of sums


def cases(device: str, quick: bool) -> Iterator[Case]:
    """128 captions of the demo set; in float32."""
    captions = 128
    model = create("demo", 0).to(device)
    padded = torch.from_numpy(tokenize(demo_pictures(captions)[1]).astype(np.int64)).to(device)
    trimmed = padded[:, : longest(padded.cpu().numpy())]

    def gradients(tokens: Tensor) -> Output:
        model.zero_grad()
        embedded = model.encode_text(tokens)
        embedded.square().mean().backward()
        return {"embedded": embedded.detach(), "tokens": model.token_embedding.weight.grad,
                "projection": model.text_projection.grad}  # fmt: skip

    with FlopCounterMode(display=False) as counter:
        gradients(trimmed)
    ways = {"77 tokens": padded, "trimmed": trimmed}
    yield Case(
        name="text_tower",
        unit="captions/s",
        units=captions,
        device=device,
        providers={name: Provider(lambda t=t: partial(gradients, t), TOLERANCE, ours=True) for name, t in ways.items()},
        flops=float(counter.get_total_flops()),
    )
