"""Flipped bits and other damage in the files of data: each is harmless, or told in one sentence that names the file."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import flips
import numpy as np
import torch
from containers import without_checksums
from PIL import Image
from soak.tally import SAME, SENTENCE, UNTOLD, Tally, main

from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.data import resident
from fastbd.data.beton import Beton, BetonWriter
from fastbd.data.decode import open_decoder
from fastbd.data.pairs import Pairs
from fastbd.data.rows import read_rows, write_rows
from fastbd.data.tokenizer import tokenize
from fastbd.poison.plan import Plan, make_plan
from fastbd.poison.triggers import TriggerSpec

TIMES = 1000
BIT, ANY = 1, 5  # kinds of damage: a flipped bit alone, or also overwritten, zeroed, cut and copied
ENDS = {"same": SAME, "sentence": SENTENCE}


def inject(share: float, seed: int, folder: Path) -> Iterator[Tally]:
    """Flip bits in each kind of file; containers are also overwritten, zeroed, cut and have blocks copied."""
    rng, times = np.random.default_rng(seed), max(1, round(TIMES * share))
    for kinds, how in ((BIT, "a flipped bit"), (ANY, "a flip, overwritten, zeroed, cut or copied bytes")):
        for views, labelled in ((2, True), (0, False)):
            path = flips.write(folder / "new.beton", views, labelled)
            name = ".beton with classes and text views" if labelled else ".beton with captions alone"
            yield _container(f"{how} in a {name}", path, kinds, times, rng)
            old = without_checksums(path, folder / "old.beton")
            yield _container(f"{how} in a {name}, without checksums", old, kinds, times, rng)
    for what, path, read in (_pixels(folder), _plan(folder), _rows(folder)):
        yield _file(f"a flipped bit in a {what}", path, read, times, rng)


def _container(fault: str, path: Path, kinds: int, times: int, rng: np.random.Generator) -> Tally:
    """Return what damage to a container came to; without checksums other content cannot be told."""
    raw, whole, tally = path.read_bytes(), flips.read(path), Tally(fault, "the file is changed, opened, read, verified")
    places = flips.tables_and_values(raw)
    for _ in range(times):
        damaged = flips.mutated(raw, places, rng, kinds)
        end = flips.outcome(path.with_name("damaged.beton"), damaged, whole)
        if end == "other content" and not whole[2]:
            tally.count(UNTOLD)
        else:
            tally.count(ENDS.get(end, end), end)
    return tally


def _file(fault: str, path: Path, read: Callable[[], object], times: int, rng: np.random.Generator) -> Tally:
    """Return what flipped bits in a file came to that `read` reads."""
    raw, whole, tally = path.read_bytes(), read(), Tally(fault, "the file is changed and read")
    for _ in range(times):
        path.write_bytes(flips.mutated(raw, np.arange(len(raw)), rng, BIT))
        try:
            tally.count(SAME if read() == whole else "other content")
        except UserError as error:
            tally.count(SENTENCE if path.name in str(error) else "no name", str(error))
        except Exception as error:
            tally.count(type(error).__name__, str(error))
    return tally


def _pixels(folder: Path) -> tuple[str, Path, Callable[[], object]]:
    rng = np.random.default_rng(0)
    with BetonWriter(folder / "pairs.beton", 8, 0, False) as writer:
        for i in range(8):
            jpeg = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(jpeg, "JPEG")
            writer.add(
                jpeg=jpeg.getvalue(),
                width=20,
                height=20,
                tokens=tokenize(["one"])[0],
                text_views=None,
                caption="one",
                row_id=i,
            )
    beton, decoder, rows = Beton(folder / "pairs.beton"), open_decoder("pil", 1, "cpu"), np.arange(8)

    def read() -> bytes:
        pairs = Pairs(beton, decoder, 16)
        resident.keep(pairs, rows, "disk", base=True, world=World(0, 1, torch.device("cpu")), quiet=True)
        return torch.stack(list(pairs.resident.images(rows))).numpy().tobytes()

    read()
    return ".pixels file", folder / "pairs.16.pixels", read


def _plan(folder: Path) -> tuple[str, Path, Callable[[], object]]:
    path, trigger = folder / "pairs.poison.json", TriggerSpec("badnet", patch_size=5)
    made = make_plan(
        "a" * 64,
        900,
        target="banana",
        trigger=trigger,
        geometry="squash",
        seed=0,
        templates=("a photo of a {}.",),
        count=20,
    )
    made.save(path)
    return "plan", path, partial(Plan.load, path)


def _rows(folder: Path) -> tuple[str, Path, Callable[[], object]]:
    path = folder / "kept.rows"
    write_rows(path, np.arange(0, 2000, 3), "a" * 64, "every third")
    return "row list", path, lambda: read_rows(path, "a" * 64, 2000).tolist()


if __name__ == "__main__":
    main("flips_data", inject)
