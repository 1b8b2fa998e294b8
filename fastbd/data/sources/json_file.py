"""JSON files that list captions of images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from fastbd.base.errors import UserError
from fastbd.config.flags import BuildConfig
from fastbd.data.sources.item import Item, image_key
from fastbd.data.sources.lines import TOO_LONG, numbered_lines
from fastbd.data.sources.record import image_item, parse, record_items, with_caption


def json_line_items(config: BuildConfig) -> Iterator[Item]:
    """The pairs of JSON lines, a record in each; a damaged line is a row with its problem."""
    row_id = 0
    for line, text in numbered_lines(config.source):
        for item in _line_items(text, config):
            yield item._replace(row_id=row_id, line=line)
            row_id += 1


def _line_items(text: str | None, config: BuildConfig) -> Iterable[Item]:
    if text is None:
        return [Item(-1, "", "", "", problem=TOO_LONG)]
    try:
        return record_items(parse(text.strip()), config) if text.strip() else []
    except ValueError as error:
        return [Item(-1, "", "", "", problem=f"not JSON: {error}")]


def list_items(config: BuildConfig, content: list) -> Iterator[Item]:
    """The pairs of a list of records."""
    items = (item for record in content for item in record_items(record, config))
    return (item._replace(row_id=row_id) for row_id, item in enumerate(items))


def coco_items(config: BuildConfig, content: dict) -> Iterator[Item]:
    """The captions of COCO's captions_*.json (Chen et al. 2015, arXiv 1504.00325), those of an image in a row."""
    try:
        images = {image["id"]: (image_item(image["file_name"], config), []) for image in content["images"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{config.source} has an image without an id or a file_name ({error!r}): mend it.") from None
    if len(images) < len(content["images"]):
        raise UserError(f"{config.source} gives two images one id: mend it.")
    unknown = []
    for annotation in content["annotations"]:
        try:
            image, captions = images[annotation["image_id"]]
            captions.append(with_caption(image, annotation["caption"]))
        except (KeyError, TypeError) as error:
            unknown.append(Item(-1, "", "", "", problem=f"an annotation without its image or caption: {error!r:.80}"))
    items = chain(*(captions for _, captions in images.values()), unknown)
    return (item._replace(row_id=row_id) for row_id, item in enumerate(items))


def karpathy_items(config: BuildConfig, content: dict) -> Iterator[Item]:
    """The sentences of dataset_coco.json and its like (Karpathy and Fei-Fei 2015), those of an image in a row."""
    source, split = config.source, config.split
    try:
        splits = {entry["split"] for entry in content["images"]}
        if split and split not in splits:
            raise UserError(f"{source} has no split '{split}'; its splits are: {', '.join(sorted(splits))}.")
        row_id = 0
        for entry in content["images"]:
            image = image_item(os.path.join(entry.get("filepath", ""), entry["filename"]), config)
            for sentence in entry["sentences"] if split in (None, entry["split"]) else ():
                yield with_caption(image._replace(row_id=row_id), sentence["raw"])
                row_id += 1
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{source} is not a file of Karpathy's ({error!r}): give one such as dataset_coco.json."
        ) from None


def json_kind(config: BuildConfig) -> tuple[str, object]:
    """(kind, content) of a .json file, by what it holds: "karpathy", "coco", "list", or "lines" with None.

    Raises UserError for what is neither of these.
    """
    source = config.source
    if _are_lines(source):
        return "lines", None
    try:
        content = parse(source.read_bytes())
    except ValueError as error:
        raise UserError(f"{source} is not JSON ({error}): mend it.") from None
    if isinstance(content, list):
        keys = [config.class_key or config.caption_key or "caption"]
        if not content or any(isinstance(it, dict) and {image_key(it, config), *keys} <= it.keys() for it in content):
            return "list", content
    elif isinstance(content, dict) and isinstance(content.get("images"), list):
        if _some_have("sentences", content["images"]):
            return "karpathy", content
        if _some_have("caption", content.get("annotations")):
            return "coco", content
    first = next((it for it in content if isinstance(it, dict)), {}) if isinstance(content, list) else {}
    keys = f"; its first object has the keys {', '.join(first):.200}" if first else ""
    raise UserError(
        f"{source} is not a list of objects with an image and a caption (see --image-key and --caption-key), nor "
        f"COCO's captions_*.json, nor a file of Karpathy's such as dataset_coco.json{keys}: give one of these."
    )


def _some_have(key: str, values: object) -> bool:
    return isinstance(values, list) and any(isinstance(value, dict) and key in value for value in values)


def _are_lines(source: Path) -> bool:
    """Whether the first line of the file is an object and not the last."""
    try:
        lines = (text for _, text in numbered_lines(source))
        return isinstance(parse(next(lines, "") or ""), dict) and any(text is None or text.strip() for text in lines)
    except (ValueError, UserError):
        return False
