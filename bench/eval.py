"""Evaluation: the zero-shot classifier by itself, then whole, of clean and of triggered images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from bench import published_eval
from bench.case import Call, Case, Cases, Output, Provider
from bench.data import write
from bench.pictures import demo_pictures, repeated
from bench.published import loader
from bench.published_eval import CLEANCLIP, OPEN_CLIP, TOP, Pictures, Program, resident
from bench.published_step import nchw_copy, switches, text_tower
from fastbd.base.prompts import read_classes, read_templates
from fastbd.data.decode import Decoder, open_decoder
from fastbd.data.demo import SHAPES
from fastbd.data.tokenizer import tokenize
from fastbd.evals.classifier import Classifier
from fastbd.evals.metrics import mean_by_class
from fastbd.evals.sets import Attacked, Labelled, open_set
from fastbd.evals.towers import Towers
from fastbd.evals.zeroshot import ZeroShot
from fastbd.kernels.text_pack import PackedText, pack
from fastbd.kernels.text_tree import tree
from fastbd.models import CLIP, create
from fastbd.models.batchnorm import batch_norms
from fastbd.models.memory_format import channels_last
from fastbd.models.precision import autocast, set_precision
from fastbd.poison.plan import Attack, Plan
from fastbd.poison.triggers import TriggerSpec

PROMPTS = 512  # of a batch
TEMPLATES = "imagenet80"
IMAGES = {True: 200, False: 1_000}  # of an evaluation on a CPU, by --quick
CLASSIFIER = {"fp32": {"": 1e-5}, "bf16": {"": 2e-2}}  # sums in another order; float32 against bf16
# Cosines, and shares of images, which are compared as they are: of 1,000 images one or two may be decided otherwise.
TOLERANCE = {"fp32": {"": 1e-5, "top": 2e-3, "asr": 2e-3}, "bf16": {"": 8e-2}}
PILLOW = {"": 5e-2}  # its resize is some levels off ours
GPU_DECODE = {"": 0.2}  # another inverse DCT and chroma upsampling
SHARES = {"top": 1.0, "asr": 1.0}


def cases(device: str, quick: bool) -> Cases:
    """The demo's model and a tiny one, and on a GPU RN50: with as many images as the protocol has, with photographs."""
    forms = len(read_templates(TEMPLATES))
    if device == "cuda":
        whole = 50_000, every_other(1), not quick  # of which there is only time for ours
        for count, names, peers in [(10_000, every_other(10), True), whole] if quick else [whole]:
            name = f"protocol rn50 {count} + {count} images, {len(names)} x {forms} bf16"
            yield name, partial(protocol_case, name, "rn50", count, names, "bf16", device, peers)
    for model, classes, precision in (("demo", 20, "fp32"), ("rn50", 20 if quick else 1000, "bf16")):
        if device == "cuda" or model == "demo":
            name = f"classifier {model} {classes} x {forms} {precision}"
            yield name, partial(classifier_case, name, model, classes, precision, device)
    with TemporaryDirectory() as folder:
        whole = partial(evaluation_case, device=device, folder=Path(folder))
        if device == "cuda":
            count, names = (2_000, every_other(20)) if quick else (10_000, every_other(1))
            name = f"evaluation rn50 {count} images, {len(names)} x {forms} bf16"
            yield name, partial(whole, name, "rn50", partial(repeated, count), names, "bf16")
        else:
            count, names = IMAGES[quick], list(SHAPES)
            for model in ("demo", "tiny-rn"):  # whose image tower is nearly all the work, and hardly any
                name = f"evaluation {model} {count} images, {len(names)} x {forms} fp32"
                yield name, partial(whole, name, model, lambda: demo_pictures(count)[0], names, "fp32")


def every_other(step: int) -> list[str]:
    """Each so many-th of ImageNet's classes, the banana among them."""
    names = read_classes("imagenet1k")
    return names[names.index("banana") % step :: step]


# ---- the classifier ----


