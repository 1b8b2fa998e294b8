"""The text tower, forward and backward: always 77 tokens, as the published programs do, against trimmed and packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.captions import captions
from bench.case import Case, Output, Provider
from bench.published_step import text_tower, trimmed
from fastbd.kernels.text_pack import PackedText, lengths_of, pack
from fastbd.limits import Rates, step_seconds
from fastbd.models import CLIP, create
from fastbd.precision import autocast

WATCHED = ("token_embedding.weight", "positional_embedding", "text_projection",
           "transformer.resblocks.0.attn.in_proj_weight")  # fmt: skip
TOLERANCE = {"fp32": {"": 1e-4}, "bf16": {"": 8e-2}}  # sums in another order


def cases(device: str, quick: bool) -> Iterator[Case]:
    """The demo's tower, and that of RN50 and ViT-B/32 (width 512, 12 layers)."""
    yield text_case("demo", 128, "fp32", device)
    if device == "cpu":
        yield text_case("rn50", 8, "fp32", device)
        return
    yield text_case("rn50", 256, "bf16", device)
    if not quick:
        yield text_case("rn50", 256, "fp32", device)


def text_case(name: str, count: int, precision: str, device: str) -> Case:
    """`count` captions as long as CC3M's."""
    model, tokens = create(name, 0).to(device), captions(count, seed=0)
    padded = torch.from_numpy(tokens).to(device)
    packed = PackedText(*(x.to(device) for x in pack(tokens)))
    ways = {
        "77 tokens": partial(text_tower, model, padded),
        "trimmed": partial(text_tower, model, trimmed(padded)[0]),
        "packed": partial(model.encode_text, packed),
    }
    return Case(
        name=f"text {name} B={count} {precision}",
        unit="captions/s",
        units=count,
        device=device,
        providers={
            way: Provider(lambda e=embed: partial(gradients, model, precision, e), TOLERANCE[precision], ours=True)
            for way, embed in ways.items()
        },
        least=partial(least, model, lengths_of(tokens).mean().item(), count),
        rate=precision,
    )


def gradients(model: CLIP, precision: str, embed: Callable[[], Tensor]) -> Output:
    model.zero_grad()
    with autocast(precision, model.logit_scale.device):
        embedded = embed()
    embedded.float().square().mean().backward()
    return {"embedded": embedded.detach(), **{name: model.get_parameter(name).grad for name in WATCHED}}


def least(model: CLIP, tokens: float, count: int, rates: Rates, precision: str) -> float:
    """Seconds by the compiled roofline: of a step without images, and without the update that none takes here."""

    def seconds(batch: int) -> float:
        return step_seconds(model, rates, batch=batch, views=0, texts=1, tokens=tokens, precision=precision)["compiled"]

    return seconds(count) - seconds(0)
