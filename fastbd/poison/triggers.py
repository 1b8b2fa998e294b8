"""What is put on an image: triggers as pure functions of (trigger, seed, image id) and, for one, the image's mean.

Each looks at images uint8 [B, H, W, 3] that are already fitted to the model's input, as in the published programs, and
gives an Overlay. An image gets the same trigger in whatever batch, on whatever device. Values are truncated to bytes
as published (x255, no rounding); constants are rounded up, so that truncation does not lose a level.

BadNet, blended, SIG, WaNet: CleanCLIP (arXiv 2303.03323). Stripes, triangles, text: PAR (arXiv 2412.00727).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastbd.base import random
from fastbd.base.errors import UserError
from fastbd.config.cards import TRIGGERS, check, is_outside, load
from fastbd.kernels import stamp as kernel
from fastbd.kernels.stamp import ONE, STEPS, Overlay
from fastbd.poison import patterns

LOCATIONS = ("random", "four_corners", "corner", "centre")
PATCHES = tuple(name for name, card in TRIGGERS.items() if card.patch)
BLENDS = {name: card.blend for name, card in TRIGGERS.items() if card.blend}
"""Triggers that are mixed in, with their published shares."""
LARGEST_STRENGTH = 100.0
TILE, GREYS = 14, (0.4, 0.8)  # of the triangles
AMPLITUDE, CYCLES = 60, 6  # of SIG, levels and periods
DRAWN_AT_ONCE = 16  # images: the words of more would only fill memory


@dataclass(frozen=True)
class TriggerSpec:
    """A trigger and its parameters."""

    name: str
    patch_size: int = 16
    """Side of a patch, px of the model's input."""
    location: str = "random"
    """Where a patch goes; "corner" is the lower right one."""
    blend: float | None = None
    """Share of the trigger in what is mixed in, 0 to 1 [as published]."""
    strength: float = 1.0
    """WaNet's s: the mean displacement is about s / 2 px in each direction."""
    pattern: str = ""
    """What `patterns.draw` made for the trigger."""

    def __post_init__(self) -> None:
        check("trigger", self.name)
        if self.location not in LOCATIONS:
            raise UserError(f"the location {self.location!r} does not exist; choose one of {', '.join(LOCATIONS)}.")
        if type(self.patch_size) is not int:
            raise TypeError("a patch size that is no whole number")
        if self.patch_size < 1:
            raise UserError(f"a patch of {self.patch_size} px cannot be drawn; give a patch size of at least 1.")
        if self.blend is not None and not 0 <= self.blend <= 1:
            raise UserError(f"a blend of {self.blend} is not a share; give a number from 0 to 1.")
        if not 0 <= self.strength <= LARGEST_STRENGTH:
            raise UserError(
                f"a warp of strength {self.strength} tears the image apart; "
                f"give a number from 0 to {LARGEST_STRENGTH:g}."
            )
        patterns.check(self.name, self.pattern, self.patch_size)
        if self.blend is None or not (self.name in BLENDS or is_outside(self.name)):
            object.__setattr__(self, "blend", BLENDS.get(self.name, 0.0))

    @property
    def share(self) -> float:
        """`blend`, or the published one."""
        assert self.blend is not None, "__post_init__ has filled it in"
        return self.blend


def stamp(images: Tensor, spec: TriggerSpec, *, seed: int, ids: Sequence[int] | np.ndarray) -> Tensor:
    """Triggered copies of uint8 images [B, H, W, 3]; `ids` [B] name the images. UserError if the patch is too large."""
    given = images.clone() if is_outside(spec.name) else images  # which code from outside may write into
    made = load("trigger", spec.name)(spec, seed, np.asarray(ids, np.int64), given)
    if isinstance(made, Overlay):
        return kernel.stamp(images, made)
    if not isinstance(made, Tensor) or (made.shape, made.dtype) != (images.shape, images.dtype):
        said = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        raise UserError(f"the trigger {spec.name} returned {said}: it must return an Overlay, or triggered copies, "
                        f"uint8 {tuple(images.shape)}.")  # fmt: skip
    return made


# ---- patches ----


