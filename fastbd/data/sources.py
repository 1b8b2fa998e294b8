"""Where pairs come from: tables, WebDataset tars, folders of class folders, Karpathy's JSON, images with a list."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from fastbd.config import BuildConfig
from fastbd.data.shards import natural
from fastbd.data.workers import map_in_order
from fastbd.errors import UserError
from fastbd.log import progress
from fastbd.prompts import labels_of, numbered, read_classes

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


def read_items(config: BuildConfig) -> list[Item]:
    """All rows of the source, in order; tars are read by config.workers processes (0: one a core).

    Raises UserError for a source that is missing, empty, or of no known kind, WorkerDied.
    """
    source, kind = config.source, config.source.suffix
    _check_flags(config)
    if source.is_dir() and (shards := sorted(source.glob("*.tar"))):
        items = list(_tar_items(shards, config.workers))
    elif source.is_dir():
        items = list(_image_items(source) if config.labels else _class_folder_items(source))
    elif kind == ".tar" and source.is_file():
        items = list(_tar_items([source], config.workers))
    elif kind in (".csv", ".tsv") and source.is_file():
        items = list(_csv_items(source, config.image_key, config.caption_key, config.class_key))
    elif kind == ".json" and source.is_file():
        items = list(_karpathy_items(source, config.images or source.parent, config.split))
    else:
        what = "is not a .csv, .tsv, .json or .tar file or a folder" if source.exists() else "does not exist"
        raise UserError(f"the source {source} {what}: give a table, tars, or a folder of class folders.")
    if not items and source.is_dir() and not config.labels and any(_image_items(source)):
        raise UserError(f"the images of {source} are in no class folders: give --labels, a file with their classes.")
    if not items:
        raise UserError(f"the source {source} holds no rows: there is nothing to build.")
    if config.labels:
        items = _labelled(items, config)
    return _in_list(items, config) if config.classes else items


def _check_flags(config: BuildConfig) -> None:
    """UserError for a flag that is of no use with this kind of source."""
    kind = config.source.suffix
    if kind != ".json" and (config.images or config.split):
        raise UserError(
            f"--images and --split belong to a .json file of Karpathy's, and the source is {config.source}."
        )
    if config.images and not config.images.is_dir():
        raise UserError(f"--images {config.images} is no folder: give that of the images that {config.source} names.")
    if config.labels and kind in (".json", ".csv", ".tsv"):
        raise UserError(f"--labels belongs to a folder or tars of images, and the source is {config.source}.")


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


def _image_items(source: Path) -> Iterator[Item]:
    """Every image below the folder, by file name; other files are passed over."""
    files = (path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir())
    for file in files:
        yield Item(-1, str(file.relative_to(source)), str(file), "")


def _labelled(items: list[Item], config: BuildConfig) -> list[Item]:
    """The images in the order of their file names, each with its class from config.labels."""
    source, file = config.source, config.labels
    if damaged := next((item for item in items if (item.problem or "").startswith("damaged")), None):
        raise UserError(
            f"{damaged.name} cannot be read ({damaged.problem}), and every image needs its label: repair it."
        )
    items = [item for item in items if not item.problem]
    items.sort(key=lambda item: (os.path.basename(item.name), item.name))
    lines = _lines(file)
    labels = _labels_by_file(lines, items, config) or _labels_by_line(lines, items, config)
    if len(labels) != len(items):
        bare = next((f", {item.name} without one" for i, item in enumerate(items) if i not in labels), "")
        raise UserError(
            f"{file} holds {len(labels):,} labels, and {source} {len(items):,} images{bare}: "
            "give a label a line in the order of the file names, or lines `file label`."
        )
    names, codes = set(labels.values()), read_classes(config.classes).codes if config.classes else []
    if numbered(names) and "0" not in names and not names <= set(codes):
        raise UserError(
            f"the labels in {file} are numbers from 1, and those of the ILSVRC development kit follow an order of "
            "their own: give numbers from 0, or WordNet ids as in imagenet_2012_validation_synset_labels.txt."
        )
    return [item._replace(row_id=i, caption="", class_name=labels[i]) for i, item in enumerate(items)]


def _labels_by_file(lines: list[str], items: list[Item], config: BuildConfig) -> dict[int, str]:
    """Label of each image, by its place, from lines `file label` or `file,label`; {} where no line names an image.

    The first line may be a header, and the file lack its suffix. Kaggle's LOC_val_solution.csv has boxes after the
    label, which are dropped.
    """
    place = {}
    for i, item in enumerate(items):
        name = os.path.basename(item.name)
        place[name] = place[os.path.splitext(name)[0]] = i
    labels, strange = {}, None
    for row, line in enumerate(lines, 1):
        pairs = (line.split(separator, 1) for separator in ("\t", ",", None))
        pair = next((p for p in pairs if len(p) == 2 and os.path.basename(p[0].strip()) in place), None)
        if pair:
            label = pair[1].strip().strip('"')
            boxes = re.fullmatch(r"(n\d{8})( \d+){4}( .*)?", label)
            labels[place[os.path.basename(pair[0].strip())]] = boxes[1] if boxes else label
        elif row > 1 or any(suffix in line.lower() for suffix in IMAGE_SUFFIXES):
            strange = strange or f"line {row} of {config.labels}, '{line}', gives no image of {config.source} a label"
    if labels and strange:
        raise UserError(f"{strange}: mend it, or take it out.")
    return labels


def _labels_by_line(lines: list[str], items: list[Item], config: BuildConfig) -> dict[int, str]:
    """A label a line, in the order of the file names; UserError where that is a matter of how numbers are sorted."""
    names = [os.path.basename(item.name) for item in items]
    pairs = zip(names, sorted(names, key=natural), strict=True)
    if differ := next(((one, other) for one, other in pairs if one != other), None):
        one, other = differ
        raise UserError(
            f"{config.labels} holds a label a line, and the order of the images of {config.source} is in doubt ({one} "
            f"comes before {other} by letters, after it by numbers): give lines `file label`."
        )
    return dict(enumerate(lines))


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a text file with one label a line.") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _in_list(items: list[Item], config: BuildConfig) -> list[Item]:
    """The items with their classes by the codes of the list config.classes; others are marked as not in it."""
    if all(item.class_name is None for item in items):
        raise UserError(f"--classes is for labelled images, and {config.source} names no classes: leave it out.")
    classes, reason = read_classes(config.classes), f"class not in {config.classes}"
    labels = labels_of(classes, {item.class_name for item in items if item.class_name})

    def marked(item: Item) -> Item:
        if item.class_name in labels:
            return item._replace(class_name=classes.codes[labels[item.class_name]])
        return item._replace(problem=item.problem or reason)

    return list(map(marked, items))


def _karpathy_items(source: Path, images: Path, split: str | None) -> Iterator[Item]:
    """The sentences of dataset_coco.json and its like (Karpathy and Fei-Fei 2015), those of an image in a row."""
    try:
        entries = json.loads(source.read_bytes())["images"]
        splits = {entry["split"] for entry in entries}
        if split and split not in splits:
            raise UserError(f"{source} has no split '{split}'; its splits are: {', '.join(sorted(splits))}.")
        row_id = 0
        for entry in entries:
            name = os.path.join(entry.get("filepath", ""), entry["filename"])
            for sentence in entry["sentences"] if split in (None, entry["split"]) else ():
                yield Item(row_id, name, os.path.join(images, name), sentence["raw"])
                row_id += 1
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source} is no file of Karpathy's ({error!r}): give one such as dataset_coco.json.") from None