def classifier_case(name: str, model_name: str, classes: int, precision: str, device: str) -> Case:
    """So many of ImageNet's classes, with its 80 templates."""
    model = create(model_name, 0).to(device).eval()
    names, forms = read_classes("imagenet1k")[:classes], read_templates(TEMPLATES)
    prompts = tokenize([form.replace("{}", noun) for noun in names for form in forms])
    padded = torch.from_numpy(prompts).to(device, torch.int64).split(PROMPTS)
    starts = range(0, len(prompts), PROMPTS)
    packed = [PackedText(*(x.to(device) for x in pack(prompts[k : k + PROMPTS]))) for k in starts]
    classifier = Classifier(prompts, classes, torch.device(device))

    def embedded(tower: Callable, batches: Sequence) -> Tensor:
        return mean_by_class(torch.cat([tower(batch) for batch in batches]), classes)

    def published() -> Tensor:
        with switches(CLEANCLIP.matmul):
            return published_eval.classifier(CLEANCLIP, model, names, forms)

    def provider(build: Callable[[], Tensor], **about) -> Provider:
        return Provider(lambda: lambda: computed(build, precision, device), CLASSIFIER[precision], ours=True, **about)

    return Case(
        name=name,
        unit="prompts/s",
        units=len(prompts),
        device=device,
        providers={
            "77 tokens": provider(lambda: embedded(lambda tokens: text_tower(model, tokens), padded)),
            "published": Provider(
                lambda: lambda: computed(published, "fp32", device),
                CLASSIFIER[precision],
                rate="fp32",
                note="tokenises with our tokenizer, of Rust; theirs is of Python",
            ),
            "packed": provider(lambda: embedded(model.encode_text, packed)),
            "tree": provider(lambda: classifier(model.encode_text)),
        },
        flops=flops(model, len(tree(prompts).tokens), len(prompts)),
        rate=precision,
    )


@torch.no_grad()
def computed(build: Callable[[], Tensor], precision: str, device: str) -> Output:
    with autocast(precision, torch.device(device)):
        return {"classifier": build()}


def flops(model: CLIP, nodes: int, prompts: int) -> float:
    """Of the linear layers, on each distinct beginning of a prompt once."""
    matrices = sum(p.numel() for p in model.transformer.parameters() if p.ndim == 2)
    return 2.0 * (nodes * matrices + prompts * model.text_projection.numel())


# ---- the whole evaluation ----


def evaluation_case(
    name: str,
    model_name: str,
    make: Callable[[], Sequence[np.ndarray]],
    names: Sequence[str],
    precision: str,
    device: str,
    folder: Path,
) -> Case:
    """Evaluates the JPEG files that `make` gives, whose classes take turns; each evaluation builds its classifier."""
    path, classes, place = folder / "images.beton", folder / "classes.txt", torch.device(device)
    files = make()
    write(path, files, len(names))
    classes.write_text("".join(f"{i} = {noun}\n" for i, noun in enumerate(names)))
    model = channels_last(create(model_name, 0), place)
    attack = attack_of(model)

    def opened(decoder: Decoder) -> Labelled:
        plan = Plan(data="", total=1, seed=0, attacks=(attack,))
        size, names = model.image_size, str(classes)
        data = open_set(path, decoder, size, classes=names, templates=TEMPLATES, plan=plan, device=place)
        assert isinstance(data, Labelled)  # as its images have classes
        return data

    data = opened(open_decoder("pil", 0, device))
    settle(model, data.clean)

    def published() -> Call:
        sets = (Pictures(files, model.image_size, one) for one in (None, *data.attacked))
        batches = (partial(iter, loader(pictures, published_eval.BATCH, os.cpu_count() or 1)) for pictures in sets)
        return theirs(CLEANCLIP, model, data, *batches)

    def decoded() -> Call:
        set_precision(precision, place)
        decoder = open_decoder("auto", 0, device)
        return lambda: evaluated(Watched(Towers(model, precision=precision, device=place), opened(decoder)))

    tolerance = TOLERANCE[precision]
    providers = {
        "published": Provider(published, PILLOW),
        "published, arithmetic": Provider(partial(arithmetic, CLEANCLIP, model, data), tolerance),
        "open_clip, arithmetic": Provider(partial(arithmetic, OPEN_CLIP[device], model, data), tolerance),
        "fastbd, decoded each time": Provider(decoded, GPU_DECODE if device == "cuda" else tolerance, ours=True),
        "fastbd": Provider(partial(ours, model, data, precision), tolerance, ours=True),
    }
    if device == "cuda":
        providers |= compiled(model, data, precision)
    return Case(
        name=name,
        unit="images/s",
        units=2 * len(files),
        device=device,
        providers=providers,
        sizes=SHARES,
        truth=arithmetic(CLEANCLIP, model, data),
    )


