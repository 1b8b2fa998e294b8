"""The training step on data that lies ready: ours against CleanCLIP's and open_clip's, on the same weights and batch.

Pixels are random and normalised, as none is decoded here; captions are as long as CC3M's.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench.captions import captions, lengths
from bench.case import Call, Case, Cases, Output, Provider, Unavailable
from bench.measure import MOST
from bench.published_step import Hyper, open_clip, outputs, published, trimmed
from bench.published_step import Step as Peer
from fastbd.base.dist import World
from fastbd.data.loader import Batch
from fastbd.kernels.text_pack import PackedText, lengths_of, pack, room_for
from fastbd.methods.method import Method
from fastbd.methods.objectives import Objective
from fastbd.models import CLIP, create
from fastbd.models.clip import MODELS
from fastbd.models.memory_format import channels_last
from fastbd.models.precision import has_compiler, set_precision
from fastbd.training.capture import WARM
from fastbd.training.optim import make_optimizer
from fastbd.training.roofline import Rates, step_seconds
from fastbd.training.step import Step

Build = Callable[[], Call]

HYPER = Hyper()
CALLS = 100 * MOST  # of a step, at most: the first provider is timed with each of the others
OBJECTIVES = {"mmcl": Objective(), "mmcl_ssl": Objective(ssl_weight=1.0)}
# Relative L2 errors. Rounding moves numbers across the kink of a ReLU, behind a batch norm even that of float32: one
# such number moves the gradient of a ResNet's first convolution by 1e-3, and bf16 leaves little of it.
TOLERANCE = {"fp32": {"": 1e-4}, "bf16": {"loss": 1e-2, "": 8e-2}}
FIRST_CONVOLUTION = {"fp32": 2e-2, "bf16": 4e-1}


@dataclass(frozen=True)
class Size:
    """B pairs; with SSL two views of each."""

    model: str
    batch: int
    objective: str
    precision: str

    @property
    def views(self) -> int:
        return 1 + OBJECTIVES[self.objective].augments_images

    @property
    def tolerance(self) -> dict[str, float]:
        if MODELS[self.model].patch is not None:
            return TOLERANCE[self.precision]
        return TOLERANCE[self.precision] | {"visual.conv1.weight": FIRST_CONVOLUTION[self.precision]}

    def __str__(self) -> str:
        return f"step {self.model} B={self.batch} {self.objective} {self.precision}"


@dataclass(frozen=True)
class Data:
    """A batch as published programs get it: float32 [B, 3, S, S] in NCHW memory and int64 [B, 77], one of each view."""

    images: list[Tensor]
    tokens: list[np.ndarray]


def sizes(device: str, quick: bool) -> list[Size]:
    if device == "cpu":
        return [Size("demo", 64, objective, "fp32") for objective in OBJECTIVES]
    found = [Size("rn50", 256, "mmcl", "bf16"), Size("rn50", 128, "mmcl_ssl", "bf16")]
    return found if quick else [*found, Size("rn50", 128, "mmcl", "bf16"), Size("vit-b-32", 256, "mmcl", "bf16")]


def cases(device: str, quick: bool) -> Cases:
    for size in sizes(device, quick):
        yield str(size), partial(step_case, size, device)


def step_case(size: Size, device: str) -> Case:
    """All providers on the same weights and batch; each trains a copy of its own."""
    torch._dynamo.reset()  # what the case before has left: other sizes would be compiled for any size
    model = create(size.model, 0).to(device)
    data = made(size, model.image_size, device)
    texts = np.concatenate(data.tokens)
    return Case(
        name=str(size),
        unit="pairs/s",
        units=size.batch,
        device=device,
        providers=providers(size, device, model, data),
        least=partial(least, model, size, lengths_of(texts).mean().item()),
        rate=size.precision,
        sizes={"logit_scale": 1e-2},
    )


def made(size: Size, side: int, device: str) -> Data:
    noise = torch.Generator(device).manual_seed(0)
    images = [torch.randn(size.batch, 3, side, side, generator=noise, device=device) for _ in range(size.views)]
    return Data(images, [captions(size.batch, seed) for seed in range(size.views)])


def least(model: CLIP, size: Size, tokens: float, rates: Rates, precision: str) -> float:
    """Seconds by the roofline, without padding."""
    about = {"batch": size.batch, "views": size.views, "texts": size.views, "tokens": tokens, "precision": precision}
    return step_seconds(model, rates, **about)


def providers(size: Size, device: str, model: CLIP, data: Data) -> dict[str, Provider]:
    """By name; the first is what ratios refer to. Those that reset the compiler come behind those that do not."""

    def provider(build: Build, **about) -> Provider:
        return Provider(build, size.tolerance, **about)

    def ours(slow: str = "", combo: bool = False, **how: bool) -> Provider:
        """`how` is what Step is told, by name; with `combo` Inductor may join kernels."""
        build = partial(our_step, size, model, data, **how)
        memory = "graph" if how.get("captured") else "call"
        return provider(partial(with_combo_kernels, build) if combo else build, ours=True, memory=memory, slow=slow)

    peer = partial(peer_step, model, data)
    if device == "cpu":
        return {
            "CleanCLIP": provider(partial(peer, published)),
            "fastbd": ours(),
            "fastbd, compiled": ours("it is compiled", compiled=True),
        }
    whole = partial(open_clip, backend="inductor")
    minutes = "it takes minutes to compile"
    return {
        "CleanCLIP": provider(partial(peer, published), rate="tf32"),  # its convolutions
        "open_clip": provider(partial(peer, open_clip)),
        "fastbd": ours(),
        "fastbd, compiled": ours(compiled=True),
        "fastbd, compiled, captured": ours(compiled=True, captured=True),
        "open_clip, step compiled": provider(partial(peer, whole, cut=True), slow=minutes),
        "fastbd, compiled, captured, fused": ours(minutes, compiled=True, captured=True, fused=True),
        "fastbd, compiled, captured, combo kernels": ours(minutes, combo=True, compiled=True, captured=True),
    }


def with_combo_kernels(build: Build) -> Call:
    """The call that `build` makes, which is to compile all of it, with Inductor's joined kernels."""
    from torch._inductor import config

    torch._dynamo.reset()  # what is compiled already would be used again, as it is
    with config.patch(combo_kernels=True):
        return build()