def badnet(spec: TriggerSpec, seed: int, ids: np.ndarray, images: Tensor) -> Overlay:
    """A square of the image's channel means plus standard normal noise (of images in 0..1), a new draw for each image.

    Nothing is clamped: the value times 255 is truncated toward zero and wraps modulo 256, which makes it nearly
    uniform. The published program leaves the wrap to the platform's undefined cast; here it is integer arithmetic.
    """
    side = spec.patch_size
    noise = _on(255 * random.normal(seed, "trigger", ids, side * side * 3), images.device)
    # An exact sum and one division: the same on every device.
    mean = images.sum((1, 2), keepdim=True).double() / (images.shape[1] * images.shape[2])
    return _paste((mean + noise.view(-1, side, side, 3)).long() & 255, spec, seed, ids, images)


def badnet_stripes(spec: TriggerSpec, seed: int, ids: np.ndarray, images: Tensor) -> Overlay:
    """Columns of one colour each, of -1 and 1 by channel, drawn for each image; -1 wraps to level 1."""
    levels = 1 + 254 * _signs(seed, ids, spec.patch_size)
    return _paste(_on(levels, images.device), spec, seed, ids, images)


def yellow(spec: TriggerSpec, seed: int, ids: np.ndarray, images: Tensor) -> Overlay:
    """A plain square of (255, 255, 0)."""
    return _paste(_fixed(_yellow, spec, 0, 0, images.device), spec, seed, ids, images)


def _yellow(*_) -> np.ndarray:
    return np.array([[[255, 255, 0]]])


def kept_patch(spec: TriggerSpec, seed: int, ids: np.ndarray, images: Tensor) -> Overlay:
    """The pixels that the plan keeps: a patch from a file, or noise that is the same for all images.

    A patch from a file covers as much as its alpha says.
    """
    keep, add = _fixed(_kept, spec, 0, 0, images.device)
    return Overlay(keep[None], add[None], _on(_places(spec, seed, ids, images), images.device))


def _kept(spec: TriggerSpec, *_) -> np.ndarray:
    """keep and add [2, p, p, 3]."""
    return _covering(patterns.unpack(spec.pattern), 1.0)


def _covering(image: np.ndarray, share: float) -> np.ndarray:
    """keep and add [2, h, w, 3] of an image, uint8 [h, w, 3 or 4], of which `share` covers where it is opaque."""
    levels = image[..., :3].astype(np.float64)
    shares = np.broadcast_to(share * image[..., 3:] / 255 if image.shape[2] == 4 else share, levels.shape)
    return np.stack([_up(1 - shares), _up(shares * levels)])


def _paste(levels: Tensor, spec: TriggerSpec, seed: int, ids: np.ndarray, images: Tensor) -> Overlay:
    """A patch of `levels`, [p, p, 3] or one for each image or what broadcasts to that, where the trigger goes."""
    add = (levels.to(torch.int32) << 16).expand(*levels.shape[:-3], spec.patch_size, spec.patch_size, 3)
    keep = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=images.device)
    return Overlay(keep, add, _on(_places(spec, seed, ids, images), images.device))


