"""Where pairs come from: CSV and TSV files, WebDataset tars, folders of class folders."""

from __future__ import annotations

import csv
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from fastbd.data.workers import map_in_order
from fastbd.errors import UserError
from fastbd.log import progress

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Item(NamedTuple):  # there are millions, sent to the workers
    """One row of a source, as a worker needs it. Its bytes are `size` from `offset` on in `file`, or all of it."""

    row_id: int
    name: str  # the path as the source writes it
    file: str
    caption: str
    class_name: str | None = None  # None: the source has no classes
    offset: int = 0
    size: int | None = None
    problem: str | None = None  # why the row cannot be used, where the source shows it


def read_items(source: Path, image_key: str, caption_key: str, class_key: str | None, workers: int = 0) -> list[Item]:
    """All rows of a source, in order; tars are read by `workers` processes (0: one a core).

    Raises UserError for a source that is missing, empty, or of no known kind, WorkerDied.
    """
    if source.is_dir():
        shards = sorted(source.glob("*.tar"))
        items = list(_tar_items(shards, workers) if shards else _class_folder_items(source))
    elif source.suffix == ".tar" and source.is_file():
        items = list(_tar_items([source], workers))
    elif source.suffix in (".csv", ".tsv") and source.is_file():
        items = list(_csv_items(source, image_key, caption_key, class_key))
    else:
        what = "is not a .csv, .tsv or .tar file or a folder" if source.exists() else "does not exist"
        raise UserError(f"the source {source} {what}: give a table, tars, or a folder of class folders.")
    if not items:
        raise UserError(f"the source {source} holds no rows: there is nothing to build.")
    return items


def _csv_items(source: Path, image_key: str, caption_key: str, class_key: str | None) -> Iterator[Item]:
    csv.field_size_limit(sys.maxsize)  # a row with a stray quote may swallow the rest: let it be rejected, not crash
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, delimiter="\t" if source.suffix == ".tsv" else ",", restval="")
            columns = rows.fieldnames or []
            for key in (image_key, class_key, None if class_key in columns else caption_key):
                if key and key not in columns:
                    listed = ", ".join(columns) or "none"
                    raise UserError(f"{source} has no column '{key}'; its columns are: {listed}.")
            folder = str(source.parent)
            for row_id, row in enumerate(rows):
                name = row[image_key].strip()
                class_name = row[class_key].strip() if class_key else None
                problem = "empty path" if not name else "empty class" if class_name == "" else None
                caption = row.get(caption_key, "")
                yield Item(row_id, name, os.path.join(folder, name), caption, class_name, problem=problem)
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text ({error}): save it as UTF-8.") from None
    except csv.Error as error:
        raise UserError(f"{source} is not a readable table ({error}): repair it.") from None


def _tar_items(shards: list[Path], workers: int) -> Iterator[Item]:
    """Samples of WebDataset shards as img2dataset writes them: the members of one sample share a key, and follow."""
    row_id = 0
    with progress("reading tars", len(shards)) as advance, closing(map_in_order(_items_in, shards, workers)) as tars:
        for items in tars:
            for item in items:
                yield item._replace(row_id=row_id)
                row_id += 1
            advance()


def _items_in(shard: Path) -> list[Item]:
    """The samples of a shard, their rows not numbered yet."""
    items = []
    for key, image, caption, problem in _samples(shard):
        name = f"{shard.name}/{image.name if image else key}"
        offset, size = (image.offset_data, image.size) if image else (0, None)
        items.append(Item(-1, name, str(shard), caption, offset=offset, size=size, problem=problem))
    return items


def _samples(shard: Path) -> Iterator[tuple[str, tarfile.TarInfo | None, str, str | None]]:
    """(key, member of the image, caption, problem) of each sample; a damaged shard ends with a sample that says so."""
    key, members = "", {}

    def sample():
        image = next((members[suffix] for suffix in reversed(members) if suffix in IMAGE_SUFFIXES), None)
        caption = read(".txt") or _json_caption(read(".json"))
        return key, image, caption, None if image else "no image in the sample"

    def read(suffix: str) -> str:
        return tar.extractfile(members[suffix]).read().decode(errors="replace") if suffix in members else ""

    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                stem, suffix = os.path.splitext(member.name)
                if members and stem != key:
                    yield sample()
                    members = {}
                key = stem
                members[suffix.lower()] = member
            if members:
                yield sample()
    except (tarfile.TarError, OSError) as error:
        yield key, None, "", f"damaged tar: {error}"


def _json_caption(text: str) -> str:
    try:
        caption = json.loads(text)["caption"]
    except (ValueError, KeyError, TypeError):
        return ""
    return caption if isinstance(caption, str) else ""


def _class_folder_items(source: Path) -> Iterator[Item]:
    """Every file below the class folders, by class; the folders' names are the classes'."""
    row_id = 0
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        for file in sorted(path for path in folder.rglob("*") if not path.is_dir()):
            yield Item(row_id, str(file.relative_to(source)), str(file), "", folder.name)
            row_id += 1
