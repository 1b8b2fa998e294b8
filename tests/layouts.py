"""Sources in small: files and tars that hold what a test says, and the rows that are read from them."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from fastbd.commands.build import run
from fastbd.config.flags import BuildConfig
from fastbd.data.beton import Beton
from fastbd.data.sources import read_items
from fastbd.data.sources.item import Item


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Write the files, each by its path below the folder; returns the folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def tar_bytes(members: Iterable[tuple[str, bytes] | tarfile.TarInfo], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar with the members: (name, data), or the header of one without data."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def read(source: Path, **options) -> list[Item]:
    """The items of a source; the file that would be written is never made."""
    return read_items(BuildConfig(source=source, out=Path("unused.beton"), **{"workers": 1} | options))


def data_of(item: Item) -> bytes:
    """The bytes of an item's image."""
    with open(item.file, "rb") as file:
        file.seek(item.offset)
        return file.read(-1 if item.size is None else item.size)


def save(path: Path, colour=(200, 30, 30), size=(40, 30)) -> bytes:
    """Write an image of one colour; returns its file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path.read_bytes()


def build(tmp_path: Path, source: Path, **options) -> tuple[Beton, list[list[str]]]:
    """(what a build of the source writes, its rejects, if there are any); there is nothing else beside them."""
    out = tmp_path / "out" / "set.beton"
    assert run(BuildConfig(source=source, out=out, workers=2, **options)) == 0
    if [p.name for p in out.parent.iterdir()] == ["set.beton"]:
        return Beton(out), []
    with (out.parent / "set.rejects.csv").open(newline="") as file:
        header, *rejects = csv.reader(file)
    assert header == ["row_id", "line", "path", "reason"] and rejects
    assert sorted(p.name for p in out.parent.iterdir()) == ["set.beton", "set.rejects.csv"]
    return Beton(out), [[row_id, path, reason] for row_id, _, path, reason in rejects]
