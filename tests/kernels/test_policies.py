"""What is drawn for a view: torchvision's definitions written out sample by sample, and frequencies."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from fastbd.base import random
from fastbd.kernels import policies, views
from fastbd.kernels.policies import NAMES, OPERATIONS, POLICIES, SUB_POLICIES

SIGNED = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness"}


def sizes_of(count: int, low: int = 1, high: int = 600) -> np.ndarray:
    return np.random.default_rng(count).integers(low, high, (count, 2))


def drawn(name: str, count: int, sizes: np.ndarray | None = None, size: int = 224) -> tuple[np.ndarray, np.ndarray]:
    """Uniform draws and the PARAMS that the policy makes of them."""
    policy, n = POLICIES[name]
    u = random.uniform(3, name, np.arange(count), n, epoch=2)
    return u, policy(u, sizes_of(count) if sizes is None else sizes, size).params


def assert_share(hits: np.ndarray, p: float, what: object = None) -> None:
    assert abs(np.mean(hits) - p) <= 4.5 * math.sqrt(p * (1 - p) / np.size(hits)), what


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    """Within the bounds, and eight equal parts equally often."""
    assert values.min() >= low and values.max() <= high
    for part in range(8):
        edges = low + (high - low) * part / 8, low + (high - low) * (part + 1) / 8
        assert_share((values >= edges[0]) & (values < edges[1]), 1 / 8, edges)


def factors(operations: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(operations["args"][..., 0]).view(np.float32)


# Operations and their magnitudes.


@pytest.mark.parametrize("bins", [10, 31])
def test_magnitudes_are_torchs_linspace(bins: int) -> None:
    """To the last bit: a translation is cut to whole pixels."""
    sizes = np.stack([np.arange(1, 2001), np.arange(2000, 0, -1)], 1)
    ends = dict.fromkeys(NAMES, (0, 0)) | dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (0, 0.9))
    ends |= {"ShearX": (0, 0.3), "ShearY": (0, 0.3), "Rotate": (0, 30), "Solarize": (255, 0), "Posterize": (8, 4)}
    for name, (first, last) in ends.items():
        for bin_ in range(bins):
            ours = OPERATIONS[name].magnitudes(np.array([bin_]), bins, sizes)
            if name.startswith("Translate"):
                across = sizes[:, 1 if name == "TranslateX" else 0]
                truth = [torch.linspace(0.0, 150.0 / 331.0 * side, bins)[bin_].item() for side in across[::40].tolist()]
                np.testing.assert_array_equal(ours[::40], truth)
            else:
                assert (ours == torch.linspace(first, last, bins)[bin_].item()).all(), (name, bin_)


@pytest.mark.parametrize("bins", [10, 31])
def test_posterize_keeps_whole_bits(bins: int) -> None:
    operation = OPERATIONS["Posterize"]
    for i in range(bins):
        bits = 8 - int((torch.tensor(i) / ((bins - 1) / 4)).round())
        made = operation.encode(operation.magnitudes(np.array([i]), bins, np.ones((1, 2))), np.ones((1, 2)))[0]
        mask = made["args"][0] if made["code"] else 255
        assert mask == 256 - 2 ** (8 - bits)


def test_which_operations_have_a_sign() -> None:
    assert {name for name, operation in OPERATIONS.items() if operation.signed} == SIGNED


def test_operations_that_change_nothing_are_left_out() -> None:
    sizes = np.array([[40, 30]])
    idle = [*((name, sign * 0.0) for name in SIGNED for sign in (1, -1)), ("Posterize", 8.0), ("Identity", 0.0)]
    for name, magnitude in idle:
        assert OPERATIONS[name].encode(np.array([magnitude]), sizes)["code"] == views.NONE, name
    for name in ("Solarize", "Invert", "AutoContrast", "Equalize"):
        assert OPERATIONS[name].encode(np.zeros(1), sizes)["code"] != views.NONE


@pytest.mark.parametrize("bins", [10, 31])
def test_arguments_of_three_operations_depend_on_the_size(bins: int) -> None:
    some, other = np.full((bins, 2), (1, 1)), np.full((bins, 2), (320, 481))
    found = set()
    for name, operation in OPERATIONS.items():
        for sign in (1, -1):
            made = [
                operation.encode(sign * operation.magnitudes(np.arange(bins), bins, sizes), sizes)
                for sizes in (some, other)
            ]
            found |= {name} if made[0].tobytes() != made[1].tobytes() else set()
    assert found == {"TranslateX", "TranslateY", "Rotate"}


def one_by_one(names, negative, bins, count: int, size: np.ndarray) -> list[np.ndarray]:
    """The operations of one image, each made by itself."""
    made = []
    for name, below, bin_ in zip(names, negative, bins, strict=True):
        operation = OPERATIONS[name]
        magnitude = operation.magnitudes(np.array([bin_]), count, size[None])
        made += [*operation.encode(-magnitude if operation.signed and below else magnitude, size[None])]
    return made


# AutoAugment.


def test_sub_policies_are_the_published_ones() -> None:
    places = [place for pair in SUB_POLICIES for place in pair]
    published = {"Equalize": 17, "Solarize": 7, "Rotate": 6, "Color": 6, "Posterize": 5, "Invert": 3, "Contrast": 2}
    assert Counter(name for name, _, _ in places) == published | {"AutoContrast": 2, "Sharpness": 1, "ShearX": 1}
    assert sum(probability for _, probability, _ in places) / len(SUB_POLICIES) == pytest.approx(1.24)
    assert sum(bin_ for _, _, bin_ in places) == 159


def sub_policy(policy: int, fires: float, sign: float) -> np.ndarray:
    """The two operations of one sub-policy."""
    u = np.array([[(policy + 0.5) / len(SUB_POLICIES), fires, fires, sign, sign]])
    return policies.auto_augment(u, np.array([[300, 400]]), 224).params["before"][0]


def test_operations_of_auto_augment_are_those_made_one_by_one() -> None:
    sizes = np.concatenate([sizes_of(3000), sizes_of(500, 1, 12), sizes_of(500, 1, 9000)])
    u, params = drawn("auto_augment", len(sizes), sizes)
    for draw, size, before in zip(u, sizes, params["before"], strict=True):
        pair = SUB_POLICIES[int(draw[0] * len(SUB_POLICIES))]
        names = [name if fires <= p else "Identity" for (name, p, _), fires in zip(pair, draw[1:3], strict=True)]
        truth = one_by_one(names, draw[3:5] < 0.5, [bin_ for _, _, bin_ in pair], policies.BINS, size)
        assert before.tobytes() == np.array(truth).tobytes(), draw


def test_draws_choose_sub_policy_and_sign() -> None:
    first = sub_policy(0, 0.0, 0.49)
    assert first["code"].tolist() == [views.POSTERIZE, views.AFFINE]
    assert first["args"][0, 0] == 0xF0
    cos, sin = math.cos(math.radians(30)), math.sin(math.radians(30))  # turned clockwise: the sign is drawn
    np.testing.assert_allclose(first["args"][1, [0, 1, 3, 4]] / 65536, [cos, sin, -sin, cos], atol=1e-5)
    last_but_one = sub_policy(23, 0.0, 0.5)
    assert last_but_one["code"].tolist() == [views.COLOR, views.CONTRAST]
    np.testing.assert_allclose(factors(last_but_one), [1.4, 1.8], rtol=1e-6)
    np.testing.assert_allclose(factors(sub_policy(23, 0.0, 0.49)), [0.6, 0.2], rtol=1e-6)


def test_operation_fires_up_to_its_probability() -> None:
    assert (sub_policy(3, 0.6, 0.0)["code"] == views.POSTERIZE).all()
    assert (sub_policy(3, np.nextafter(0.6, 1), 0.0)["code"] == views.NONE).all()


def test_frequencies_of_auto_augment() -> None:
    _, params = drawn("auto_augment", 40_000)
    code_of = {name: operation.code for name, operation in OPERATIONS.items()}
    for turn in range(2):
        for code in set(code_of.values()) - {views.NONE}:
            pairs = [pair[turn] for pair in SUB_POLICIES]
            idle = [("Color", 0), ("Posterize", 0), ("Posterize", 1)]  # magnitudes that change nothing
            p = sum(p for name, p, bin_ in pairs if code_of[name] == code and (name, bin_) not in idle)
            assert_share(params["before"][:, turn]["code"] == code, p / len(SUB_POLICIES), (turn, code))
    before = params["before"]
    assert_share(factors(before[before["code"] == views.COLOR]) < 1, 0.5)
    assert_share(before["args"][before["code"] == views.AFFINE][:, 1] > 0, 0.5)  # clockwise, or sheared to the left


def test_frequencies_of_rand_augment() -> None:
    n = 40_000
    _, params = drawn("rand_augment", n, np.full((n, 2), 300))
    kinds = {  # of 14 operations
        views.NONE: 1,
        views.AFFINE: 5,
        views.BRIGHTNESS: 1,
        views.COLOR: 1,
        views.CONTRAST: 1,
        views.SHARPNESS: 1,
        views.POSTERIZE: 1,
        views.SOLARIZE: 1,
        views.AUTOCONTRAST: 1,
        views.EQUALIZE: 1,
    }
    for turn in range(2):
        before = params["before"][:, turn]
        for code, count in kinds.items():
            assert_share(before["code"] == code, count / 14, (turn, code))
        for code in (views.BRIGHTNESS, views.COLOR, views.CONTRAST, views.SHARPNESS):
            np.testing.assert_allclose(abs(factors(before[before["code"] == code]) - 1), 0.27, atol=1e-6)
            assert_share(factors(before[before["code"] == code]) < 1, 0.5, code)
    same = params["before"]["code"][:, 0] == params["before"]["code"][:, 1]
    assert_share(same, sum((count / 14) ** 2 for count in kinds.values()))


@pytest.mark.parametrize("operations", [1, 2])
def test_operations_of_rand_augment_are_those_made_one_by_one(operations: int) -> None:
    sizes = np.concatenate([sizes_of(100), sizes_of(30, 1, 12), sizes_of(30, 1, 9000)])
    for magnitude in range(31):
        u = random.uniform(magnitude, "one", np.arange(len(sizes)), 4)
        view = policies.rand_augment(u, sizes, 32, operations=operations, magnitude=magnitude)
        for draw, size, before in zip(u, sizes, view.params["before"], strict=True):
            names = [NAMES[int(place * 14)] for place in draw[:operations]]
            negative = draw[operations : 2 * operations] < 0.5
            truth = one_by_one(names, negative, [magnitude] * operations, 31, size)
            assert before[:operations].tobytes() == np.array(truth).tobytes(), draw


def test_rand_augment_takes_other_strengths() -> None:
    u = random.uniform(0, "strength", np.arange(2000), 2)
    params = policies.rand_augment(u, np.full((2000, 2), 50), 32, operations=1, magnitude=30).params
    assert (params["before"][:, 1]["code"] == views.NONE).all()
    first = params["before"][:, 0]
    assert set(first["args"][first["code"] == views.POSTERIZE][:, 0]) == {0xF0}
    assert set(np.round(factors(first[first["code"] == views.CONTRAST]), 5)) == {np.float32(0.1), np.float32(1.9)}


@pytest.mark.parametrize("name", ["auto_augment", "rand_augment", "light"])
def test_geometry_is_the_plain_one(name: str) -> None:
    sizes = sizes_of(200)
    _, params = drawn(name, 200, sizes)
    plain = views.plain(sizes, 224)
    for field in ("box", "resized", "window"):
        np.testing.assert_array_equal(params[field], plain.params[field])
    assert plain.cubic and POLICIES[name][0](np.zeros((200, POLICIES[name][1])), sizes, 224).cubic


# Crops.


def random_resized_crop(u: np.ndarray, height: int, width: int, smallest: float) -> tuple[int, int, int, int]:
    """torchvision's, one sample at a time: (top, left, height, width)."""
    for share, ratio in zip(u[:10], u[10:20], strict=True):
        area = height * width * (smallest + (1 - smallest) * share)
        aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratio)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("name", "smallest"), [("random_crop", 0.5), ("simclr", 0.08)])