def peer_step(model: CLIP, data: Data, make: Callable[[CLIP, Hyper], Peer], cut: bool = False) -> Call:
    """A step of bench/published_step.py; `cut` trims the captions."""
    step = make(model, HYPER)
    texts = [torch.from_numpy(tokens).to(data.images[0].device) for tokens in data.tokens]
    return partial(step, data.images, *(trimmed(*texts) if cut else texts))


def our_step(size: Size, model: CLIP, data: Data, compiled: bool = False, captured: bool = False, **how: bool) -> Call:
    """A step as the trainer makes it. When it is first called it has been captured, its weights still as given."""
    device = data.images[0].device
    if compiled and device.type == "cpu" and not has_compiler():
        raise Unavailable("needs a C++ compiler")
    set_precision(size.precision, device)
    clip = channels_last(deepcopy(model)).train()
    warm = WARM + 1 if captured else 0
    rates = torch.full((CALLS,), HYPER.lr)
    rates[:warm] = 0
    step = Step(
        clip,
        Method(OBJECTIVES[size.objective]),
        make_optimizer(clip, **asdict(HYPER)),
        rates,
        precision=size.precision,
        world=World(0, 1, device),
        compiled=compiled,
        captured=captured,
        **how,
    )
    batch = our_batch(size, data, fixed=compiled or captured)

    def call() -> Output:
        return outputs(clip, step(batch)["loss"])

    for _ in range(warm):
        call()
    return call


def our_batch(size: Size, data: Data, fixed: bool) -> Batch:
    """As the loader makes it; with `fixed`, captions in a room for any batch of this size."""
    device = data.images[0].device
    dtype = torch.bfloat16 if size.precision == "bf16" and device.type == "cuda" else torch.float32
    texts = np.concatenate(data.tokens)
    packed = pack(texts, room_for(lengths(), len(texts)) if fixed else 1)
    return Batch(
        ids=torch.arange(size.batch, device=device),
        views=tuple(image.to(dtype, memory_format=torch.channels_last) for image in data.images),
        texts=(PackedText(*(x.to(device) for x in packed)),),
    )
