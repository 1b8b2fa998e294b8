"""JPEG files to training tensors, an epoch of them: the published loader, FFCV's, and ours with each decoder and from
memory. With one view (contrastive training) and with two (self-supervised)."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from bench import published
from bench.case import Case, Output, Provider, Unavailable
from bench.pictures import photographs
from fastbd import dist
from fastbd.data import resident, sampler
from fastbd.data.beton import Beton, BetonWriter
from fastbd.data.decode import open_decoder
from fastbd.data.loader import RECIPES, Pairs, batches, draw_views
from fastbd.data.tokenizer import CONTEXT
from fastbd.errors import UserError

SIZE, BATCH = 224, 64
TOLERANCE = {"": 0.02}  # a level is 1.5 % of a standard deviation
GPU_DECODE = {"": 0.2}  # another inverse DCT and chroma upsampling: some levels, and Equalize makes more of them
HW_LOADS = (0.0, 0.5, 0.65, 0.9, 1.0)


def cases(device: str, quick: bool) -> Iterator[Case]:
    """512 (on a GPU 4,096) photographs of 256 x 341 px to views of 224 px: float32 on a CPU, bf16 on a GPU."""
    count = (4096 if device == "cuda" else 512) // (2 if quick else 1)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "photographs.beton"
        files = photographs(256)
        files = [files[i % len(files)] for i in range(count)]
        write(path, files)
        for name, recipe in (("one view", ("plain",)), ("two views", RECIPES["cleanclip"])):
            yield epoch(name, recipe, path, files, device, (0.0, 0.65, 1.0) if quick else HW_LOADS)


def write(path: Path, files: list[np.ndarray], classes: int = 0) -> None:
    """A .beton of JPEG files; with `classes` they take turns, and are named by their numbers."""
    tokens = np.zeros(CONTEXT, np.uint16)
    with BetonWriter(path, len(files), 0, labelled=classes > 0) as writer:
        for i, file in enumerate(files):
            width, height = Image.open(io.BytesIO(file)).size
            about = {"label": i % classes, "class_name": str(i % classes)} if classes else {}
            # A caption, as FFCV mistakes an empty value for the image that follows it.
            writer.add(jpeg=file.tobytes(), width=width, height=height, tokens=tokens, text_views=None, caption="-",
                       row_id=i, **about)  # fmt: skip


def epoch(
    name: str, recipe: tuple[str, ...], path: Path, files: list[np.ndarray], device: str, hw_loads: tuple[float, ...]
) -> Case:  # fmt: skip
    """An epoch of `files`, which `path` holds, in batches; what is compared are the views of its first batch."""
    world, dtype = dist.World(0, 1, torch.device(device)), torch.bfloat16 if device == "cuda" else torch.float32
    epoch_batches = partial(
        batches, rows=np.arange(len(files)), batch_size=BATCH, seed=0, policies=recipe, text_view=None,
        world=world, epoch=1, start=0, dtype=dtype,
    )  # fmt: skip

    def ours(decode: str, where: str = "none", load: float = 0.0) -> Callable[[], Output]:
        try:
            pairs = Pairs(Beton(path), open_decoder(decode, 0, device, load), SIZE)
        except UserError as error:
            raise Unavailable(str(error)) from None
        resident.keep(pairs, np.arange(len(files)), where, base=recipe == ("plain",), world=world, quiet=True)

        def call() -> Output:
            views = first_of(lambda: (batch.views for batch in epoch_batches(pairs)))
            if pairs.decoder.left_to_pillow:
                raise RuntimeError("DALI left images to Pillow: this would not be its time")
            return views

        return call

    def as_published() -> Callable[[], Output]:
        order = np.concatenate([*sampler.batches(len(files), BATCH, seed=0, epoch=1)])
        beton = Beton(path)
        sizes = np.stack([beton.height[order], beton.width[order]], -1)
        views = draw_views(recipe, SIZE, order, sizes, seed=0, epoch=1)
        loader = published.loader(published.Views([files[i] for i in order], views, SIZE), BATCH, os.cpu_count())
        return partial(first_of, lambda: ([view.to(world.device, dtype) for view in views] for views in loader))

    providers = {"Pillow, float32, DataLoader": Provider(as_published, TOLERANCE)}
    if len(recipe) == 1:
        note = "its own simple pipeline: a random crop, uint8, not normalised; so its pixels are not compared"
        theirs = partial(ffcv_epoch, path, world.device)
        providers["FFCV, random crop"] = Provider(theirs, {"": float("inf")}, note=note)
    for decode in ("pil", "ffcv", "dali", *(["dali-cpu"] if device == "cuda" else [])):
        exact = decode in ("pil", "dali-cpu") or (device == "cpu" and decode == "dali")
        tolerance = TOLERANCE if exact else GPU_DECODE
        providers[f"fastbd, {decode}"] = Provider(partial(ours, decode), tolerance, ours=True, own_memory=False)
    if device == "cuda":
        for load in hw_loads:
            build = partial(ours, "dali", load=load)
            providers[f"fastbd, dali, hw_decoder_load {load:g}"] = Provider(
                build, GPU_DECODE, ours=True, own_memory=False
            )
    for where in ("gpu", "ram") if device == "cuda" else ("ram",):
        note = "decoded before; an epoch decodes nothing"
        build = partial(ours, "pil", where)
        providers[f"fastbd, --resident {where}"] = Provider(build, TOLERANCE, ours=True, own_memory=False, note=note)
    return Case(
        name=f"data {name}, {len(files)} images", unit="images/s", units=len(files) // BATCH * BATCH, device=device,
        providers=providers,
    )  # fmt: skip


def first_of(batches_of_views) -> Output:
    """Goes through an epoch; the views of its first batch."""
    first = None
    for views in batches_of_views():
        first = first or {f"view {i}": view for i, view in enumerate(views)}
    return first


def ffcv_epoch(path: Path, place: torch.device) -> Callable[[], Output]:
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor, ToTorchImage

    threads = torch.get_num_threads()
    steps = [RandomResizedCropRGBImageDecoder((SIZE, SIZE), (0.5, 1)), ToTensor(), ToTorchImage()]
    loader = Loader(
        str(path), BATCH, num_workers=os.cpu_count(), order=OrderOption.SEQUENTIAL, os_cache=True, drop_last=True,
        pipelines={"image": steps, "tokens": None, "caption": None, "row_id": None},
    )  # fmt: skip
    torch.set_num_threads(threads)  # FFCV set it to its own
    return partial(first_of, lambda: ([images.to(place).float()] for (images,) in loader))