def test_crop_is_torchvisions(name: str, smallest: float) -> None:
    sizes = np.concatenate([sizes_of(1500), sizes_of(500, 1, 12), sizes_of(250) * [7, 1], sizes_of(250) * [1, 7]])
    u, params = drawn(name, len(sizes), sizes)
    truth = [random_resized_crop(*row, smallest) for row in zip(u, *sizes.T.tolist(), strict=True)]
    np.testing.assert_array_equal(params["box"], truth)
    top, left, height, width = params["box"].T
    assert (params["box"][:, :2] >= 0).all() and (params["box"][:, 2:] > 0).all()
    assert (top + height <= sizes[:, 0]).all() and (left + width <= sizes[:, 1]).all()
    assert (params["resized"] == 224).all() and (params["window"] == 0).all()


@pytest.mark.parametrize(("name", "smallest"), [("random_crop", 0.5), ("simclr", 0.08)])
def test_crop_frequencies(name: str, smallest: float) -> None:
    n = 20_000
    _, params = drawn(name, n, np.full((n, 2), 1000))
    top, left, height, width = params["box"].T
    ratio = width / height
    assert ratio.min() > 0.745 and ratio.max() < 1.342 and (height * width).min() > smallest * 0.99e6
    assert_share(ratio < 1, 0.5)  # a square image: width and height are alike
    small = height * width < 0.7e6  # of these no try is refused for its shape
    assert_uniform((height * width)[small] / 1e6, smallest - 0.0005, 0.7)  # sides are rounded
    assert_uniform(((top + 0.5) / (1001 - height))[small], 0, 1)
    assert_uniform(((left + 0.5) / (1001 - width))[small], 0, 1)


