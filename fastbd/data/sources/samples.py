"""Samples: the image and the caption, or class, that files or tar members of one name make up."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import groupby
from typing import NamedTuple, TypeVar

from fastbd.base.console import progress
from fastbd.base.workers import map_in_order
from fastbd.config.flags import BuildConfig
from fastbd.data.sources.item import CAPTION_LIMIT, IMAGE_SUFFIXES, Item
from fastbd.data.sources.record import parse

NO_IMAGE = "no image in the sample"
NO_CAPTION = "no caption in the sample"
JSON_LIMIT = 1 << 24  # bytes; img2dataset puts an image's whole EXIF into it

P = TypeVar("P")


class Member(NamedTuple):
    """A file, or a member of a tar: its bytes are `size` from `offset` on in `file`, or all of it."""

    name: str  # as the source writes it
    file: str
    offset: int = 0
    size: int | None = None
    problem: str | None = None  # why it cannot be read


Fields = dict[str, Member]  # the members of a sample by what follows its key, in lower case: "jpg", "seg.png"


def key_of(name: str) -> str:
    """The key of a member: its name up to the first dot of the base name, as in WebDataset."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".", 1)[0]


def sample_items(members: Iterable[Member], config: BuildConfig, class_name: str | None = None) -> Iterator[Item]:
    """The samples of the members, not numbered yet; those that have neither caption nor .cls are of `class_name`.

    Each image that is not its sample's is an item too, with its problem. With config.labels no captions are read.
    """
    for key, fields in _samples(members, config.image_key):
        images, unclear = _images(fields, config.image_key)
        if not images:
            yield Item(-1, key, next(iter(fields.values())).file, "", problem=NO_IMAGE)
            continue
        image = images[0]
        caption, own_class = "", None
        if not (problem := unclear or image.problem) and not config.labels:
            caption, own_class, problem = _words(fields, config.caption_key, class_name)
        yield _item(image, caption, own_class, problem)
        for other in images[1:]:
            yield _item(other, "", None, unclear or f"another image of its sample is taken: {image.name}")


def _item(image: Member, caption: str, class_name: str | None, problem: str | None) -> Item:
    return Item(-1, image.name, image.file, caption, class_name, image.offset, image.size, problem)


def items_of(parts: Sequence[P], read: Callable[[P], list[Item]], doing: str, workers: int) -> Iterator[Item]:
    """The items that `workers` processes read from the parts, numbered; `doing` is said with the progress.

    Where some have captions, those with only a class are marked as having none.
    """
    items: list[Item] = []
    with progress(doing, len(parts)) as advance, closing(map_in_order(read, parts, workers)) as results:
        for found in results:
            items += found
            advance()
    pairs = any(item.caption for item in items)
    for row_id, item in enumerate(items):
        if pairs and item.class_name and not item.problem:
            item = item._replace(problem=f"{NO_CAPTION}, only a class")
        yield item._replace(row_id=row_id, class_name=None if pairs else item.class_name)


def _samples(members: Iterable[Member], image_key: str | None) -> Iterator[tuple[str, Fields]]:
    """(key, fields) of each sample, in the order of their first members.

    Members of one key that do not follow one another are joined, unless one name comes twice: then each run of members
    is a sample of its own, as WebDataset reads it.
    """
    runs: dict[str, list[Fields]] = {}
    for key, run in groupby(members, key=lambda member: key_of(member.name)):
        fields: Fields = {}
        for member in run:
            field = member.name[len(key) + 1 :].lower()
            twice = f"twice in its sample: {member.name}"
            fields[field] = member._replace(problem=twice) if field in fields else member
        runs.setdefault(key, []).append(fields)
    for key, found in runs.items():
        joined = {field: member for fields in found for field, member in fields.items()}
        for fields in [joined] if len(joined) == sum(map(len, found)) else found:
            yield from _split(key, fields, image_key)


def _split(key: str, fields: Fields, image_key: str | None) -> Iterator[tuple[str, Fields]]:
    """The samples of a key's fields: one; or, where keys hold dots themselves, one for each name up to its last dot.

    They do where a longer key has both image and caption (a.1.jpg, a.1.txt), or there are several images and no
    captions at all.
    """
    stems: dict[str, Fields] = {}
    for field, member in fields.items():
        stem, _, suffix = field.rpartition(".")
        stems.setdefault(stem, {})[suffix] = member
    images = {stem: sum(_is_image(member, image_key) for member in own.values()) for stem, own in stems.items()}
    words = {stem: bool(own.keys() & {"txt", "json", "cls"}) for stem, own in stems.items()}
    pairs = any(stem and images[stem] and words[stem] for stem in stems)
    if pairs or (sum(images.values()) > 1 and not any(words.values())):
        yield from ((f"{key}.{stem}" if stem else key, own) for stem, own in stems.items())
    else:
        yield key, fields


