"""The kernels against the reference, bit for bit; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastbd.kernels import augment_reference as reference
from fastbd.kernels import augment_triton, views
from fastbd.kernels.augment import Ragged, render
from fastbd.kernels.views import View, operation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(37, 53), (16, 16), (61, 24), (5, 90), (1, 1)]
COSINE, SINE = int(65536 * np.cos(0.4)), int(65536 * np.sin(0.4))
OPERATIONS = {
    "nothing": operation(views.NONE),
    "posterize": operation(views.POSTERIZE, 0b11110000),
    "solarize": operation(views.SOLARIZE, 100),
    "invert": operation(views.SOLARIZE, 0),
    "brighter": operation(views.BRIGHTNESS, 1.37),
    "darker": operation(views.BRIGHTNESS, 0.21),
    "color": operation(views.COLOR, 0.43),
    "more color": operation(views.COLOR, 1.9),
    "grey": operation(views.COLOR, 0.0),
    "contrast": operation(views.CONTRAST, 1.83),
    "less contrast": operation(views.CONTRAST, 0.28),
    "sharper": operation(views.SHARPNESS, 1.72),
    "smoother": operation(views.SHARPNESS, 0.1),
    "equalize": operation(views.EQUALIZE),
    "autocontrast": operation(views.AUTOCONTRAST),
    "hue": operation(views.HUE, 219),
    "blur": operation(views.BLUR, *views.blur_args(np.array([1.63]))[0].tolist()),
    "blur less": operation(views.BLUR, *views.blur_args(np.array([0.4]))[0].tolist()),
    "rotate": operation(views.AFFINE, COSINE, SINE, -500_000, -SINE, COSINE, 300_000),
    "far away": operation(views.AFFINE, 65536, 0, 1 << 28, 0, 65536, 0),
}


def pictures(sizes: list[tuple[int, int]], seed: int = 0) -> list[torch.Tensor]:
    """Random, low-contrast, two-levelled, one-coloured and smooth images in turn, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    made = []
    for i, (height, width) in enumerate(sizes):
        shape = height, width, 3
        y, x, c = np.mgrid[:height, :width, :3]
        kinds = (rng.integers(0, 256, shape), rng.integers(90, 131, shape), 255 * rng.integers(0, 2, shape),
                 np.full(shape, rng.integers(256)), (5 * x + 3 * y * (c + 1)) % 256)  # fmt: skip
        made.append(torch.from_numpy(kinds[i % 5].astype(np.uint8)))
    return made


def assert_same(images: list[torch.Tensor], view: View, size: int, dtypes=(torch.uint8, torch.float32)) -> None:
    given = [image.to(DEVICE) for image in images]
    for dtype in dtypes:
        want = reference.render(images, view, size, dtype)
        got = augment_triton.render(Ragged.of(given), view, size, dtype)
        assert got.dtype == dtype and got.shape == want.shape and got.stride() == want.stride()
        assert torch.equal(got.cpu(), want), f"{dtype}: off by {(got.cpu().float() - want.float()).abs().max()}"
    for image, kept in zip(images, given, strict=True):
        assert torch.equal(image, kept.cpu()), "a source was changed"


@pytest.mark.parametrize("squash", [False, True], ids=["crop", "squash"])
@pytest.mark.parametrize("cubic", [True, False], ids=["cubic", "linear"])
def test_plain_views(cubic: bool, squash: bool) -> None:
    dtypes = (torch.uint8, torch.float32, torch.bfloat16)
    assert_same(pictures(SIZES), View(views.plain(np.array(SIZES), 16, squash).params, cubic), 16, dtypes)