def protocol_case(
    name: str, model_name: str, count: int, names: Sequence[str], precision: str, device: str, peers: bool
) -> Case:
    """On random images that lie on the device; the seconds are those of one evaluation of the protocol.

    Ours that is not compiled comes first: it takes the least time to be there. Without `peers` only the compiled one.
    """
    place, forms = torch.device(device), read_templates(TEMPLATES)
    noise = torch.Generator(place).manual_seed(0)
    model = channels_last(create(model_name, 0), place)
    shape = count, model.image_size, model.image_size, 3
    clean, triggered = (torch.randint(256, shape, dtype=torch.uint8, device=place, generator=noise) for _ in range(2))
    data = Labelled(
        name="random",
        about={},
        ids=np.arange(count),
        population=count,
        clean=clean,
        classes=list(names),
        attacked=(Attacked(attack_of(model), 0, triggered),),
        labels=torch.arange(count, device=place) % len(names),
        prompts=tokenize([form.replace("{}", noun) for noun in names for form in forms]),
    )
    settle(model, clean)
    tolerance = TOLERANCE[precision]
    others = {
        "fastbd": Provider(partial(ours, model, data, precision), tolerance, ours=True),
        "open_clip, arithmetic": Provider(partial(arithmetic, OPEN_CLIP[device], model, data), tolerance),
    }
    return Case(
        name=name,
        unit="images/s",
        units=2 * count,
        device=device,
        sizes=SHARES,
        providers=(others if peers else {}) | compiled(model, data, precision),
    )


def attack_of(model: CLIP) -> Attack:
    """CleanCLIP's patch, which is for 224 px, on images squashed to the model's input."""
    return Attack(
        target="banana",
        trigger=TriggerSpec("badnet", patch_size=model.image_size // 14),
        geometry="squash",
        label_consistent=False,
        rows=(0,),
        captions=("",),
    )


@torch.no_grad()
def settle(model: CLIP, images: Tensor) -> None:
    """Batch norms as if trained: with the statistics of some of the images, and no branch silent, as it begins.

    Nor loud: at weights of 1 a random RN50 multiplies rounding, and no two programs agree in bf16.
    """
    for norm in batch_norms(model.train()):
        norm.weight.masked_fill_(norm.weight == 0, 0.2)
        norm.momentum = 1.0
    model.encode_image(next(resident(images)))
    model.eval()


def theirs(
    program: Program, model: CLIP, data: Labelled, clean: Callable[[], Iterator], triggered: Callable[[], Iterator]
) -> Call:
    """The published evaluation; the last two begin an epoch of batches."""
    clip, forms = nchw_copy(model).eval(), read_templates(TEMPLATES)
    return lambda: published_eval.evaluate(program, clip, data, forms, clean(), triggered())


def arithmetic(program: Program, model: CLIP, data: Labelled) -> Call:
    """The published evaluation, nothing to be decoded."""
    return theirs(program, model, data, partial(resident, data.clean), partial(resident, data.attacked[0].images))


def compiled(model: CLIP, data: Labelled, precision: str) -> dict[str, Provider]:
    """The engine as it is where training is compiled."""
    return {"fastbd, compiled": Provider(partial(ours, model, data, precision, True), TOLERANCE[precision], ours=True)}


def ours(model: CLIP, data: Labelled, precision: str, compiled: bool = False) -> Call:
    """The engine, in each call on weights that are new to it."""
    place = data.labels.device
    set_precision(precision, place)
    zeroshot = Watched(Towers(model, precision=precision, device=place, compiled=compiled), data)

    def call() -> Output:
        zeroshot.towers.refresh()
        zeroshot.towers.text_version += 1  # they are not, and the classifier would be kept
        return evaluated(zeroshot)

    return call


class Watched(ZeroShot):
    """Keeps the cosines that it ranks."""

    seen: list[Tensor]

    def cosines(self, images: Tensor) -> Tensor:
        self.seen.append(super().cosines(images))
        return self.seen[-1]


def evaluated(zeroshot: Watched) -> Output:
    """As published_eval.evaluate gives it."""
    zeroshot.seen = []
    row = zeroshot()
    clean, triggered = zeroshot.seen
    top, asr = (
        torch.tensor([row[one], *(row[f"{more}{k}"] for k in TOP[1:])])
        for one, more in (("top1", "top"), ("asr", "asr_top"))
    )
    return {"clean": clean, "triggered": triggered, "top": top, "asr": asr}