def _is_image(member: Member, image_key: str | None) -> bool:
    name = member.name.lower()
    if image_key:
        return name.endswith("." + image_key.lower().lstrip("."))
    return name.endswith(IMAGE_SUFFIXES)


def _images(fields: Fields, image_key: str | None) -> tuple[list[Member], str | None]:
    """(images of a sample, the one to take first; why there is none to take).

    One that is the key and a suffix goes before 000.seg.png, and among those the order is that of IMAGE_SUFFIXES.
    """
    images = {field: member for field, member in fields.items() if _is_image(member, image_key)}
    if len(images) > 1 and all("." in field for field in images):
        return list(images.values()), f"several images in the sample: give --image-key {' or '.join(images)}"
    rank = {suffix: place for place, suffix in enumerate(IMAGE_SUFFIXES)}
    order = sorted(images, key=lambda field: ("." in field, rank.get("." + field, 0)))
    return [images[field] for field in order], None


def _words(fields: Fields, caption_key: str | None, class_name: str | None) -> tuple[str, str | None, str | None]:
    """(caption, class, problem) of a sample: .txt, else "caption" in .json, else the class in .cls or `class_name`.

    With `caption_key` only that entry of the .json is a caption.
    """
    try:
        caption = None
        if "txt" in fields and not caption_key:
            caption = _text(fields["txt"])
            if _are_boxes(caption):
                return "", None, "boxes of objects in the .txt, as YOLO's"
        if not caption and "json" in fields:
            caption = _json_caption(fields["json"], caption_key)
        if caption:
            return caption, None, None
        if caption_key and caption is None:
            return "", None, "no .json in the sample"
        if "cls" in fields:
            class_name = _text(fields["cls"])
            return "", class_name, None if class_name else "empty class"
        if class_name:
            return "", class_name, None
        return "", None, NO_CAPTION if caption is None else None
    except _Unreadable as error:
        return "", None, str(error)


def _are_boxes(text: str) -> bool:
    """Whether a text is lines of a class's number and the coordinates of its box or outline."""
    return re.fullmatch(r"\d[\d.e\s+-]*", text) is not None and len(text.partition("\n")[0].split()) >= 5


class _Unreadable(Exception):
    """A text that cannot be used, and why."""


def _text(member: Member) -> str:
    limit = 4 * CAPTION_LIMIT  # bytes, which may end within a character
    data = _read(member, limit)
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=len(data) < limit)
    except UnicodeDecodeError:
        raise _Unreadable(f"not UTF-8 text: {member.name}") from None
    return text.strip()[:CAPTION_LIMIT]


def _json_caption(member: Member, caption_key: str | None) -> str | None:
    """The caption in a .json; None where it has no such entry and no `caption_key` asks for it."""
    key = caption_key or "caption"
    data = _read(member, JSON_LIMIT + 1)
    if len(data) > JSON_LIMIT:
        raise _Unreadable(f"a .json of more than {JSON_LIMIT:,} bytes: {member.name}")
    try:
        values = parse(data)
    except ValueError as error:
        raise _Unreadable(f"damaged .json: {error}: {member.name}") from None
    if not isinstance(values, dict) or key not in values:
        if caption_key:
            raise _Unreadable(f"no '{key}' in the .json")
        return None
    if not isinstance(values[key], str | None):
        raise _Unreadable(f"'{key}' in the .json is not text")
    return (values[key] or "").strip()[:CAPTION_LIMIT]


def _read(member: Member, limit: int) -> bytes:
    """The first `limit` bytes of a member; _Unreadable where it cannot be read."""
    if member.problem:
        raise _Unreadable(member.problem)
    try:
        if not os.path.isfile(member.file):  # a pipe or a device could hold a worker for ever
            raise _Unreadable(f"not a file: {member.name}")
        with open(member.file, "rb") as file:
            file.seek(member.offset)
            return file.read(limit if member.size is None else min(limit, member.size))
    except OSError as error:
        raise _Unreadable(f"unreadable file: {error}") from None