def test_crops_are_bilinear() -> None:
    for name in ("random_crop", "simclr"):
        assert not POLICIES[name][0](np.zeros((1, POLICIES[name][1])), np.full((1, 2), 9), 8).cubic


# SimCLR.


def test_frequencies_of_simclr() -> None:
    n = 40_000
    _, params = drawn("simclr", n)
    jitter, grey, blur = params["after"][:, :4], params["after"][:, 4], params["after"][:, 5]
    jittered = (jitter["code"] != views.NONE).all(1)
    assert_share(jittered, 0.8)
    assert (jitter["code"][~jittered] == views.NONE).all()
    orders = Counter(map(tuple, jitter["code"][jittered].tolist()))
    four = {views.BRIGHTNESS, views.CONTRAST, views.COLOR, views.HUE}
    assert len(orders) == 24 and all(set(order) == four for order in orders)
    for order, count in orders.items():
        assert_share(np.arange(jittered.sum()) < count, 1 / 24, order)
    for code in four - {views.HUE}:
        assert_uniform(factors(jitter[jitter["code"] == code]).astype(np.float64), 0.6 - 1e-6, 1.4 + 1e-6)
    shifts = jitter["args"][jitter["code"] == views.HUE][:, 0]
    assert set(shifts) == {*range(26), *range(231, 256)}  # cut towards 0, wrapped
    assert_share(shifts == 0, 2 / 51)
    for shift in (1, 25, 231, 255):
        assert_share(shifts == shift, (0.5 if shift in (25, 231) else 1) / 51, shift)
    assert_share(grey["code"] == views.COLOR, 0.2)
    assert (factors(grey) == 0).all()
    assert_share(blur["code"] == views.BLUR, 0.5)
    assert set(grey["code"]) == {views.NONE, views.COLOR} and set(blur["code"]) == {views.NONE, views.BLUR}
    assert_share(params["flip"] == 1, 0.5)


