"""JPEG files to training tensors, an epoch of them: the published loader, FFCV's, and ours with each decoder and from
memory. With one view (contrastive training) and with two (self-supervised)."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench import published
from bench.case import Call, Case, Cases, Output, Provider, Unavailable
from bench.pictures import repeated
from fastbd.base import dist
from fastbd.base.errors import UserError
from fastbd.data import resident, sampler
from fastbd.data.beton import Beton, BetonWriter
from fastbd.data.decode import open_decoder
from fastbd.data.loader import RECIPES, Batch, batches, draw_views
from fastbd.data.pairs import Pairs
from fastbd.data.tokenizer import CONTEXT

SIZE, BATCH = 224, 64
IMAGES = {"cpu": {True: 256, False: 512}, "cuda": {True: 1024, False: 4096}}  # of an epoch, by --quick
TOLERANCE = {"": 0.02}  # a level is 1.5 % of a standard deviation
GPU_DECODE = {"": 0.2}  # another inverse DCT and chroma upsampling: some levels, and Equalize makes more of them
HW_LOADS = {True: (0.0, 0.65, 1.0), False: (0.0, 0.5, 0.65, 0.9, 1.0)}  # by --quick
Stored = tuple[Path, list[np.ndarray]]  # a .beton and the JPEG files in it
DAMAGES: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    lambda file: file[: len(file) // 4],
    lambda file: file[: len(file) // 2],
    lambda file: file[: len(file) - len(file) // 100],
    lambda file: file[:-2],  # its end marker
    lambda file: np.concatenate([file[: len(file) // 2], np.zeros(len(file) - len(file) // 2, np.uint8)]),
    lambda file: np.concatenate([file[: len(file) // 2], np.zeros(20, np.uint8), file[len(file) // 2 + 20 :]]),
)


def cases(device: str, quick: bool) -> Cases:
    """Photographs of 256 x 341 px to views of 224 px: float32 on a CPU, bf16 on a GPU. Some of them are damaged."""
    count = IMAGES[device][quick]
    with TemporaryDirectory() as folder:
        stored = cache(partial(written, Path(folder, "photographs.beton"), count))
        broken = partial(written, Path(folder, "damaged.beton"), 2 * BATCH, damaged=True)
        whole = partial(epoch_case, stored=stored, device=device, hw_loads=HW_LOADS[quick])
        name = f"data one view, {count} images"
        yield name, partial(whole, name, ("plain",))
        name = f"data damaged, {2 * BATCH} images"
        yield name, partial(damaged_case, name, broken, device, HW_LOADS[quick])
        name = f"data two views, {count} images"
        yield name, partial(whole, name, RECIPES["cleanclip"])


def written(path: Path, count: int, damaged: bool = False) -> Stored:
    """A .beton of photographs; with `damaged` every twelfth is."""
    files = repeated(count)
    sizes = [Image.open(io.BytesIO(file.tobytes())).size for file in files]
    if damaged:
        for place, i in enumerate(range(0, count, 12)):
            files[i] = DAMAGES[place % len(DAMAGES)](files[i])
    write(path, files, sizes=sizes)
    return path, files


def write(
    path: Path, files: Sequence[np.ndarray], classes: int = 0, sizes: Sequence[tuple[int, int]] | None = None
) -> None:
    """A .beton of JPEG files; with `classes` they take turns, and are named by their numbers.

    `sizes` are their widths and heights where the files do not tell.
    """
    tokens = np.zeros(CONTEXT, np.uint16)
    sizes = sizes or [Image.open(io.BytesIO(file.tobytes())).size for file in files]
    with BetonWriter(path, len(files), 0, labelled=classes > 0) as writer:
        for i, (file, (width, height)) in enumerate(zip(files, sizes, strict=True)):
            about = {"label": i % classes, "class_name": str(i % classes)} if classes else {}
            # A caption, as FFCV mistakes an empty value for the image that follows it.
            writer.add(
                jpeg=file.tobytes(),
                width=width,
                height=height,
                tokens=tokens,
                text_views=None,
                caption="-",
                row_id=i,
                **about,
            )


def an_epoch(pairs: Pairs, recipe: Sequence[str], device: str) -> Iterator[Batch]:
    """Batches as the trainer takes them."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return batches(
        pairs,
        np.arange(len(pairs.beton)),
        BATCH,
        seed=0,
        policies=recipe,
        text_view=None,
        world=one_process(device),
        epoch=1,
        start=0,
        dtype=dtype,
    )


def one_process(device: str) -> dist.World:
    return dist.World(0, 1, torch.device(device))


def opened(path: Path, decode: str, load: float, device: str, max_bad: int = 0) -> Pairs:
    """Unavailable for a decoder that is not installed."""
    try:
        return Pairs(Beton(path), open_decoder(decode, 0, device, load), SIZE, max_bad=max_bad)
    except UserError as error:
        raise Unavailable(str(error)) from None


def decoders(device: str, hw_loads: Sequence[float]) -> dict[str, tuple[str, float, dict[str, float]]]:
    """By a provider's name: --decode, --hw-decoder-load, and how far from Pillow's its pixels may be."""
    if device == "cpu":
        dali = {"fastbd, dali": ("dali", 0.0, TOLERANCE)}
    else:
        dali = {f"fastbd, dali, hw_decoder_load {load:g}": ("dali", load, GPU_DECODE) for load in hw_loads}
        dali["fastbd, dali-cpu"] = "dali-cpu", 0.0, TOLERANCE
    return dali | {"fastbd, pil": ("pil", 0.0, TOLERANCE), "fastbd, ffcv": ("ffcv", 0.0, GPU_DECODE)}