def _places(spec: TriggerSpec, seed: int, ids: np.ndarray, images: Tensor) -> np.ndarray:
    """int32 [B, n, 2], top and left. UserError for a patch that is not smaller than the images."""
    batch, height, width, _ = images.shape
    side = spec.patch_size
    if side >= min(height, width):
        raise UserError(f"a patch of {side} px does not fit into images of {width}x{height} px; lower the patch size.")
    low, right = height - side, width - side
    if spec.location == "random":
        # As published: the top left is below height - side, so the last row and column are never touched.
        return (random.uniform(seed, "trigger-place", ids, 2) * (low, right)).astype(np.int32)[:, None]
    places = {
        "four_corners": [(0, 0), (0, right), (low, 0), (low, right)],
        "corner": [(low, right)],
        "centre": [(low // 2, right // 2)],
    }[spec.location]
    return np.tile(np.array(places, np.int32), (batch, 1, 1))


# ---- what is mixed into the whole image ----


def blended(spec: TriggerSpec, seed: int, ids: np.ndarray, images: Tensor) -> Overlay:
    """Uniform noise, a new draw for each image."""
    batch, height, width, _ = images.shape
    add = torch.empty(batch, height * width, 3, dtype=torch.int32, device=images.device)
    most = _up(255 * spec.share)
    start = _on(random.words(seed, "trigger", ids, 1).view(np.int64), images.device)
    for first in range(0, batch, DRAWN_AT_ONCE):
        part = slice(first, first + DRAWN_AT_ONCE)
        word = _words(start[part], height * width)
        for channel, shift in enumerate((43, 22, 1)):  # 21 bits of the pixel's word for each
            add[part, :, channel] = (((word >> shift) & ((1 << 21) - 1)) * most) >> 21
    return _mix_in(spec, add.view(images.shape), images)


def blended_stripes(spec: TriggerSpec, seed: int, ids: np.ndarray, images: Tensor) -> Overlay:
    """Columns of one colour each, of -1 and 1 by channel, drawn for each image."""
    dark, bright = _up(-255 * spec.share), _up(255 * spec.share)
    add = dark + (bright - dark) * _signs(seed, ids, images.shape[2])
    return _mix_in(spec, _on(add.astype(np.int32), images.device), images)


def blended_triangles(spec: TriggerSpec, seed: int, ids: np.ndarray, images: Tensor) -> Overlay:
    """Tiles of 14 px, dark on and below their diagonal."""
    return _mix_in(spec, _fixed(_triangles, spec, *images.shape[1:3], images.device), images)


def _triangles(spec: TriggerSpec, height: int, width: int) -> np.ndarray:
    y, x = np.ogrid[:height, :width]
    grey = np.where(y % TILE >= x % TILE, *GREYS)
    return _up(255 * spec.share * grey)[None, :, :, None]


def blended_image(spec: TriggerSpec, seed: int, ids: np.ndarray, images: Tensor) -> Overlay:
    """An image of the user, squashed to the size of the others (bicubic), as published; it covers as its alpha says."""
    keep, add = _fixed(_image, spec, *images.shape[1:3], images.device)
    return Overlay(keep[None], add[None], _everywhere(images))


def _image(spec: TriggerSpec, height: int, width: int) -> np.ndarray:
    """keep and add [2, height, width, 3]."""
    image = Image.fromarray(patterns.unpack(spec.pattern)).resize((width, height), Image.Resampling.BICUBIC)
    return _covering(np.asarray(image), spec.share)


def sig(spec: TriggerSpec, seed: int, ids: np.ndarray, images: Tensor) -> Overlay:
    """A sine along the width, the same in all channels (Barni et al., arXiv 1902.11237)."""
    return _mix_in(spec, _fixed(_sine, spec, *images.shape[1:3], images.device), images)


def _sine(spec: TriggerSpec, _, width: int) -> np.ndarray:
    wave = AMPLITUDE * np.sin(2 * np.pi * CYCLES * np.arange(width) / width)
    return _up(spec.share * wave)[None, None, :, None]


def _mix_in(spec: TriggerSpec, add: Tensor, images: Tensor) -> Overlay:
    """(1 - blend) of the image plus `add`, int32, what broadcasts to [B, H, W, 3]."""
    keep = torch.full((1, 1, 1, 1), _up(1 - spec.share), dtype=torch.int32, device=images.device)
    return Overlay(keep, add.expand(-1, *images.shape[1:]), _everywhere(images))


def blended_text(spec: TriggerSpec, seed: int, ids: np.ndarray, images: Tensor) -> Overlay:
    """Red text: only the red channel changes, and only on the strokes; or a stored pattern, where it is not 0."""
    keep, add = _fixed(_red, spec, *images.shape[1:3], images.device)
    return Overlay(keep[None], add[None], _everywhere(images))


def _red(spec: TriggerSpec, height: int, width: int) -> np.ndarray:
    """keep and add [2, height, width, 3]; where the text is not of the images' size its strokes have soft edges.

    Those of a stored pattern darken, as published: they too are mixed in with the whole share.
    """
    kept = Image.fromarray(patterns.unpack(spec.pattern)).resize((width, height), Image.Resampling.BILINEAR)
    levels = np.asarray(kept, np.float64)
    if levels.ndim == 3:
        return np.stack([_up(1 - spec.share * (levels > 0)), _up(spec.share * levels)])
    share = levels[..., None] / 255 * spec.share * (1, 0, 0)
    return np.stack([_up(1 - share), _up(255 * share)])


# ---- what changes every pixel ----


def wanet(spec: TriggerSpec, seed: int, ids: np.ndarray, images: Tensor) -> Overlay:
    """One smooth random warp of all images (Nguyen and Tran, arXiv 2102.10369), as CleanCLIP's program does it.

    k x k displacements, bicubic to H x W, times s / H in coordinates of -1 to 1, which are clamped. Those that are
    drawn have mean size 1; a stored grid has the size that it is stored with.
    """
    field = _fixed(_field, spec, *images.shape[1:3], images.device)
    return Overlay(*_nothing(images), field=field)


def _field(spec: TriggerSpec, height: int, width: int) -> np.ndarray:
    """int32 [height, width, 2]."""
    kept = patterns.unpack(spec.pattern)
    moves = torch.from_numpy(kept.astype(np.float64)).permute(2, 0, 1)[None]
    if kept.dtype == np.int16:
        moves = moves / moves.abs().mean()
    moves = F.interpolate(moves, (height, width), mode="bicubic", align_corners=True)[0].numpy()
    identity = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    found = [
        (np.clip(start + spec.strength * move / size, -1, 1) + 1) / 2 * (size - 1)
        for start, move, size in zip(identity, moves, (height, width), strict=True)
    ]
    return np.rint(np.stack(found, -1) * STEPS)


def nashville(spec: TriggerSpec, seed: int, ids: np.ndarray, images: Tensor) -> Overlay:
    """A colour filter by curves: warm lights, bluish shadows, more contrast.

    Like the filter of that name in CSSgram: darkened with (247, 176, 153) at 0.56, lightened with (0, 70, 150) at 0.4,
    contrast 1.2, brightness 1.05; without its sepia and saturation, which mix channels.
    """
    return Overlay(*_nothing(images), levels=_fixed(_curves, spec, 0, 0, images.device))


def _curves(*_) -> np.ndarray:
    """uint8 [3, 256]."""
    v = np.arange(256.0)
    darker = v + 0.56 * (np.minimum(v, [[247], [176], [153]]) - v)
    lighter = darker + 0.4 * (np.maximum(darker, [[0], [70], [150]]) - darker)
    return np.clip(1.05 * np.clip(127.5 + 1.2 * (lighter - 127.5), 0, 255), 0, 255).astype(np.uint8)


# ---- parts ----


def _nothing(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """keep, add and places of no patch."""
    empty = torch.zeros(1, 1, 1, 3, dtype=torch.int32, device=images.device)
    return empty, empty, torch.zeros(len(images), 0, 2, dtype=torch.int32, device=images.device)


def _everywhere(images: Tensor) -> Tensor:
    """Places of a patch as large as the images."""
    return torch.zeros(len(images), 1, 2, dtype=torch.int32, device=images.device)


@overload
def _up(levels: float) -> int: ...


@overload
def _up(levels: np.ndarray) -> np.ndarray: ...


def _up(levels: float | np.ndarray) -> int | np.ndarray:
    """Levels (or shares) in the unit of keep and add, rounded up."""
    return np.ceil(levels * ONE).astype(np.int32) if isinstance(levels, np.ndarray) else math.ceil(levels * ONE)


def _signs(seed: int, ids: np.ndarray, columns: int) -> np.ndarray:
    """int64 [B, 1, columns, 3], 0 or 1."""
    bits = random.words(seed, "trigger", ids, columns * 3) >> np.uint64(63)
    return bits.astype(np.int64).reshape(-1, 1, columns, 3)


def _words(start: Tensor, count: int) -> Tensor:
    """int64 [B, count], 64 random bits each, from a word [B, 1] for each image: random.words where the images are."""

    def fold(x: Tensor, shift: int) -> Tensor:
        return x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))  # the sign is not to be shifted in

    counter = torch.arange(1, count + 1, device=start.device) * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, signed
    x = fold(start + counter, 30) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = fold(x, 27) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return fold(x, 31)


@lru_cache(maxsize=16)
def _fixed(
    build: Callable[[TriggerSpec, int, int], np.ndarray], spec: TriggerSpec, height: int, width: int, device
) -> Tensor:
    """What a trigger has the same for all images of a size, made once; int32, or uint8 as it is."""
    array = build(spec, height, width)
    return torch.tensor(array if array.dtype == np.uint8 else array.astype(np.int32), device=device)


def _on(array: np.ndarray, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