def test_blur_of_simclr_spreads_by_sigma() -> None:
    """Three boxes of radius r, weights w and, at both ends, e: variance 3 (2 w (1 + ... + r^2) + 2 e (r + 1)^2)."""
    n = 20_000
    u, params = drawn("simclr", n)
    radius, inner, ends = params["after"][:, 5]["args"][:, :3].T.astype(np.float64)
    inner, ends = inner / 2**24, ends / 2**24
    np.testing.assert_allclose((2 * radius + 1) * inner + 2 * ends, 1, atol=1e-6)
    squares = radius * (radius + 1) * (2 * radius + 1) / 3
    sigma = np.sqrt(3 * (inner * squares + 2 * ends * (radius + 1) ** 2))
    np.testing.assert_allclose(sigma, 0.1 + 1.9 * u[:, 33], atol=1e-3)


# PAR's light augmentation.


@pytest.mark.parametrize("size", [224, 336, 32, 3])
def test_frequencies_of_light(size: int) -> None:
    n = 20_000
    _, params = drawn("light", n, size=size)
    amplitude = np.ascontiguousarray(params["noise"][:, 0]).view(np.float32)
    assert set(amplitude.tolist()) == {0.0, float(np.float32(0.2))}
    assert_share(amplitude > 0, 0.5)
    top, left, height, width = params["erase"].T
    assert (height == width).all() and (params["erase"] >= 0).all()
    assert (top + height <= size).all() and (left + width <= size).all()
    if size < 20:  # 1 % of the area is less than half a pixel's side
        assert (height == 0).all()
        return
    erased = height > 0
    assert_share(erased, 0.5)
    assert set(height[erased]) == set(range(round(size * math.sqrt(0.005)), round(size * math.sqrt(0.01)) + 1))
    for edge, corner in ((top + height, top), (left + width, left)):
        assert edge[erased].max() == size and corner[erased].min() == 0
    if size > 100:  # enough places to be spread evenly over eight parts
        assert_uniform(((top + 0.5) / (size - height + 1))[erased], 0, 1)
        assert_uniform(((left + 0.5) / (size - width + 1))[erased], 0, 1)
    assert_share((amplitude > 0) & erased, 0.25)  # independent


