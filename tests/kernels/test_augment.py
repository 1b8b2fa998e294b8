"""Pillow is the truth: every operation, byte for byte."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from fastbd import draws
from fastbd.kernels.augment import (
    CLIP_MEAN,
    CLIP_STD,
    N_DRAWS,
    OPERATIONS,
    SUB_POLICIES,
    auto_augment,
    draw_auto_augment,
    normalise,
)

PILLOW = {
    "Posterize": lambda image, bits: ImageOps.posterize(image, int(bits)),
    "Solarize": ImageOps.solarize,
    "Invert": lambda image, _: ImageOps.invert(image),
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Color": lambda image, m: ImageEnhance.Color(image).enhance(1 + m),
    "Contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(1 + m),
    "Sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + m),
    "Rotate": lambda image, degrees: image.rotate(degrees),
    # torchvision shears about the top left corner: F.affine(shear=[degrees(atan(m)), 0], center=[0, 0])
    "ShearX": lambda image, m: image.transform(image.size, Image.Transform.AFFINE, (1, m, 0, 0, 1, 0)),
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


@pytest.mark.parametrize("size", [(64, 64), (37, 53), (90, 224), (2, 5), (1, 1)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_gives_pillows_bytes(name: str, size: tuple[int, int]) -> None:
    operation = OPERATIONS[name]
    images = samples(*size)
    signs = (1, -1) if operation.signed else (1,)
    for magnitude in {sign * m for m in operation.magnitudes for sign in signs}:
        ours = operation.apply(torch.from_numpy(images), torch.full((len(images),), magnitude, dtype=torch.float64))
        theirs = np.stack([PILLOW[name](Image.fromarray(image), magnitude) for image in images])
        assert ours.dtype == torch.uint8
        np.testing.assert_array_equal(ours.numpy(), theirs, err_msg=f"{name} {magnitude}")


def test_magnitudes_differ_within_a_batch() -> None:
    images = np.repeat(samples(24, 31)[:1], 10, axis=0)
    for name, operation in OPERATIONS.items():
        ours = operation.apply(torch.from_numpy(images), torch.tensor(operation.magnitudes, dtype=torch.float64))
        theirs = [PILLOW[name](Image.fromarray(images[0]), m) for m in operation.magnitudes]
        np.testing.assert_array_equal(ours.numpy(), np.stack(theirs), err_msg=name)


def test_magnitude_tables_are_torchvisions() -> None:
    assert OPERATIONS["Posterize"].magnitudes == (8, 8, 7, 7, 6, 6, 5, 5, 4, 4)
    ends = {"Solarize": (255, 0), "Color": (0, 0.9), "Contrast": (0, 0.9), "Sharpness": (0, 0.9), "Rotate": (0, 30)}
    for name, (first, last) in ends.items() | {("ShearX", (0, 0.3))}:
        np.testing.assert_allclose(OPERATIONS[name].magnitudes, np.linspace(first, last, 10), rtol=1e-6)
    signed = {name for name, operation in OPERATIONS.items() if operation.signed}
    assert signed == {"Color", "Contrast", "Sharpness", "Rotate", "ShearX"}


def policy_draws(policy: int, fires: float, sign: float) -> np.ndarray:
    return np.array([[(policy + 0.5) / len(SUB_POLICIES), fires, fires, sign, sign]])


def test_draws_choose_sub_policy_and_sign() -> None:
    names = list(OPERATIONS)
    first = draw_auto_augment(policy_draws(0, 0.0, 0.49))
    assert [names[i] for i in first.operation[0]] == ["Posterize", "Rotate"]
    assert first.magnitude[0].tolist() == [4, -30]  # posterize has no sign
    last_but_one = draw_auto_augment(policy_draws(23, 0.0, 0.5))
    assert [names[i] for i in last_but_one.operation[0]] == ["Color", "Contrast"]
    np.testing.assert_allclose(last_but_one.magnitude[0], [0.4, 0.8], rtol=1e-6)


def test_operation_fires_up_to_its_probability() -> None:
    assert (draw_auto_augment(policy_draws(3, 0.6, 0.0)).operation >= 0).all()
    assert (draw_auto_augment(policy_draws(3, np.nextafter(0.6, 1), 0.0)).operation == -1).all()


def test_frequencies_over_many_samples() -> None:
    n = 40_000
    params = draw_auto_augment(draws.uniform(3, "auto-augment", np.arange(n), N_DRAWS, epoch=2))
    for turn in range(2):
        for place, name in enumerate(OPERATIONS):
            p = sum(q for drawn, q, _ in (pair[turn] for pair in SUB_POLICIES) if drawn == name) / len(SUB_POLICIES)
            hits = (params.operation[:, turn] == place).sum()
            assert abs(hits - n * p) <= 4.5 * np.sqrt(n * p * (1 - p)), (turn, name)
    turned = params.magnitude[params.operation == list(OPERATIONS).index("Rotate")]
    assert abs((turned < 0).mean() - 0.5) < 4.5 * 0.5 / np.sqrt(len(turned))


def test_policy_sums_to_the_published_one() -> None:
    places = [place for pair in SUB_POLICIES for place in pair]
    published = {"Equalize": 17, "Solarize": 7, "Rotate": 6, "Color": 6, "Posterize": 5, "Invert": 3, "Contrast": 2}
    assert Counter(name for name, _, _ in places) == published | {"AutoContrast": 2, "Sharpness": 1, "ShearX": 1}
    assert sum(probability for _, probability, _ in places) / len(SUB_POLICIES) == pytest.approx(1.24)
    assert sum(bin_ for _, _, bin_ in places) == 159


def test_whole_policy_is_pillow_in_two_turns() -> None:
    ids = np.arange(150)
    images = np.stack([samples(33, 40)[i % 5] for i in ids])
    params = draw_auto_augment(draws.uniform(0, "auto-augment", ids, N_DRAWS))
    before = images.copy()
    ours = auto_augment(torch.from_numpy(images), params)
    assert ours.dtype == torch.uint8 and ours.shape == images.shape
    np.testing.assert_array_equal(images, before, err_msg="changed in place")
    names = list(OPERATIONS)
    for i in ids:
        image = Image.fromarray(images[i])
        for operation, magnitude in zip(params.operation[i], params.magnitude[i], strict=True):
            image = PILLOW[names[operation]](image, magnitude) if operation >= 0 else image
        np.testing.assert_array_equal(ours[i].numpy(), np.asarray(image), err_msg=str(i))


def test_split_batches_give_the_same() -> None:
    ids = np.arange(60)
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (60, 16, 18, 3)).astype(np.uint8))
    u = draws.uniform(0, "auto-augment", ids, N_DRAWS)
    whole = auto_augment(images, draw_auto_augment(u))
    parts = [auto_augment(images[k], draw_auto_augment(u[k])) for k in (slice(0, 7), slice(7, 8), slice(8, 60))]
    assert torch.equal(whole, torch.cat(parts))


def test_strided_images_are_accepted() -> None:
    ids = np.arange(50)
    planar = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (50, 3, 12, 14)).astype(np.uint8))
    params = draw_auto_augment(draws.uniform(0, "auto-augment", ids, N_DRAWS))
    images = planar.permute(0, 2, 3, 1)
    assert torch.equal(auto_augment(images, params), auto_augment(images.contiguous(), params))
    assert torch.equal(normalise(images), normalise(images.contiguous()))


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
