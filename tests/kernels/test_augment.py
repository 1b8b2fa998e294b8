"""Pillow is the truth: every operation byte for byte, resizing within a level; then whole views, step by step."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from tables import table

from fastbd.base import random
from fastbd.kernels import augment_reference, policies, views
from fastbd.kernels.augment import normalise, render
from fastbd.kernels.constants import CLIP_MEAN, CLIP_STD
from fastbd.kernels.policies import OPERATIONS, SUB_POLICIES


def _affine(*matrix: float):
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, matrix)


# torchvision's operations on Pillow's images, by signed magnitude. It shears about the top left corner.
PILLOW = {
    "Identity": lambda image, _: image,
    "ShearX": lambda image, m: _affine(1, math.tan(math.atan(m)), 0, 0, 1, 0)(image),
    "ShearY": lambda image, m: _affine(1, 0, 0, math.tan(math.atan(m)), 1, 0)(image),
    "TranslateX": lambda image, m: _affine(1, 0, -int(m), 0, 1, 0)(image),
    "TranslateY": lambda image, m: _affine(1, 0, 0, 0, 1, -int(m))(image),
    "Rotate": lambda image, degrees: image.rotate(degrees),
    "Brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(1 + m),
    "Color": lambda image, m: ImageEnhance.Color(image).enhance(1 + m),
    "Contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(1 + m),
    "Sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + m),
    "Posterize": lambda image, bits: ImageOps.posterize(image, round(bits)),
    "Solarize": ImageOps.solarize,
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Invert": lambda image, _: ImageOps.invert(image),
}


def samples(height: int, width: int) -> np.ndarray:
    """Random, smooth, low-contrast, one-coloured and two-levelled images, uint8 [5, H, W, 3]."""
    rng = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[:height, :width]
    smooth = [x * 200 / width + 20, y * 150 / height + 60, (x + y) * 90 / (height + width) + 100]
    shape = height, width, 3
    images = [
        rng.integers(0, 256, shape),
        np.stack(smooth, -1),
        rng.integers(90, 130, shape),
        np.full(shape, 77),
        255 * rng.integers(0, 2, shape),
    ]
    return np.stack(images).astype(np.uint8)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Soft shapes with some grain, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3)).astype(np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
    return (soft + rng.integers(-8, 9, soft.shape)).clip(0, 255).astype(np.uint8)


def operate(image: np.ndarray, operation: np.ndarray) -> np.ndarray:
    before = image.copy()
    made = augment_reference.operate(torch.from_numpy(image), operation)
    np.testing.assert_array_equal(image, before, err_msg="changed in place")
    assert made.dtype == torch.uint8
    return made.numpy()


# The operations.


@pytest.mark.parametrize(
    "height, width", table([(64, 64), (37, 53), (61, 130), (2, 5), (5, 2), (1, 1)], (37, 53), (2, 5), (1, 1))
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_gives_pillows_bytes(name: str, height: int, width: int) -> None:
    operation, sizes = OPERATIONS[name], np.array([(height, width)])
    every = {(b, 10) for b in range(10)} | {(b, 31) for b in range(31 if height == 37 else 0)}
    magnitudes = {operation.magnitudes(b, bins, sizes).item() for b, bins in every}
    for magnitude in magnitudes | {-m for m in magnitudes if operation.signed}:
        encoded = operation.encode(np.array([magnitude]), sizes)[0]
        for image in samples(height, width):
            theirs = np.asarray(PILLOW[name](Image.fromarray(image), magnitude))
            np.testing.assert_array_equal(operate(image, encoded), theirs, err_msg=f"{name} {magnitude}")


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"])
def test_geometry_is_pillows_at_any_size(name: str) -> None:
    """Rounding of the fixed point hangs on the size, so that many are tried; only white images show the border."""
    rng = np.random.default_rng(4)
    operation = OPERATIONS[name]
    for size in rng.integers(1, 400, (40, 2)):
        image = rng.integers(1, 256, (*size, 3)).astype(np.uint8)
        magnitude = operation.magnitudes(rng.integers(10, size=1), 10, size[None]) * rng.choice([-1, 1])
        theirs = np.asarray(PILLOW[name](Image.fromarray(image), magnitude.item()))
        ours = operate(image, operation.encode(magnitude, size[None])[0])
        np.testing.assert_array_equal(ours, theirs, err_msg=f"{size} {magnitude}")


@pytest.mark.parametrize("name", ["Brightness", "Color", "Contrast", "Sharpness"])
def test_any_factor_gives_pillows_bytes(name: str) -> None:
    rng = np.random.default_rng(5)
    for magnitude in (*rng.uniform(-1, 1, 40), -1.0):  # factor 0 of Color is SimCLR's greyscale
        encoded = OPERATIONS[name].encode(np.array([magnitude]), np.array([[23, 31]]))[0]
        for image in samples(23, 31):
            theirs = np.asarray(PILLOW[name](Image.fromarray(image), magnitude))
            np.testing.assert_array_equal(operate(image, encoded), theirs, err_msg=f"{name} {magnitude}")


def shift_hue(image: Image.Image, shift: int) -> Image.Image:
    """torchvision's adjust_hue: Pillow's HSV in bytes, the hue wrapping around."""
    hue, saturation, value = image.convert("HSV").split()
    hue = Image.fromarray(np.asarray(hue) + np.uint8(shift))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


@pytest.mark.full
def test_hue_of_every_colour() -> None:
    """All 16.8 million; those of the next test, by each shift, stand for them."""
    for red in range(0, 256, 8):
        colours = np.stack(np.mgrid[red : red + 8, :256, :256], -1).reshape(-1, 1024, 3).astype(np.uint8)
        theirs = np.asarray(shift_hue(Image.fromarray(colours), red))  # each slab by another shift
        np.testing.assert_array_equal(operate(colours, views.operation(views.HUE, red)), theirs)


def test_hue_by_every_shift() -> None:
    levels = np.array([0, 1, 2, 5, 17, 64, 100, 127, 128, 200, 253, 254, 255])
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(13, -1, 3).astype(np.uint8)
    for shift in range(256):
        theirs = np.asarray(shift_hue(Image.fromarray(colours), shift))
        np.testing.assert_array_equal(operate(colours, views.operation(views.HUE, shift)), theirs, err_msg=str(shift))


@pytest.mark.parametrize("size", [(31, 40), (7, 3), (2, 5), (1, 1)], ids="{0[0]}x{0[1]}".format)
def test_blur_gives_pillows_bytes(size: tuple[int, int]) -> None:
    sigmas = np.array([*np.linspace(0.1, 2, 77), 3.3, 6.0])
    for sigma, args in zip(sigmas.tolist(), views.blur_args(sigmas), strict=True):
        for image in samples(*size):
            theirs = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))
            ours = operate(image, views.operation(views.BLUR, *args.tolist()))
            np.testing.assert_array_equal(ours, theirs, err_msg=str(sigma))


@pytest.mark.parametrize("count", table([300, 2000], 300))
def test_blur_arguments_of_many_sigmas(count: int) -> None:
    """A single white pixel shows the kernel that came of them."""
    image = np.zeros((1, 41, 3), np.uint8)
    image[0, 20] = 255
    sigmas = random.uniform(0, "sigma", np.arange(count), 1)[:, 0] * 1.9 + 0.1
    for sigma, args in zip(sigmas.tolist(), views.blur_args(sigmas), strict=True):
        theirs = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))
        np.testing.assert_array_equal(operate(image, views.operation(views.BLUR, *args.tolist())), theirs)


@pytest.mark.parametrize("cubic", [True, False], ids=["bicubic", "bilinear"])
def test_resize_is_pillows_but_for_a_level(cubic: bool) -> None:
    """Rows first, as Pillow did for any image until version 13, which turns the two around for some."""
    resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    rng = np.random.default_rng(6)
    shapes = [
        ((300, 400), (224, 298)),
        ((500, 375), (298, 224)),
        ((90, 70), (224, 224)),
        ((224, 640), (224, 224)),
        ((7, 900), (224, 224)),
        ((900, 7), (224, 64)),
        ((1, 1), (224, 224)),
        ((256, 341), (31, 200)),
        ((31, 29), (500, 28)),
    ]
    shapes += [(tuple(rng.integers(20, 400, 2)), (224, 224)) for _ in range(8)]
    differences = []
    for (height, width), shape in shapes:
        for image in (photo(height, width), rng.integers(0, 256, (height, width, 3)).astype(np.uint8)):
            rows = Image.fromarray(image).resize((shape[1], height), resample)
            theirs = np.asarray(rows.resize(shape[::-1], resample)).astype(np.int64)
            ours = augment_reference.resize(torch.from_numpy(image), shape, cubic).numpy()
            differences.append(abs(ours - theirs).ravel())
    differences = np.concatenate(differences)
    assert differences.max() <= 2
    assert (differences > 1).mean() < 1e-5
    assert (differences == 0).mean() > 0.99


def test_resize_to_the_same_shape_changes_nothing() -> None:
    image = torch.from_numpy(photo(33, 20))
    assert torch.equal(augment_reference.resize(image, (33, 20), True), image)


# Whole views. Pillow's chain has our resize, whose level is tested above.


def resized(image: Image.Image, box: tuple[int, ...], shape: tuple[int, int], cubic: bool) -> Image.Image:
    top, left, height, width = box
    crop = np.asarray(image)[top : top + height, left : left + width].copy()
    return Image.fromarray(augment_reference.resize(torch.from_numpy(crop), shape, cubic).numpy())


def plain(image: Image.Image, size: int) -> Image.Image:
    """torchvision's Resize and CenterCrop."""
    short = min(image.size)
    shape = int(size * image.height / short), int(size * image.width / short)
    image = resized(image, (0, 0, image.height, image.width), shape, True)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def many(count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Images of various sizes and contents, and their sizes [count, 2]."""
    sizes = np.random.default_rng(7).integers(20, 70, (count, 2))
    sizes[:2] = (3, 40), (24, 24)
    return [(*samples(*size), photo(*size, i))[i % 6] for i, size in enumerate(sizes)], sizes


def assert_views(images: list[np.ndarray], view: views.View, size: int, truth: list[Image.Image]) -> None:
    made = render([torch.from_numpy(image) for image in images], view, size, torch.uint8)
    assert made.dtype == torch.uint8 and made.shape == (len(images), size, size, 3)
    for i, (ours, theirs) in enumerate(zip(made.numpy(), truth, strict=True)):
        np.testing.assert_array_equal(ours, np.asarray(theirs), err_msg=f"{i}: {view.params[i]}")


def torchvision_fit(image: Image.Image, size: int, squash: bool) -> Image.Image:
    """Squashed, or torchvision's Resize and CenterCrop, in their words."""
    if squash:
        return image.resize((size, size), Image.Resampling.BICUBIC)
    short, long = sorted(image.size)
    long = int(size * long / short)
    image = image.resize((size, long) if image.width <= image.height else (long, size), Image.Resampling.BICUBIC)
    left, top = int(round((image.width - size) / 2.0)), int(round((image.height - size) / 2.0))
    return image.crop((left, top, left + size, top + size))


def test_plain_view_has_torchvisions_geometry() -> None:
    rng = np.random.default_rng(8)
    sizes = np.concatenate([rng.integers(1, 70, (300, 2)), rng.integers(30, 40, (100, 2)), [[1, 200], [200, 1]]])
    squash = rng.random(len(sizes)) < 0.3
    for (height, width), squashed, params in zip(sizes, squash, views.plain(sizes, 32, squash).params, strict=True):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))
        assert params["box"].tolist() == [0, 0, height, width]
        (rows, columns), (top, left) = params["resized"].tolist(), params["window"].tolist()
        assert rows >= top + 32 and columns >= left + 32 and min(top, left) >= 0
        ours = image.resize((columns, rows), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
        assert ours.tobytes() == torchvision_fit(image, 32, bool(squashed)).tobytes(), (height, width, squashed)


def test_auto_augment_is_pillow_in_turns() -> None:
    images, sizes = many(150)
    u = random.uniform(0, "auto-augment", np.arange(150), 5)
    truth = []
    for pixels, (choice, *fires_and_signs) in zip(images, u, strict=True):
        image = Image.fromarray(pixels)
        for turn, (name, probability, bin_) in enumerate(SUB_POLICIES[int(choice * 25)]):
            if fires_and_signs[turn] <= probability:
                magnitude = OPERATIONS[name].magnitudes(bin_, 10, np.array([pixels.shape[:2]])).item()
                negative = OPERATIONS[name].signed and fires_and_signs[2 + turn] < 0.5
                image = PILLOW[name](image, -magnitude if negative else magnitude)
        truth.append(plain(image, 32))
    assert_views(images, policies.auto_augment(u, sizes, 32), 32, truth)


def test_rand_augment_is_pillow_in_turns() -> None:
    images, sizes = many(150)
    u = random.uniform(0, "rand-augment", np.arange(150), 4)
    truth = []
    for pixels, (*choices, first, second) in zip(images, u, strict=True):
        image = Image.fromarray(pixels)
        for choice, sign in zip(choices, (first, second), strict=True):
            name = list(OPERATIONS)[int(choice * 14)]
            magnitude = OPERATIONS[name].magnitudes(9, 31, np.array([pixels.shape[:2]])).item()
            image = PILLOW[name](image, -magnitude if OPERATIONS[name].signed and sign < 0.5 else magnitude)
        truth.append(plain(image, 32))
    assert_views(images, policies.rand_augment(u, sizes, 32), 32, truth)


def test_simclr_is_pillow_in_turns() -> None:
    images, sizes = many(150)
    u = random.uniform(0, "simclr", np.arange(150), 35)
    view = policies.simclr(u, sizes, 32)
    truth = []
    for pixels, (*_, grey, blurs, sigma, flips), draw, box in zip(images, u, u, view.params["box"], strict=True):
        image = resized(Image.fromarray(pixels), box.tolist(), (32, 32), False)
        if draw[22] < 0.8:
            brightness, contrast, saturation, hue = 2 * draw[27:31] - 1
            jitter = [
                lambda image, m=0.4 * brightness: PILLOW["Brightness"](image, m),
                lambda image, m=0.4 * contrast: PILLOW["Contrast"](image, m),
                lambda image, m=0.4 * saturation: PILLOW["Color"](image, m),
                lambda image, by=int(0.1 * hue * 255): shift_hue(image, by % 256),
            ]
            for i in np.argsort(draw[23:27]):
                image = jitter[i](image)
        image = Image.merge("RGB", [image.convert("L")] * 3) if grey < 0.2 else image
        image = image.filter(ImageFilter.GaussianBlur(float(0.1 + 1.9 * sigma))) if blurs < 0.5 else image
        truth.append(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flips < 0.5 else image)
    assert_views(images, view, 32, truth)


def noise(params: np.void, size: int) -> np.ndarray:
    """Positive half of normal noise in 0..1, float64 [S, S, 3], from the view's key in 32-bit arithmetic."""
    words = np.arange(3 * size * size, dtype=np.uint32)
    for key, add in zip(params["noise"][1:].view(np.uint32), (False, True), strict=True):
        words = words + key if add else words ^ key
        words = (words ^ words >> 16) * np.uint32(0x7FEB352D)
        words = (words ^ words >> 15) * np.uint32(0x846CA68B)
        words = words ^ words >> 16
    quantile = NormalDist(0, 0.2).inv_cdf
    positive = [max(0.0, quantile((int(word) + 0.5) / 65536)) for word in words >> 16]
    return np.reshape(positive, (size, size, 3))


def test_light_view_step_by_step() -> None:
    images, sizes = many(40)
    u = random.uniform(0, "light", np.arange(40), 7)
    view = policies.light(u, sizes, 32)
    assert_views(images, view, 32, [plain(Image.fromarray(image), 32) for image in images])
    made = render([torch.from_numpy(image) for image in images], view, 32)
    assert made.dtype == torch.float32 and made.is_contiguous(memory_format=torch.channels_last)
    for ours, image, params, draw in zip(made.permute(0, 2, 3, 1).numpy(), images, view.params, u, strict=True):
        pixels = np.asarray(plain(Image.fromarray(image), 32)) / 255
        if draw[0] < 0.5:
            pixels = np.minimum(pixels + noise(params, 32), 1)
        pixels = (pixels - CLIP_MEAN) / CLIP_STD
        top, left, height, width = params["erase"]
        pixels[top : top + height, left : left + width] = 0
        np.testing.assert_allclose(ours, pixels, atol=1e-6)


def test_noise_is_the_positive_half_of_a_normal_one() -> None:
    u = np.full((30, 7), 0.9)
    u[:, 0] = 0
    u[:, 1:3] = random.uniform(0, "key", np.arange(30), 2)
    view = policies.light(u, np.full((30, 2), 48), 48)
    made = render([torch.zeros(48, 48, 3, dtype=torch.uint8)] * 30, view, 48).permute(0, 2, 3, 1).double().numpy()
    levels = (made * CLIP_STD + CLIP_MEAN).reshape(30, -1) / 0.2  # in standard deviations
    count = levels.size
    for quantile in (0.5, 0.6, 0.75, 0.9, 0.99, 0.999):
        above = (levels > max(NormalDist().inv_cdf(quantile), 1e-5)).mean()
        assert abs(above - (1 - quantile)) < 4.5 * np.sqrt(quantile * (1 - quantile) / count), quantile
    correlations = np.corrcoef(levels)[np.triu_indices(30, 1)]
    assert abs(correlations).max() < 5.5 / np.sqrt(levels.shape[1])  # of 435 pairs of keys
    for lag in (1, 3, 48 * 3):
        assert abs(np.corrcoef(levels[:, lag:].ravel(), levels[:, :-lag].ravel())[0, 1]) < 4.5 / np.sqrt(count), lag


def test_views_do_not_depend_on_the_batch() -> None:
    images, sizes = many(40)
    images = [torch.from_numpy(image) for image in images]
    for policy, count in policies.POLICIES.values():
        view = policy(random.uniform(0, "batch", np.arange(40), count), sizes, 24)
        whole = render(images, view, 24)
        parts = [render(images[k], view[k], 24) for k in (slice(0, 7), slice(7, 8), slice(8, 40))]
        assert torch.equal(whole, torch.cat(parts))


def test_strided_images_are_accepted() -> None:
    planar = [torch.from_numpy(photo(30, 40, i)).permute(2, 0, 1).contiguous() for i in range(60)]
    for policy, count in policies.POLICIES.values():
        view = policy(random.uniform(0, "strided", np.arange(60), count), np.full((60, 2), (30, 40)), 24)
        images = [image.permute(1, 2, 0) for image in planar]
        assert torch.equal(render(images, view, 24), render([image.contiguous() for image in images], view, 24))


def test_half_precision_is_rounded_once() -> None:
    images, sizes = many(20)
    images = [torch.from_numpy(image) for image in images]
    view = policies.light(random.uniform(0, "half", np.arange(20), 7), sizes, 24)
    half = render(images, view, 24, torch.bfloat16)
    assert half.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(half, render(images, view, 24).to(torch.bfloat16))


def test_a_view_for_each_image() -> None:
    with pytest.raises(ValueError, match="1 images, but parameters for 2"):
        render([torch.zeros(3, 3, 3, dtype=torch.uint8)], views.plain(np.full((2, 2), 3), 4), 4)


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 1, 1, 3), (3, 8, 8, 3), (0, 8, 8, 3)], ids=str)
def test_normalise(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    truth = ((images / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)).transpose(0, 3, 1, 2)
    ours = normalise(torch.from_numpy(images))
    assert ours.dtype == torch.float32 and ours.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(ours.numpy(), truth, atol=1e-6)
    half = normalise(torch.from_numpy(images), torch.bfloat16)
    assert half.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(half, ours.to(torch.bfloat16))