def test_keys_of_the_noise_are_two_words() -> None:
    u, params = drawn("light", 5000)
    words = params["noise"][:, 1:].astype(np.int64) % 2**32
    np.testing.assert_array_equal(words, np.floor(u[:, 1:3] * 2**32))
    assert len(np.unique(words, axis=0)) == 5000
    for bit in range(32):
        assert_share(words >> bit & 1, 0.5, bit)


# All of them.


@pytest.mark.parametrize("name", POLICIES)
def test_policies_take_each_sample_by_itself(name: str) -> None:
    policy, n = POLICIES[name]
    u, sizes = random.uniform(1, name, np.arange(50), n), sizes_of(50)
    before = u.copy(), sizes.copy()
    whole = policy(u, sizes, 64).params
    for i in range(50):
        one = policy(u[i : i + 1], sizes[i : i + 1].astype(np.int32), 64).params
        assert one.tobytes() == whole[i : i + 1].tobytes()
    assert len(policy(u[:0], sizes[:0], 64).params) == 0
    np.testing.assert_array_equal(u, before[0])
    np.testing.assert_array_equal(sizes, before[1])


@pytest.mark.parametrize("name", POLICIES)
def test_every_draw_counts(name: str) -> None:
    """N is what the policy reads: changing any one column changes what is drawn for some of many samples."""
    policy, n = POLICIES[name]
    u, sizes = random.uniform(1, name, np.arange(3000), n), sizes_of(3000, 30)
    whole = policy(u, sizes, 64).params.tobytes()
    for column in range(n):
        other = u.copy()
        other[:, column] = random.uniform(2, name, np.arange(3000), 1)[:, 0]
        assert policy(other, sizes, 64).params.tobytes() != whole, column
