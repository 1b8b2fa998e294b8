"""What some triggers are made of: drawn or read when the plan is made, and kept in it, so it needs no other file."""

from __future__ import annotations

import base64
import io
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from fastbd.base import random
from fastbd.base.errors import UserError
from fastbd.base.formats import FORMATS

TEXT_SIZE = 224  # px of the square that text is drawn on, as published
TENSORS = (".pt", ".pth")
LARGEST = 384  # px of the longest side of what is kept: no model's input is larger

KEPT = {
    "badnet_fixed": {(np.uint8, (3,))},
    "blended_text": {(np.uint8, ()), (np.uint8, (3,))},  # strokes, or a stored pattern
    "blended_image": {(np.uint8, (3,)), (np.uint8, (4,))},  # opaque, or with alpha
    "wanet": {(np.int16, (2,)), (np.float32, (2,))},  # drawn, of no scale; or a stored grid
    "patch": {(np.uint8, (3,)), (np.uint8, (4,))},
}
"""The triggers that keep an array in the plan: its types, each with the shape after height and width."""
MADE_OF = {"image": ("blended_image", "patch"), "pattern": ("blended_text",), "grid": ("wanet",)}
"""Which triggers a file can be given for, by its flag."""
DEFAULT_TEXT, DEFAULT_POINTS = "Watermarked", 224


def draw(
    name: str,
    *,
    seed: int,
    patch_size: int,
    image: Path | None = None,
    text: str | None = None,
    pattern: Path | None = None,
    points: int | None = None,
    grid: Path | None = None,
) -> str:
    """The packed array of a trigger, as the flags of PoisonConfig say; "" for one that needs none.

    UserError when it cannot be made of these.
    """
    if not 1 <= patch_size <= LARGEST:
        raise UserError(f"a patch of {patch_size} px cannot be drawn; give a --patch-size from 1 to {LARGEST}.")
    for flag, path in (("image", image), ("pattern", pattern), ("grid", grid)):
        if path and name not in MADE_OF[flag]:
            raise UserError(f"the trigger {name} is made of no {flag} file; leave --{flag} out.")
    if pattern and text is not None:
        raise UserError("--pattern holds what --text would write; give one of them.")
    if grid and points is not None:
        raise UserError("--grid holds the warp that --wanet-k would draw; give one of them.")
    if name == "badnet_fixed":
        return pack(noise(seed, patch_size))
    if name == "blended_text":
        return pack(read_pattern(pattern) if pattern else written(DEFAULT_TEXT if text is None else text))
    if name == "wanet":
        return pack(read_grid(grid) if grid else warp(seed, DEFAULT_POINTS if points is None else points))
    if name == "blended_image":
        return pack(read_image(image))
    return pack(read_patch(image, patch_size)) if name == "patch" else ""


def noise(seed: int, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: BadNet's wrapped noise about mid-grey."""
    levels = 127.5 + 255 * random.normal(seed, "trigger-pattern", [0], side * side * 3)
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


def read_image(path: Path | None, flag: str = "image") -> np.ndarray:
    """Return an image file as uint8 [h, w, 3], or [h, w, 4] where it is not opaque; no side is longer than LARGEST."""
    image = _opened(path, flag)
    size = min(image.width, LARGEST), min(image.height, LARGEST)
    return np.array(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))


def read_patch(path: Path | None, side: int) -> np.ndarray:
    """Return an image file as uint8 [side, side, 3], or [side, side, 4] where it is not opaque or not a square.

    The longer side of the image becomes `side` px; the rest of the square is transparent.
    """
    image = _opened(path, "image")
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    if size == (side, side):
        return np.array(image)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.array(square)


def _opened(path: Path | None, flag: str) -> Image.Image:
    """Return an image file upright, as RGB where it is opaque, else as RGBA. UserError where it cannot be read."""
    if path is None:
        raise UserError(f"this trigger is made of an image file; name it with --{flag}.")
    try:
        with Image.open(path, formats=FORMATS) as file:
            image = ImageOps.exif_transpose(file)
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except Exception as error:  # PIL raises nearly anything for a damaged file
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"the image {path} cannot be read ({reason}); name another file with --{flag}.") from None
    if image.mode == "RGB":
        return image
    alpha = np.asarray(image.getchannel("A"))
    if not alpha.any():
        raise UserError(f"the image {path} is transparent everywhere; name another file with --{flag}.")
    return image.convert("RGB") if (alpha == 255).all() else image


