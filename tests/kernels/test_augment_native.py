"""The compiled views against the reference, bit for bit, by each way that the processor has."""

from __future__ import annotations

import ctypes
import io
import itertools
import mmap
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import numpy as np
import pytest
import torch
from PIL import Image

from bench.pictures import photographs
from fastbd.base import random
from fastbd.kernels import augment_native as native
from fastbd.kernels import augment_reference as reference
from fastbd.kernels import native as libraries
from fastbd.kernels import views
from fastbd.kernels.augment import render
from fastbd.kernels.constants import normalisation
from fastbd.kernels.policies import POLICIES
from fastbd.kernels.views import View, operation

pytestmark = pytest.mark.skipif(not native.ways(), reason="the library of views is not compiled")

SIZES = [(23, 31), (16, 16), (29, 13), (3, 45), (1, 1), (1, 50), (60, 1), (2, 2), (7, 5), (40, 37)]
COSINE, SINE = int(65536 * np.cos(0.4)), int(65536 * np.sin(0.4))


def blur(sigma: float) -> np.ndarray:
    return operation(views.BLUR, *views.blur_args(np.array([sigma]))[0].tolist())


OPERATIONS = {
    "nothing": operation(views.NONE),
    "posterize": operation(views.POSTERIZE, 0b11110000),
    "solarize": operation(views.SOLARIZE, 100),
    "invert": operation(views.SOLARIZE, 0),
    "solarize nothing": operation(views.SOLARIZE, 256),
    "brighter": operation(views.BRIGHTNESS, 1.37),
    "far too bright": operation(views.BRIGHTNESS, 1e30),
    "color": operation(views.COLOR, 0.43),
    "far from grey": operation(views.COLOR, -77.0),
    "grey": operation(views.COLOR, 0.0),
    "contrast": operation(views.CONTRAST, 1.83),
    "contrast turned": operation(views.CONTRAST, -0.28),
    "sharper": operation(views.SHARPNESS, 1.72),
    "far too sharp": operation(views.SHARPNESS, -1e30),
    "smoother": operation(views.SHARPNESS, 0.1),
    "equalize": operation(views.EQUALIZE),
    "autocontrast": operation(views.AUTOCONTRAST),
    "hue": operation(views.HUE, 219),
    "blur": blur(1.63),
    "blur less": blur(0.4),
    "blur to nothing": blur(30.0),
    "rotate": operation(views.AFFINE, COSINE, SINE, -500_000, -SINE, COSINE, 300_000),
    "far away": operation(views.AFFINE, 65536, 0, 1 << 28, 0, 65536, 0),
    "around": operation(views.AFFINE, 1 << 30, 12345, -(1 << 31), 1 << 29, 65536, (1 << 31) - 1),  # places wrap
    "of another version": operation(99),
}


