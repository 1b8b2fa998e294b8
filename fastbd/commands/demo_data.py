"""The demo set's files: drawn and built once for all runs of a user on a machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastbd import __version__
from fastbd.base import files
from fastbd.base.console import console, progress
from fastbd.base.errors import UserError
from fastbd.commands import build
from fastbd.config.fields import BETON, BETON_OF_BUILD, File, flags_of
from fastbd.config.flags import BuildConfig
from fastbd.data.demo import write_demo_set

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PAIRS, HELD_OUT, SEED = 4_000, 800, 0
NAME = Path("demo")  # what flags call it by
PLACES: dict[File | None, int] = {BETON_OF_BUILD: 0, BETON: 1}  # of such files in what demo_data() returns
Settings = TypeVar("Settings", bound="DataclassInstance")


def folder() -> Path:
    """Return the folder of the demo set: in XDG_CACHE_HOME, or ~/.cache, one for each version of fastbd."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # as the XDG Base Directory specification has it
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:  # no HOME, and a user that the system does not know, as in containers
            raise UserError("the demo set has no place, as there is no home folder: set XDG_CACHE_HOME.") from None
    return cache / "fastbd" / f"demo-{__version__}"


def demo_data() -> tuple[Path, Path]:
    """Return the paths of (train.beton, val.beton), which are made on first use."""
    made = train, val = folder() / "train.beton", folder() / "val.beton"
    if not all(path.is_file() for path in made):  # else nothing is written, as the folder may be read-only
        with making():
            _make(train, val)
    return made


def located(config: Settings) -> Settings:
    """Return a verb's settings with the demo set's file where a path is `demo`: its pairs, or what it evaluates on.

    A flag that is a text, as --data of pretrain, keeps the name.
    """
    found: dict[str, Any] = {}
    for name, flag in flags_of(type(config)).items():
        place, value = PLACES.get(flag.file), getattr(config, name)
        if place is not None and NAME in (value if isinstance(value, tuple) else (value,)):
            path = demo_data()[place]
            found[name] = tuple(path if each == NAME else each for each in value) if isinstance(value, tuple) else path
    return replace(config, **found)


@contextmanager
def making() -> Iterator[None]:
    """Hold the lock of the demo set's folder, which is made, so that one process at a time writes in it."""
    remedy = "set XDG_CACHE_HOME to a folder that can be written to, or give --data"
    files.check_out(folder(), "the demo set's folder", instead=remedy)
    folder().mkdir(parents=True, exist_ok=True)
    held = files.lock(folder(), wait=True)
    assert held is not None, "it was waited for"
    with held:
        yield


def _make(train: Path, val: Path) -> None:
    if train.is_file() and val.is_file():  # another process has made it meanwhile
        return
    console.print(f"making the demo set in {folder()}: {PAIRS:,} pairs and {HELD_OUT} held-out images", markup=False)
    with progress("drawing", PAIRS + HELD_OUT) as advance:
        for _ in write_demo_set(folder(), PAIRS, HELD_OUT, SEED):
            advance()
    build.run(BuildConfig(source=folder() / "train.csv", out=train, seed=SEED))
    build.run(BuildConfig(source=folder() / "val.csv", out=val, class_key="class", text_views=0, seed=SEED))