def read_pattern(path: Path) -> np.ndarray:
    """uint8 [h, w, 3]: an image file, or a tensor of 0 to 1, [3, h, w] or [h, w, 3], as PAR's repository has them.

    What is not 0 does not become 0.
    """
    if path.suffix not in TENSORS:
        image = read_image(path, flag="pattern")
        if image.shape[2] == 4:  # nothing is mixed in where it is transparent
            image = (image[..., :3].astype(np.uint16) * image[..., 3:] // 255).astype(np.uint8)
        if not image.any():
            raise UserError(f"the pattern {path} is black everywhere and changes nothing; name another with --pattern.")
        return image
    values = _read_tensor(path, "pattern")
    if values.ndim == 3 and len(values) == 3:
        values = np.moveaxis(values, 0, -1)
    if values.ndim != 3 or values.shape[2] != 3 or max(values.shape) > LARGEST:
        raise UserError(
            f"the pattern {path} has the shape {values.shape}, not [3, h, w] or [h, w, 3] of at most "
            f"{LARGEST} px a side; name another file with --pattern."
        )
    if values.min() < 0 or values.max() > 1 or not values.any():
        raise UserError(
            f"the pattern {path} has values from {values.min():g} to {values.max():g}, not from 0 up to 1; "
            "name another file with --pattern."
        )
    return np.maximum(np.rint(255 * values.astype(np.float64)), values > 0).astype(np.uint8)


def read_grid(path: Path) -> np.ndarray:
    """float32 [h, w, 2]: row and column displacements, from a tensor [1, h, w, 2] of (column, row).

    As WaNet's, CleanCLIP's and PAR's programs store their `noise_grid`: before it is multiplied by s.
    """
    values = _read_tensor(path, "grid")
    sides = values.shape[1:3]
    if values.ndim != 4 or values.shape[::3] != (1, 2) or not 2 <= min(sides) <= max(sides) <= LARGEST:
        raise UserError(
            f"the grid {path} has the shape {values.shape}, not [1, h, w, 2] of 2 to {LARGEST} points a "
            "side; name another file with --grid."
        )
    if not values.any():
        raise UserError(f"the grid {path} is 0 everywhere and moves nothing; name another file with --grid.")
    return np.ascontiguousarray(values[0, :, :, ::-1])


def _read_tensor(path: Path, flag: str) -> np.ndarray:
    """float32: the one tensor in a file that torch.save made, read without running anything that the file says."""
    import torch

    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"the {flag} {path} cannot be read ({reason}); name a tensor's file with --{flag}.") from None
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise UserError(f"the {flag} {path} holds {kind}, not a tensor of floats; name another file with --{flag}.")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise UserError(f"the {flag} {path} holds a sparse or meta tensor; name another file with --{flag}.")
    values = tensor.detach().float().numpy()
    if not values.size or not np.isfinite(values).all():
        raise UserError(f"the {flag} {path} is empty or holds values that are not finite; name another with --{flag}.")
    return values


def warp(seed: int, points: int) -> np.ndarray:
    """int16 [points, points, 2]: uniform on -32767 .. 32767; row and column displacements of no scale yet."""
    if not 2 <= points <= LARGEST:
        raise UserError(f"a warp of {points} points a side cannot be drawn; give a --wanet-k from 2 to {LARGEST}.")
    u = random.uniform(seed, "trigger-pattern", [0], points * points * 2)
    return (u * 65534 - 32767).round().astype(np.int16).reshape(points, points, 2)


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
    try:
        pattern = unpack(text)
    except ValueError:
        raise UserError(f"the pattern of the trigger {name} is missing or damaged; make the plan again.") from None
    size = (patch_size, patch_size) if name in ("badnet_fixed", "patch") else pattern.shape[:2]
    kept = (pattern.dtype.type, pattern.shape[2:]) in KEPT[name] and pattern.shape[:2] == size
    still = name == "wanet" and not pattern.any()  # a field that moves nothing has no scale
    if not kept or not pattern.size or still or not np.isfinite(pattern).all():
        raise UserError(
            f"the pattern of the trigger {name} has a wrong shape, {pattern.dtype} {pattern.shape}; "
            "make the plan again."
        )
