"""Classes of images from a file beside them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastbd.base.errors import UserError
from fastbd.base.prompts import numbered, read_classes
from fastbd.config.flags import BuildConfig
from fastbd.data.shards import natural
from fastbd.data.sources.item import IMAGE_SUFFIXES, Item
from fastbd.data.sources.samples import NO_IMAGE

NAMES_IMAGE = re.compile(rf"({'|'.join(map(re.escape, IMAGE_SUFFIXES))})\b", re.IGNORECASE)


def labelled(items: list[Item], config: BuildConfig, file: Path) -> list[Item]:
    """The images in the order of their file names, each with its class from the file of labels."""
    source = config.source
    if damaged := next((item for item in items if item.problem not in (None, NO_IMAGE)), None):
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
        splits = ((separator, *line.split(separator, 1)) for separator in ("\t", ",", None))
        found = next((it for it in splits if len(it) == 3 and os.path.basename(it[1].strip()) in place), None)
        if found:
            separator, name, label = found[0], found[1].strip(), found[2].strip()
            if re.fullmatch('".*"', label):
                label = label[1:-1]
            elif separator and separator in label:
                raise UserError(f"line {row} of {config.labels}, '{line}', has more than `file label`: take that out.")
            boxes = re.fullmatch(r"(n\d{8})( \d+){4}( .*)?", label)
            label, i = boxes[1] if boxes else label, place[os.path.basename(name)]
            if labels.setdefault(i, label) != label:
                raise UserError(f"{config.labels} gives {items[i].name} two labels, {labels[i]} and {label}: mend it.")
        elif row > 1 or NAMES_IMAGE.search(line):
            strange = strange or f"line {row} of {config.labels}, '{line}', gives no image of {config.source} a label"
    if labels and strange:
        raise UserError(f"{strange}: mend it, or take it out.")
    return labels


def _labels_by_line(lines: list[str], items: list[Item], config: BuildConfig) -> dict[int, str]:
    """A label a line, in the order of the file names; UserError where that is a matter of how numbers are sorted."""
    if strange := next((line for line in lines if NAMES_IMAGE.search(line)), None):
        raise UserError(
            f"'{strange}' in {config.labels} names an image, and is not `file label` for one of {config.source}: give "
            "such lines, or a label a line."
        )
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