@pytest.mark.parametrize("cubic", [True, False], ids=["cubic", "linear"])
def test_resize_is_pytorchs(cubic: bool) -> None:
    """Up and down, by whole numbers and others, to one pixel and from one; weights have ties at whole ratios."""
    sizes = [(8, 8), (1, 1), (2, 3), (4, 16), (16, 24), (40, 7), (9, 8), (8, 9), (33, 60), (5, 60)]
    images = pictures(sizes)
    params = views.plain(np.array(sizes), 8, squash=True).params
    got = augment_triton.render(Ragged.of([i.to(DEVICE) for i in images]), View(params, cubic), 8, torch.uint8).cpu()
    for image, ours in zip(images, got, strict=True):
        mode = "bicubic" if cubic else "bilinear"
        want = F.interpolate(image.permute(2, 0, 1)[None], (8, 8), mode=mode, antialias=True)[0].permute(1, 2, 0)
        assert torch.equal(ours, want), tuple(image.shape)


def test_boxes_windows_flips() -> None:
    params = views.plain(np.array(SIZES), 12).params
    params["box"][:4] = [(3, 7, 30, 40), (15, 15, 1, 1), (0, 20, 61, 4), (4, 0, 1, 90)]
    params["resized"][:4] = [(12, 12), (12, 31), (25, 12), (14, 19)]
    params["window"][:4] = [(0, 0), (0, 19), (13, 0), (1, 6)]
    params["flip"] = [1, 0, 1, 1, 1]
    for cubic in (True, False):
        assert_same(pictures(SIZES), View(params, cubic), 12)


def test_noise_and_erasing() -> None:
    params = views.plain(np.array(SIZES), 16).params
    amplitude = np.float32(0.2).view(np.int32)
    params["noise"] = [
        (amplitude, 17, -5),
        (0, 17, -5),
        (amplitude, -1, 1 << 30),
        (amplitude, 0, 0),
        (amplitude, 17, -5),
    ]
    params["erase"] = [(0, 0, 3, 3), (13, 13, 3, 3), (5, 2, 4, 4), (0, 0, 0, 0), (0, 0, 16, 16)]
    params["flip"] = [1, 0, 0, 1, 0]
    assert_same(pictures(SIZES), View(params), 16, (torch.float32, torch.bfloat16))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    """Before the resize on images of all kinds and sizes, and after it, where the images are square."""
    params = views.plain(np.array(SIZES), 9).params
    params["before"][:, 0] = OPERATIONS[name]
    params["after"][::2, 3] = OPERATIONS[name]
    assert_same(pictures(SIZES), View(params), 9, (torch.uint8,))


def test_operations_follow_one_another() -> None:
    """Each image draws others; the second is counted on what the first one left."""
    rng = np.random.default_rng(5)
    images = pictures([(int(h), int(w)) for h, w in rng.integers(1, 30, (24, 2))], seed=3)
    params = views.plain(np.array([image.shape[:2] for image in images]), 10).params
    made = np.array(list(OPERATIONS.values()))
    for name in ("before", "after"):
        params[name] = rng.choice(made, params[name].shape)
    params["flip"] = rng.integers(0, 2, len(params))
    assert_same(images, View(params), 10)


def test_addresses_need_not_be_aligned() -> None:
    """As in a decoder's buffer, where one image begins where the other ends."""
    images = pictures([(3, 5), (7, 3), (5, 5)])
    flat = torch.cat([image.flatten() for image in images]).to(DEVICE)
    starts = np.cumsum([0, *(image.numel() for image in images)])[:-1]
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    ragged = Ragged(flat.data_ptr() + starts, sizes, flat.device, flat)
    params = views.plain(sizes, 6).params
    params["before"][:, 0] = OPERATIONS["sharper"]
    got = render(ragged, View(params), 6)
    assert torch.equal(got.cpu(), reference.render(images, View(params), 6, torch.float32))


def test_one_image_is_the_same_in_any_batch() -> None:
    images, params = pictures(SIZES), views.plain(np.array(SIZES), 8).params
    params["before"][:, 1] = OPERATIONS["equalize"]
    ragged = Ragged.of([image.to(DEVICE) for image in images])
    whole = augment_triton.render(ragged, View(params), 8, torch.uint8)
    for i, image in enumerate(images):
        alone = augment_triton.render(Ragged.of([image.to(DEVICE)]), View(params[i : i + 1]), 8, torch.uint8)
        assert torch.equal(whole[i], alone[0])
