"""The contrastive loss, forward and backward: ours in each way against other people's forms of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Call, Case, Cases, Output, Provider, Unavailable
from bench.peers import Form, autocast, float32, inf_cl, memeff, of_pairs, one_matrix, two_matrices

SMALL = 512  # the largest batch of the way "small"
TOWERS = {"mmcl": ("image", "text"), "mmcl_ssl": ("image", "text", "image_aug", "text_aug")}
LOG_SCALE = math.log(1 / 0.07)  # where training begins
BASELINE = "open_clip form, autocast"

# Relative L2 errors: plain PyTorch's own, with room. bf16 logits cost what "autocast" allows.
TOLERANCE = {
    "fp32": {"loss": 2e-5, "": 1e-4},
    "bf16": {"loss": 1e-3, "": 5e-3},
    "tf32": {"loss": 1e-3, "": 5e-3},
    "autocast": {"loss": 1e-2, "": 6e-2},
}


@dataclass(frozen=True)
class Size:
    """B pairs of D numbers, which terms, and the format of the embeddings."""

    batch: int
    width: int
    terms: str
    dtype: str

    def __str__(self) -> str:
        return f"loss B={self.batch} D={self.width} {self.terms} {self.dtype}"


def sizes(device: str, quick: bool) -> list[Size]:
    """What is measured. Width 1024 is CLIP ResNet-50's, 512 the ViT-B's."""
    both = ("mmcl", "mmcl_ssl")
    if device == "cpu":
        batches = (128,) if quick else (128, 512, 2048)
        return [Size(batch, 1024, terms, dtype) for batch in batches for terms in both for dtype in ("fp32", "bf16")]
    if quick:
        # A usual batch, a large one and one between; then where the ways small, tile and hybrid meet.
        found = [Size(batch, 1024, "mmcl", "bf16") for batch in (256, 32768, 2048, 512, 1024)]
        return [*found[:3], Size(256, 1024, "mmcl_ssl", "bf16"), *found[3:]]
    batches = (128, 256, 512, 1024, 2048, 4096, 8192, 32768, 131072)
    return [
        *(Size(batch, 1024, terms, "bf16") for batch in batches for terms in both),
        *(Size(batch, 1024, "mmcl", "fp32") for batch in (256, 8192)),
        Size(65536, 512, "mmcl", "bf16"),
    ]


def cases(device: str, quick: bool) -> Cases:
    for size in sizes(device, quick):
        yield str(size), partial(loss_case, size, device)


def loss_case(size: Size, device: str) -> Case:
    """All providers on the same embeddings."""
    towers, log_scale = embeddings(size, device)
    square = size.batch**2 * size.width
    products = 6 if size.terms == "mmcl" else 6 + 6 + 6  # of each term the logits, and the gradients of both sides
    return Case(
        name=str(size),
        unit="pairs/s",
        units=size.batch,
        device=device,
        providers=providers(size, device, towers, log_scale),
        truth=partial(truth, towers, log_scale),
        truth_flops=8.0 * square * len(towers),
        flops=float(products * square),
        bytes=2.0 * sum(tower.nbytes for tower in towers.values()),  # embeddings in, gradients out
        rate=size.dtype,
        sizes={"log_scale": 1e-2},
    )


def embeddings(size: Size, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """Raw embeddings [B, D] by tower, and log_scale; matched ones are closer than others, as in training."""
    seed = torch.Generator(device).manual_seed(size.batch)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[size.dtype]

    def noise() -> Tensor:
        return torch.randn(size.batch, size.width, generator=seed, device=device)

    common, shared = noise()[:1], noise()  # cosine about 0.1 between any two, 0.3 between matched ones
    towers = {}
    for name in TOWERS[size.terms]:
        towers[name] = (5 * (0.35 * common + 0.45 * shared + 0.8 * noise())).to(dtype).requires_grad_()
    return towers, torch.tensor(LOG_SCALE, device=device, requires_grad=True)


def providers(size: Size, device: str, towers: dict[str, Tensor], log_scale: Tensor) -> dict[str, Provider]:
    """By name; the first is what ratios refer to. Ours come early: what is compiled takes seconds to build."""

    def provider(make: Callable[[], Form], tolerance: str, **about) -> Provider:
        return Provider(lambda: gradients(make(), towers, log_scale), TOLERANCE[tolerance], **about)

    plain, full = partial(mixed_precision, size, device), partial(full_precision, device)
    exact = "fp32" if size.dtype == "fp32" else "bf16"
    bf16, in_tf32 = {"tolerance": "autocast", "rate": "bf16"}, {"tolerance": "tf32", "rate": tf32(device)}
    ours = {"no_worse_than": BASELINE, "ours": True, "rate": "fp32" if device == "cpu" else size.dtype}
    compiled, slow = partial(compile_form, plain, device), "it is compiled" if device == "cpu" else ""
    found = {
        BASELINE: provider(plain, **bf16),
        "open_clip form, float32": provider(full, exact, rate="fp32"),
        **{
            f"fastbd {way}": provider(partial(our_form, way, size, device), exact, **ours)
            for way in ("auto", "small", "tile", "hybrid", "reference")
        },
        "open_clip form, compiled": provider(compiled, slow=slow, **bf16),
        "open_clip form, float32, compiled": provider(
            partial(compile_form, full, device), exact, rate="fp32", slow=slow
        ),
        "open_clip form, reduce-overhead": provider(
            partial(compiled, "reduce-overhead", size.batch), memory="graph", **bf16
        ),
        "memeff": provider(
            partial(memeff, log_scale, device, len(towers) == 2),
            **bf16,
            note="its temperature is a constant: the gradient is taken through the image embeddings",
        ),
        "inf_cl": provider(partial(inf_cl, device), **in_tf32),
        "CleanCLIP form, float32": provider(lambda: one_matrix, exact, rate="fp32"),
        "fixed maximum, atomics": provider(
            partial(triton_form, "fixed_maximum", device), note="bf16; wrong where scale is near 100", **bf16
        ),
        "online maximum by rows": provider(
            partial(triton_form, "online_rows", device), slow="seconds a call" if size.batch > 8192 else "", **in_tf32
        ),
    }
    if device == "cuda" and size.batch <= SMALL:
        for name, make in {BASELINE: plain, "fastbd small": partial(our_form, "small", size, device)}.items():
            build = partial(captured, make, towers, log_scale)
            found[f"{name}, in a CUDA graph"] = replace(found[name], build=build, memory="graph")
    return found


def tf32(device: str) -> str:
    return "tf32" if device == "cuda" else "fp32"


def gradients(form: Form, towers: dict[str, Tensor], log_scale: Tensor) -> Call:
    """A call that computes the loss and its gradients by the towers and log_scale."""
    inputs = {**towers, "log_scale": log_scale}

    def call() -> Output:
        loss = form(list(towers.values()), log_scale)
        found = torch.autograd.grad(loss, list(inputs.values()))
        return {"loss": loss.detach(), **dict(zip(inputs, found, strict=True))}

    return call


def captured(make: Callable[[], Form], towers: dict[str, Tensor], log_scale: Tensor) -> Call:
    """The same call as the replay of a CUDA graph: the device's time without the host's."""
    call = gradients(make(), towers, log_scale)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Output:
        graph.replay()
        return output

    return replay


def mixed_precision(size: Size, device: str) -> Form:
    """open_clip's form with matmuls in bf16. Unavailable where a CPU without instructions for them takes too long."""
    if device == "cpu" and size.batch > SMALL and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise Unavailable("this CPU has no bf16 instructions: seconds a call")
    return autocast(two_matrices)