def pictures(sizes: list[tuple[int, int]], seed: int = 0) -> list[torch.Tensor]:
    """Random, low-contrast, two-levelled, one-coloured and smooth images in turn, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    made = []
    for i, (height, width) in enumerate(sizes):
        shape = height, width, 3
        y, x, c = np.mgrid[:height, :width, :3]
        kinds = (
            rng.integers(0, 256, shape),
            rng.integers(90, 131, shape),
            255 * rng.integers(0, 2, shape),
            np.full(shape, rng.integers(256)),
            (5 * x + 3 * y * (c + 1)) % 256,
        )
        made.append(torch.from_numpy(kinds[i % 5].astype(np.uint8)))
    return made


@cache
def photos(count: int) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(Image.open(io.BytesIO(file.tobytes())))) for file in photographs(count)]


def drawn(policy: str, images: list[torch.Tensor], size: int) -> View:
    sizes = np.array([image.shape[:2] for image in images])
    if policy == "plain":
        return views.plain(sizes, size)
    draw, count = POLICIES[policy]
    return draw(random.uniform(7, policy, np.arange(len(images)), count), sizes, size)


def assert_same(images: list[torch.Tensor], view: View, size: int, *dtypes: torch.dtype) -> None:
    before = [image.clone() for image in images]
    for dtype in dtypes:
        want = reference.render(images, view, size, dtype)
        for way in native.ways():
            got = native.render(images, view, size, dtype, way=way)
            assert got.dtype == dtype and got.shape == want.shape and got.stride() == want.stride()
            off = (got.float() - want.float()).abs().flatten(1).amax(1)
            assert torch.equal(got, want), f"{way}, {dtype}: images are off by {off.tolist()}"
    assert all(map(torch.equal, images, before)), "a source was changed"


@pytest.mark.parametrize("policy", ["plain", *POLICIES])
def test_policies_on_photographs(policy: str) -> None:
    images = photos(6)
    assert_same(images, drawn(policy, images, 224), 224, torch.float32)
    assert_same(images[:2], drawn(policy, images[:2], 224), 224, torch.bfloat16, torch.uint8)


@pytest.mark.parametrize("size", [1, 12, 33])
@pytest.mark.parametrize("policy", ["plain", *POLICIES])
def test_policies_on_small_images(policy: str, size: int) -> None:
    images = pictures(3 * SIZES)
    assert_same(images, drawn(policy, images, size), size, torch.float32)
    assert_same(images, drawn(policy, images, size), size, torch.bfloat16)


PAIRS = list(itertools.product(OPERATIONS, OPERATIONS))


@pytest.mark.parametrize("place", ["before", "after"])
def test_every_operation_after_every_other(place: str) -> None:
    """By turns on images of any size, ten pairs at once."""
    for start in range(0, len(PAIRS), len(SIZES)):
        pairs = PAIRS[start : start + len(SIZES)]
        turn = start // len(SIZES)
        images = pictures([SIZES[(i + turn) % len(SIZES)] for i in range(len(pairs))], turn)
        view = drawn("plain", images, 14)
        for i, pair in enumerate(pairs):
            view.params[place][i, :2] = [OPERATIONS[name] for name in pair]
        view.params["flip"] = turn % 2
        assert_same(images, view, 14, torch.uint8)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_on_a_photograph(name: str) -> None:
    """Of which the last columns are not read by the view, and others are."""
    images = [photos(6)[0], photos(6)[1]]
    view = drawn("plain", images, 150)
    view.params["before"][:, 0] = OPERATIONS[name]
    assert_same(images, view, 150, torch.uint8)


@pytest.mark.parametrize("cubic", [True, False], ids=["cubic", "linear"])
def test_resize_of_many_sizes(cubic: bool) -> None:
    """Up and down, by whole numbers and others, from one pixel, slender ones, and far larger ones."""
    rng = np.random.default_rng(3)
    sizes = [(8, 8), (1, 1), (2, 3), (4, 16), (16, 24), (40, 7), (9, 8), (8, 9), (33, 60), (5, 600), (900, 3)]
    sizes += [(1500, 8), (31, 2000)] + rng.integers(1, 90, (60, 2)).tolist()
    for size in (8, 37):
        images = pictures(sizes, size)
        params = views.plain(np.array(sizes), size, squash=True).params
        assert_same(images, View(params, cubic), size, torch.uint8)


@pytest.mark.parametrize("cubic", [True, False], ids=["cubic", "linear"])
def test_boxes_windows_flips(cubic: bool) -> None:
    sizes = [(23, 31), (16, 16), (29, 13), (3, 45), (20, 20), (12, 12), (12, 40)]
    params = views.plain(np.array(sizes), 12).params
    params["box"][:5] = [(3, 7, 18, 20), (15, 15, 1, 1), (0, 9, 29, 4), (2, 0, 1, 45), (1, 2, 17, 15)]
    params["resized"][:5] = [(12, 12), (12, 31), (25, 12), (14, 19), (17, 15)]
    params["window"][:5] = [(5, 5), (0, 19), (13, 0), (2, 7), (5, 3)]  # at the edges, and idle for the first one
    for flip in (0, 1):
        params["flip"] = flip
        assert_same(pictures(sizes), View(params, cubic), 12, torch.uint8, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noise_and_erasing(dtype: torch.dtype) -> None:
    sizes = [(20, 31), (16, 16), (17, 17), (9, 40)]
    params = views.plain(np.array(sizes), 16).params
    for i, amplitude in enumerate((0.2, 1.0, 0.0, 1e-3)):
        params["noise"][i] = np.float32(amplitude).view(np.int32), 0x12345678 + i, -77 * i
    params["erase"] = [(2, 3, 5, 7), (0, 0, 16, 16), (15, 15, 9, 9), (4, 4, 0, 3)]  # the third reaches over the edge
    params["flip"] = [0, 1, 0, 1]
    assert_same(pictures(sizes), View(params), 16, dtype)


def test_nothing_behind_an_image_is_read() -> None:
    """Each ends where its page does; the next page is forbidden, so that a read of it would end the process."""
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    memory = np.frombuffer(pages, np.uint8)
    forbidden = ctypes.c_void_p(memory.ctypes.data + mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(forbidden, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    for height, width in ((1, 1), (1, 13), (13, 1), (3, 5), (30, 45), (17, 21)):
        image = torch.from_numpy(memory[mmap.PAGESIZE - 3 * height * width : mmap.PAGESIZE].reshape(height, width, 3))
        for operation_, way in itertools.product(OPERATIONS.values(), native.ways()):
            view = drawn("plain", [image], 9)
            view.params["before"][:, 0] = operation_
            native.render([image], view, 9, torch.float32, way=way)


def test_what_is_given_out_is_written_in_place() -> None:
    images = pictures(SIZES)
    view, out = drawn("plain", images, 10), torch.full((len(SIZES) + 2, 10, 10, 3), 5.0)
    made = render(images, view, 10, out=out[1:-1])
    assert made.data_ptr() == out[1].data_ptr()
    assert torch.equal(made, reference.render(images, view, 10, torch.float32))
    assert bool((out[0] == 5).all() and (out[-1] == 5).all())
    for wrong in (out, out[1:-1].double(), out[1:-1].transpose(1, 2)):
        with pytest.raises(ValueError, match="out must be"):
            native.render(images, view, 10, torch.float32, wrong)


def test_images_that_are_not_contiguous_are_copied() -> None:
    images = [image.transpose(0, 1)[::2] for image in pictures(SIZES)]
    assert_same(images, drawn("auto_augment", images, 10), 10, torch.float32)


@pytest.mark.parametrize(
    "field, value",
    [
        ("box", (0, 0, 21, 30)),
        ("box", (-1, 0, 5, 5)),
        ("box", (3, 3, 0, 4)),
        ("box", (0, 29, 5, 2)),
        ("resized", (9, 40)),
        ("window", (-1, 0)),
        ("window", (0, 6)),
        ("before", operation(views.BLUR, -1, 1, 1)),
    ],
)
def test_a_view_that_leaves_its_image_is_an_error(field: str, value) -> None:
    images = pictures([(20, 30), (20, 30)])
    view = drawn("plain", images, 10)
    view.params[field][1] = value
    with pytest.raises(ValueError, match="leaves its image of .20, 30. px"):
        native.render(images, view, 10, torch.uint8)
    native.render(images[:1], view[:1], 10, torch.uint8)


def test_a_huge_image() -> None:
    """Larger than what a thread keeps for the next one."""
    huge = torch.arange(3001 * 4003 * 3, dtype=torch.int32).to(torch.uint8).view(3001, 4003, 3)
    view = drawn("plain", [huge], 32)
    view.params["before"][0, 0] = OPERATIONS["brighter"]
    assert_same([huge], view, 32, torch.uint8)


def test_threads_at_once_make_the_same_views() -> None:
    images = photos(6)
    view = drawn("auto_augment", images, 224)
    want = reference.render(images, view, 224, torch.float32)
    with ThreadPoolExecutor(4) as pool:
        for made in pool.map(lambda _: render(images, view, 224), range(8)):
            assert torch.equal(made, want)


def test_threads_that_come_first_share_tables_that_stay() -> None:
    """Each of several threads that find no table makes one, of which one is kept: the others' must live as long."""
    images = photos(1)
    view = drawn("plain", images, 64)
    want = reference.render(images, view, 64, torch.float32)

    def first(threads: Barrier) -> torch.Tensor:
        threads.wait()
        return render(images, view, 64)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(40):
            normalisation.cache_clear()
            assert all(torch.equal(made, want) for made in pool.map(first, 4 * [Barrier(4)]))


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "OFFSETS", views.OFFSETS | {"erase": views.OFFSETS["erase"] + 4})
    native.library.cache_clear()
    with pytest.raises(RuntimeError, match="install fastbd again"):
        native.ways()
    native.library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_types_go_through_the_reference(dtype: torch.dtype) -> None:
    images = pictures(SIZES)
    view = drawn("light", images, 10)
    assert not native.takes(dtype)
    assert torch.equal(render(images, view, 10, dtype), reference.render(images, view, 10, dtype))


def test_without_the_library_the_reference_makes_views(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(SIZES)
    view = drawn("auto_augment", images, 10)
    with monkeypatch.context() as patched:
        patched.setenv("FASTBD_NATIVE", "0")
        libraries.library.cache_clear()
        native.library.cache_clear()
        assert native.ways() == () and not native.takes(torch.float32)
        made = render(images, view, 10, torch.uint8)
    libraries.library.cache_clear()
    native.library.cache_clear()
    assert native.ways() and native.takes(torch.float32)
    assert torch.equal(made, render(images, view, 10, torch.uint8))