def epoch_case(
    name: str, recipe: tuple[str, ...], stored: Callable[[], Stored], device: str, hw_loads: Sequence[float]
) -> Case:
    """An epoch in batches; what is compared are the views of its first batch, with those that Pillow makes.

    On a GPU ours comes first: the published loader is too slow to be timed with each of the others.
    """
    (path, files), place = stored(), torch.device(device)
    beton, dtype = Beton(path), torch.bfloat16 if device == "cuda" else torch.float32
    order = np.concatenate([*sampler.batches(len(files), BATCH, seed=0, epoch=1)])
    sizes = np.stack([beton.height[order], beton.width[order]], -1)
    drawn = draw_views(recipe, SIZE, order, sizes, seed=0, epoch=1)
    published_views = published.Views([files[i] for i in order], drawn, SIZE)

    def ours(decode: str, load: float = 0.0, where: str = "none") -> Call:
        pairs = opened(path, decode, load, device)
        base, rows = recipe == ("plain",), np.arange(len(files))
        beside = not base and "plain" in recipe
        resident.keep(pairs, rows, where, base=base, beside=beside, world=one_process(device), quiet=True)

        def call() -> Output:
            views = first_of(batch.views for batch in an_epoch(pairs, recipe, device))
            if pairs.decoder.left_to_pillow:
                raise RuntimeError("DALI left images to Pillow: this would not be its time")
            return views

        return call

    def as_published() -> Call:
        loader = published.loader(published_views, BATCH, os.cpu_count() or 1)
        return lambda: first_of([view.to(place, dtype) for view in views] for views in loader)

    def truth() -> Output:
        first = zip(*(published_views[i] for i in range(BATCH)), strict=True)
        return {f"view {i}": torch.stack(views).to(place, dtype) for i, views in enumerate(first)}

    theirs = {"Pillow, float32, DataLoader": Provider(as_published, TOLERANCE)}
    if len(recipe) == 1:
        note = "its own simple pipeline: a random crop, uint8, not normalised; so its pixels are not compared"
        theirs["FFCV, random crop"] = Provider(partial(ffcv_epoch, path, place), {"": float("inf")}, note=note)
    own = {
        way: Provider(partial(ours, decode, load), tolerance, ours=True, memory="")
        for way, (decode, load, tolerance) in decoders(device, hw_loads).items()
    }
    for where in ("gpu", "ram") if device == "cuda" else ("ram",):
        note = "decoded before; an epoch decodes nothing"
        build = partial(ours, "pil", where=where)
        own[f"fastbd, --resident {where}"] = Provider(build, TOLERANCE, ours=True, memory="", note=note)
    return Case(
        name=name,
        unit="images/s",
        units=len(order),
        device=device,
        truth=truth,
        providers=own | theirs if device == "cuda" else theirs | own,
    )


def damaged_case(name: str, stored: Callable[[], Stored], device: str, hw_loads: Sequence[float]) -> Case:
    """An epoch of files some of which are damaged: every decoder must find those bad that Pillow does, and no other
    image may suffer. What is compared are all base views, a bad image's substitute among them."""
    path, files = stored()

    def ours(decode: str, load: float) -> Call:
        pairs = opened(path, decode, load, device, max_bad=len(files))

        def call() -> Output:
            views = torch.cat([batch.views[0] for batch in an_epoch(pairs, ("plain",), device)])
            return {"bad": torch.tensor([i in pairs.bad for i in range(len(files))]).to(device), "views": views}

        return call

    ways = decoders(device, hw_loads)
    providers = {
        way: Provider(partial(ours, decode, load), tolerance | {"bad": 0.0}, ours=True, memory="")
        for way, (decode, load, tolerance) in {"fastbd, pil": ways["fastbd, pil"], **ways}.items()
    }
    return Case(name=name, unit="images/s", units=len(files), device=device, providers=providers)


def first_of(views_of_batches: Iterable[Sequence[Tensor]]) -> Output:
    """Go through an epoch, and return the views of its first batch."""
    epoch = iter(views_of_batches)
    first = {f"view {i}": view for i, view in enumerate(next(epoch))}
    for _ in epoch:
        pass
    return first


def ffcv_epoch(path: Path, place: torch.device) -> Call:
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor, ToTorchImage

    threads = torch.get_num_threads()
    steps = [RandomResizedCropRGBImageDecoder((SIZE, SIZE), (0.5, 1)), ToTensor(), ToTorchImage()]
    # FFCV's hints do not know None, which leaves a field out.
    pipelines: dict[str, Any] = {"image": steps, **dict.fromkeys(("tokens", "caption", "row_id", "checksum"))}
    loader = Loader(
        str(path),
        BATCH,
        num_workers=os.cpu_count() or 1,
        order=OrderOption.SEQUENTIAL,
        os_cache=True,
        drop_last=True,
        pipelines=pipelines,
    )
    torch.set_num_threads(threads)  # FFCV set it to its own
    return lambda: first_of([images.to(place).float()] for (images,) in loader)