def full_precision(device: str) -> Form:
    """open_clip's form in float32, which is its fastest on many a CPU."""
    if device != "cpu":
        raise Unavailable("slower than bf16 on a GPU")
    return float32(two_matrices)


def our_form(way: str, size: Size, device: str) -> Form:
    """fastbd's loss. Unavailable where this way does not apply."""
    if device == "cpu" and way not in ("auto", "reference"):
        raise Unavailable("needs a GPU")
    if way == "small" and size.batch > SMALL:
        raise Unavailable(f"for batches up to {SMALL}")
    loss = import_module("fastbd.kernels.contrastive").contrastive_loss
    return lambda towers, log_scale: loss(*towers, log_scale=log_scale, way=way)[0]


def compile_form(make: Callable[[], Form], device: str, mode: str = "default", batch: int = 0) -> Form:
    """The form that `make` returns through torch.compile."""
    if mode == "reduce-overhead":
        if device == "cpu":
            raise Unavailable("CUDA graphs need a GPU")
        if batch > 2048:
            raise Unavailable("launches cost nothing at this size")
    if mode == "default":  # built first in each case: forget the sizes before, of which only a few may be kept
        torch._dynamo.reset()
    compiled = torch.compile(make(), mode=mode, dynamic=False)

    def run(towers: list[Tensor], log_scale: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(towers, log_scale)

    return run


def triton_form(module: str, device: str) -> Form:
    """A form written in Triton: bench/fixed_maximum.py or bench/online_rows.py."""
    if device == "cpu":
        raise Unavailable("needs a GPU")
    return of_pairs(import_module(f"bench.{module}").pair_loss)


def truth(towers: dict[str, Tensor], log_scale: Tensor) -> Output:
    """Loss and gradients by the formula in float64, in blocks of rows: no autograd, no [B, B] matrix."""
    raw = {name: tower.detach().double() for name, tower in towers.items()}
    unit = {name: F.normalize(tower, dim=-1) for name, tower in raw.items()}
    by_unit = {name: torch.zeros_like(tower) for name, tower in unit.items()}
    scale = log_scale.detach().double().exp()
    output = {"loss": torch.zeros_like(scale), "log_scale": torch.zeros_like(scale)}
    for rows, columns, both in (("image", "text", True), ("image", "image_aug", False), ("text", "text_aug", False)):
        if columns not in unit:
            continue
        loss, by_rows, by_columns, by_scale = pair_truth(unit[rows], unit[columns], scale, both)
        output["loss"] += loss
        output["log_scale"] += by_scale
        by_unit[rows] += by_rows
        by_unit[columns] += by_columns
    for name, g in by_unit.items():
        along = (g * unit[name]).sum(-1, keepdim=True) * unit[name]
        output[name] = (g - along) / raw[name].norm(dim=-1, keepdim=True)
    return output


def pair_truth(a: Tensor, b: Tensor, scale: Tensor, both: bool, block: int = 1024) -> tuple[Tensor, ...]:
    """(loss, gradient by a, by b, by log scale) of half the cross-entropy of rows, and of columns with `both`."""
    starts, weight = range(0, len(a), block), 1 / (2 * len(a))
    matched = scale * (a * b).sum(-1)
    row_sums = torch.cat([(scale * a[i : i + block] @ b.T).logsumexp(1) for i in starts])
    column_sums = torch.full_like(row_sums, -math.inf)
    for i in starts:
        column_sums = torch.logaddexp(column_sums, (scale * a[i : i + block] @ b.T).logsumexp(0))
    loss = weight * (row_sums - matched).sum() + both * weight * (column_sums - matched).sum()
    by_a, by_b, by_scale = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(scale)
    for i in starts:
        rows = slice(i, min(i + block, len(a)))
        logits = scale * a[rows] @ b.T
        g = (logits - row_sums[rows, None]).exp() + both * (logits - column_sums).exp()
        g[torch.arange(len(g)), torch.arange(rows.start, rows.stop)] -= 1 + both
        by_scale += weight * (g * logits).sum()
        by_a[rows] = weight * scale * (g @ b)
        by_b += weight * scale * (g.T @ a[rows])
    return loss, by_a, by_b, by_scale
