"""Overlays by hand, and the kernel against the reference: the same bytes for every trigger and shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tables import table

from fastbd.config.cards import load
from fastbd.kernels.stamp import ONE, STEPS, Overlay, stamp, stamp_reference
from fastbd.kernels.stamp_triton import stamp_triton
from fastbd.poison import patterns, triggers
from fastbd.poison.triggers import LOCATIONS, PATCHES, TRIGGERS, TriggerSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = (stamp_reference, stamp_triton)


def noisy(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, height, width, 3), np.uint8)).to(DEVICE)


def ints(*values, shape=None) -> torch.Tensor:
    tensor = torch.tensor(values, dtype=torch.int32, device=DEVICE)
    return tensor if shape is None else tensor.view(shape)


def nothing(count: int) -> dict:
    """An overlay without patches."""
    return dict(
        keep=ints(0, shape=(1, 1, 1, 1)),
        add=ints(0, 0, 0, shape=(1, 1, 1, 3)),
        places=torch.zeros(count, 0, 2, dtype=torch.int32, device=DEVICE),
    )


@pytest.mark.parametrize("way", WAYS)
def test_keep_and_add_are_clamped_and_shifted(way) -> None:
    levels = torch.tensor([0, 1, 100, 254, 255], dtype=torch.uint8, device=DEVICE).view(1, 1, 5, 1).expand(1, 1, 5, 3)
    add = ints(0, -1, 60 * ONE + 1, shape=(1, 1, 1, 3)).expand(1, 1, 5, 3)
    overlay = Overlay(ints(ONE, ONE, ONE // 2, shape=(1, 1, 1, 3)), add, ints(0, 0, shape=(1, 1, 2)))
    red, green, blue = way(levels.contiguous(), overlay)[0, 0].T.tolist()
    assert red == [0, 1, 100, 254, 255]
    assert green == [0, 0, 99, 253, 254]  # floor, then clamp
    assert blue == [60, 60, 110, 187, 187]
    bright = Overlay(ints(ONE, shape=(1, 1, 1, 1)), 255 * ONE + 0 * add, ints(0, 0, shape=(1, 1, 2)))
    assert (way(levels.contiguous(), bright) == 255).all()


@pytest.mark.parametrize("way", WAYS)
def test_patches_go_to_the_places_of_their_image_and_touch_borders(way) -> None:
    images = noisy(2, 5, 6)
    add = ONE * torch.arange(2 * 2 * 3 * 3, dtype=torch.int32, device=DEVICE).view(2, 2, 3, 3)
    places = ints([[0, 0], [3, 3]], [[0, 3], [2, 1]])
    out = way(images, Overlay(ints(0, shape=(1, 1, 1, 1)), add, places))
    expected = images.clone()
    for b, (first, second) in enumerate(places.tolist()):
        for top, left in (first, second):
            expected[b, top : top + 2, left : left + 3] = add[b] // ONE
    assert torch.equal(out, expected)


@pytest.mark.parametrize("way", WAYS)
def test_the_table_comes_before_the_patch(way) -> None:
    images = noisy(1, 3, 4)
    levels = torch.stack([torch.arange(255, -1, -1), torch.arange(256) // 2, torch.full((256,), 7)]).to(torch.uint8)
    half = dict(keep=ints(ONE // 2, shape=(1, 1, 1, 1)), add=ints(0, 0, 0, shape=(1, 1, 1, 3)).expand(1, 3, 4, 3))
    overlay = Overlay(**half, places=ints(0, 0, shape=(1, 1, 2)), levels=levels.to(DEVICE))
    r, g, _ = images.int().unbind(-1)
    expected = torch.stack([(255 - r) // 2, g // 2 // 2, torch.full_like(r, 3)], -1)
    assert torch.equal(way(images, overlay).int(), expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_field_moves_pixels_and_is_black_outside(way) -> None:
    images = noisy(2, 4, 5)
    y, x = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")

    def moved(down: float, across: float) -> torch.Tensor:
        field = torch.stack([(y + down) * STEPS, (x + across) * STEPS], -1).round().int().to(DEVICE)
        return way(images, Overlay(**nothing(2), field=field))

    assert torch.equal(moved(0, 0), images)
    down = moved(1, -2)
    assert torch.equal(down[:, :3, 2:], images[:, 1:, :3])
    assert not down[:, 3].any() and not down[:, :, :2].any()
    assert not moved(-9, 0).any() and not moved(0, 1e5).any()
    wide = images.int()
    assert torch.equal(moved(0, 0.5)[:, :, :4].int(), (wide[:, :, :4] + wide[:, :, 1:]) // 2)
    assert torch.equal(moved(0, 0.5)[:, :, 4].int(), wide[:, :, 4] // 2)  # half of it is outside


def spec_of(name: str, location: str = "random") -> TriggerSpec:
    """A trigger of the sizes that suit images of a few pixels."""
    size = 6
    pattern = {
        "wanet": lambda: patterns.warp(0, 5),
        "patch": lambda: noisy(1, size, size, 2)[0].cpu().numpy(),
        "badnet_fixed": lambda: patterns.noise(0, size),
        "blended_image": lambda: np.asarray(Image.fromarray(noisy(1, 9, 8, 2)[0].cpu().numpy())),
        "blended_text": lambda: patterns.written("text"),
    }
    packed = patterns.pack(pattern[name]()) if name in pattern else ""
    return TriggerSpec(name, patch_size=size, location=location, strength=20.0, pattern=packed)


SHAPES = [((1, 7, 7),), ((3, 17, 23),), ((2, 33, 16),), ((0, 8, 8),)]
CASES = [(name, "random") for name in TRIGGERS] + [(name, place) for name in PATCHES for place in LOCATIONS[1:]]


@pytest.mark.parametrize("shape", table(SHAPES, ((3, 17, 23),)), ids=str)
@pytest.mark.parametrize(("name", "location"), CASES, ids="-".join)
def test_the_kernel_gives_the_bytes_of_the_reference(name: str, location: str, shape: tuple) -> None:
    images, spec, ids = noisy(*shape), spec_of(name, location), np.arange(shape[0])
    before = images.clone()
    overlay = load("trigger", name)(spec, 3, ids, images)
    out = stamp_triton(images, overlay)
    assert torch.equal(out, stamp_reference(images, overlay)) and torch.equal(images, before)
    on_cpu = stamp_reference(images.cpu(), load("trigger", name)(spec, 3, ids, images.cpu()))
    assert torch.equal(stamp(images, overlay).cpu(), on_cpu)


def test_images_that_are_not_contiguous() -> None:
    images = noisy(4, 9, 24)[::2, :, 3:17]
    overlay = load("trigger", "sig")(spec_of("sig"), 0, np.arange(2), images)
    assert torch.equal(stamp_triton(images, overlay), stamp_reference(images, overlay))


@pytest.mark.gpu("too large for the interpreter")
@pytest.mark.parametrize("name", TRIGGERS)
def test_real_sizes(name: str) -> None:
    """Batches past 2^31 values need 64-bit offsets."""
    for count, size in ((300, 224), (65, 336), (15_000, 224)):
        images, ids = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, device=DEVICE), np.arange(count)
        out = load("trigger", name)(spec_of(name), 0, ids, images)
        out = stamp_triton(images, out)
        for part in (slice(0, 20), slice(count - 20, count)):
            some = images[part].cpu()
            expected = stamp_reference(some, load("trigger", name)(spec_of(name), 0, ids[part], some))
            assert torch.equal(out[part].cpu(), expected)


@pytest.mark.gpu(count=2)
def test_images_may_lie_on_another_gpu_than_the_threads():
    images, ids, yellow = noisy(3, 32, 32), np.arange(3), TriggerSpec("yellow")
    here, there = (triggers.stamp(images.to(device), yellow, seed=0, ids=ids).cpu() for device in ("cpu", "cuda:1"))
    assert torch.equal(here, there)
