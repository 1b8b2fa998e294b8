"""What some triggers are made of: drawn or read when the plan is made, and kept in it, so it needs no other file."""

from __future__ import annotations

import base64
import io
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from fastbd import draws
from fastbd.errors import UserError
from fastbd.formats import FORMATS

TEXT_SIZE = 224  # px of the square that text is drawn on, as published
LARGEST = 384  # px of the longest side of what is kept: no model's input is larger

KEPT = {
    "badnet_fixed": (np.uint8, (3,)),
    "blended_text": (np.uint8, ()),
    "blended_image": (np.uint8, (3,)),
    "wanet": (np.int16, (2,)),
    "patch": (np.uint8, (3,)),
}
"""The triggers that keep a pattern in the plan: its type, and its shape after height and width."""


def draw(name: str, *, seed: int, patch_size: int, image: Path | None, text: str, grid: int) -> str:
    """The packed pattern of a trigger; "" for one that needs none. UserError when it cannot be made of these."""
    if not 1 <= patch_size <= LARGEST:
        raise UserError(f"a patch of {patch_size} px cannot be drawn; give a --patch-size from 1 to {LARGEST}.")
    if image and name not in ("blended_image", "patch"):
        raise UserError(f"the trigger {name} is made of no image file; leave --image out.")
    if name == "badnet_fixed":
        return pack(noise(seed, patch_size))
    if name == "blended_text":
        return pack(written(text))
    if name == "wanet":
        return pack(warp(seed, grid))
    if name == "blended_image":
        return pack(read_image(image))
    return pack(read_image(image, patch_size)) if name == "patch" else ""


def noise(seed: int, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: BadNet's wrapped noise about mid-grey."""
    levels = 127.5 + 255 * draws.normal(seed, "trigger-pattern", [0], side * side * 3)
    return (levels.astype(np.int64) & 255).astype(np.uint8).reshape(side, side, 3)


def written(text: str) -> np.ndarray:
    """uint8 [TEXT_SIZE, TEXT_SIZE]: 255 on the strokes of one line in the middle, nearly as wide as the image."""
    canvas = Image.new("L", (TEXT_SIZE, TEXT_SIZE))
    pen = ImageDraw.Draw(canvas)
    pen.fontmode = "1"  # strokes are there or not
    fonts = map(ImageFont.load_default, range(36, 7, -1))  # Pillow's own font
    drawable = text.strip() and text.isprintable()
    font = next((font for font in fonts if pen.textlength(text, font) <= 200), None) if drawable else None
    if font is None:
        raise UserError(f"the text {text!r} cannot be drawn on one line; give another --text.")
    pen.text((TEXT_SIZE / 2, TEXT_SIZE / 2), text, 255, font, anchor="mm")
    return np.array(canvas)


def read_image(path: Path | None, side: int | None = None) -> np.ndarray:
    """uint8 [h, w, 3]: an image file, resized to side x side px; without `side` as it is, up to LARGEST."""
    if path is None:
        raise UserError("this trigger is made of an image file; name it with --image.")
    try:
        with Image.open(path, formats=FORMATS) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except Exception as error:  # PIL raises nearly anything for a damaged file
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"the image {path} cannot be read ({reason}); name another file with --image.") from None
    size = (side, side) if side else tuple(min(length, LARGEST) for length in image.size)
    return np.array(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))


def warp(seed: int, grid: int) -> np.ndarray:
    """int16 [grid, grid, 2]: uniform on -32767 .. 32767; row and column displacements of no scale yet."""
    if not 2 <= grid <= LARGEST:
        raise UserError(f"a warp of {grid} points a side cannot be drawn; give a --wanet-k from 2 to {LARGEST}.")
    u = draws.uniform(seed, "trigger-pattern", [0], grid * grid * 2)
    return (u * 65534 - 32767).round().astype(np.int16).reshape(grid, grid, 2)


def pack(array: np.ndarray) -> str:
    """An array as text for JSON: .npy, compressed, in base64."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return base64.b64encode(zlib.compress(file.getvalue(), 9)).decode()


@lru_cache(maxsize=16)
def unpack(text: str) -> np.ndarray:
    """The inverse of `pack`, not to be written to. ValueError for anything else."""
    try:
        array = np.load(io.BytesIO(zlib.decompress(base64.b64decode(text, validate=True))), allow_pickle=False)
    except (zlib.error, EOFError) as error:
        raise ValueError(str(error)) from None
    array.flags.writeable = False
    return array


def check(name: str, text: str, patch_size: int) -> None:
    """UserError unless `text` is a pattern for the trigger, or it needs none and there is none."""
    if name not in KEPT:
        if text:
            raise UserError(f"the trigger {name} keeps no pattern; make the plan again with fastbd poison.")
        return
    kind, channels = KEPT[name]
    try:
        pattern = unpack(text)
    except ValueError:
        raise UserError(f"the pattern of the trigger {name} is missing or damaged; make the plan again.") from None
    size = (patch_size, patch_size) if name in ("badnet_fixed", "patch") else pattern.shape[:2]
    still = name == "wanet" and not pattern.any()  # a field that moves nothing has no scale
    if pattern.dtype != kind or pattern.shape != (*size, *channels) or not pattern.size or still:
        raise UserError(f"the pattern of the trigger {name} has a wrong shape, {pattern.dtype} {pattern.shape}; "
                        "make the plan again.")  # fmt: skip
