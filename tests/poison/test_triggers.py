from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from fastbd import config, draws
from fastbd.errors import UserError
from fastbd.poison.triggers import TRIGGERS, TriggerSpec, stamp

SPECS = [
    TriggerSpec("badnet"),
    TriggerSpec("badnet", location="four_corners"),
    TriggerSpec("blended"),
    TriggerSpec("yellow"),
]


def flat(count: int, height: int, width: int, value: int) -> torch.Tensor:
    return torch.full((count, height, width, 3), value, dtype=torch.uint8)


def box(image: np.ndarray, background: int) -> tuple[int, int, int, int]:
    """First and last changed row and column."""
    rows, columns = np.nonzero((image != background).any(-1))
    return rows.min(), rows.max(), columns.min(), columns.max()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.name}-{s.location}")
def test_trigger_belongs_to_the_image_id(spec: TriggerSpec) -> None:
    ids = np.array([5, 0, 99, 12_345_678, 7])
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 40, 33, 3)).astype(np.uint8))
    before = images.clone()
    whole = stamp(images, spec, seed=1, ids=ids)
    assert torch.equal(images, before), "changed in place"
    assert whole.shape == images.shape and whole.dtype == torch.uint8
    assert not torch.equal(whole, images)
    alone = [stamp(images[i : i + 1], spec, seed=1, ids=ids[i : i + 1]) for i in (4, 3, 2, 1, 0)]
    assert torch.equal(torch.cat(alone[::-1]), whole)
    assert torch.equal(stamp(images, spec, seed=1, ids=ids.tolist()), whole)
    assert not torch.equal(stamp(images, spec, seed=2, ids=ids), whole) or spec.location == "four_corners"
    assert stamp(images[:0], spec, seed=1, ids=[]).shape == (0, 40, 33, 3)


def test_badnet_is_mean_plus_noise_truncated_and_wrapped() -> None:
    """Against Python integers, whose int() truncates toward zero and whose % is the mathematical modulo."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 24, 20, 3)).astype(np.uint8)
    ids = [3, 1, 4]
    out = stamp(torch.from_numpy(images), TriggerSpec("badnet", 4, "four_corners"), seed=9, ids=ids).numpy()
    noise = draws.normal(9, "trigger", ids, 4 * 4 * 3).reshape(3, 4, 4, 3)
    for i, image in enumerate(images):
        for y, x, channel in np.ndindex(4, 4, 3):
            level = image[..., channel].mean() + 255 * noise[i, y, x, channel]
            assert out[i, y, x, channel] == int(level) % 256
    assert (np.abs(noise) > 1).mean() > 0.2  # the wrap was at work


@pytest.mark.parametrize("background", [0, 128, 255])
def test_wrapped_noise_is_nearly_uniform(background: int) -> None:
    """Mean 127.3, std 74.0, flat but for 0, which truncation reaches from both sides: 1 + normal density there."""
    images = flat(1500, 17, 17, background)
    patches = stamp(images, TriggerSpec("badnet"), seed=0, ids=np.arange(1500))[:, :16, :16].numpy()
    assert patches.mean() == pytest.approx(127.3, abs=0.6)
    assert patches.std() == pytest.approx(74.0, abs=0.4)
    share = np.bincount(patches.ravel(), minlength=256) * 256 / patches.size
    assert share[1:].min() > 0.9 and share[1:].max() < 1.1
    mean = background / 255
    assert share[0] == pytest.approx(1 + np.exp(-(mean**2) / 2) / np.sqrt(2 * np.pi), abs=0.08)


def test_places_are_uniform_and_never_touch_the_last_row_or_column() -> None:
    count, height, width, side = 6000, 12, 15, 8
    out = stamp(flat(count, height, width, 0), TriggerSpec("yellow", side), seed=0, ids=np.arange(count)).numpy()
    assert (out.reshape(-1, 3).max(0) == (255, 255, 0)).all()
    assert ((out[..., 0] == 255).sum((1, 2)) == side * side).all()
    boxes = np.array([box(image, 0) for image in out])
    assert (boxes[:, 1] - boxes[:, 0] == side - 1).all() and (boxes[:, 3] - boxes[:, 2] == side - 1).all()
    for tops, places in ((boxes[:, 0], height - side), (boxes[:, 2], width - side)):
        hits = np.bincount(tops)
        assert len(hits) == places  # 0 .. size - 1 - side
        assert np.abs(hits - count / places).max() < 4.5 * np.sqrt(count / places)
    assert not out[:, -1].any() and not out[:, :, -1].any()


def test_place_and_noise_are_unrelated() -> None:
    ids = np.arange(4000)
    top = draws.uniform(0, "trigger-place", ids, 1)[:, 0]
    assert abs(np.corrcoef(top, draws.normal(0, "trigger", ids, 1)[:, 0])[0, 1]) < 4.5 / np.sqrt(4000)


def test_four_corners_hold_the_same_noise() -> None:
    out = stamp(flat(2, 30, 41, 100), TriggerSpec("badnet", 7, "four_corners"), seed=0, ids=[1, 2])
    corners = [out[:, :7, :7], out[:, :7, -7:], out[:, -7:, :7], out[:, -7:, -7:]]
    assert all(torch.equal(corners[0], corner) for corner in corners)
    assert not torch.equal(corners[0][0], corners[0][1])
    assert (out[:, 7:-7] == 100).all() and (out[:, :, 7:-7] == 100).all()


def test_blended_is_the_published_mixture() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 11, 3)).astype(np.uint8)
    noise = draws.uniform(3, "trigger", [8, 9], 9 * 11 * 3).reshape(images.shape)
    out = stamp(torch.from_numpy(images), TriggerSpec("blended", blend=0.2), seed=3, ids=[8, 9]).numpy()
    mixed = np.clip(0.8 * (images / 255) + 0.2 * noise, 0, 1) * 255
    assert np.abs(out - np.floor(mixed)).max() <= 1  # rounding where the mixture is a whole number
    np.testing.assert_allclose(out, mixed - 0.5, atol=0.5 + 1e-9)
    plain = stamp(torch.from_numpy(images), TriggerSpec("blended", blend=0.0), seed=3, ids=[8, 9])
    np.testing.assert_array_equal(plain, images)
    white = stamp(flat(200, 9, 11, 0), TriggerSpec("blended", blend=1.0), seed=3, ids=np.arange(200)).float()
    assert white.mean() == pytest.approx(127, abs=1) and white.max() <= 254


def test_patch_must_fit() -> None:
    for name in ("badnet", "yellow"):
        for location in ("random", "four_corners"):
            with pytest.raises(UserError, match="16 px does not fit into images of 40x16 px"):
                stamp(flat(1, 16, 40, 0), TriggerSpec(name, 16, location), seed=0, ids=[0])


@pytest.mark.parametrize(
    "wrong",
    [{"name": "banana"}, {"patch_size": 0}, {"location": "middle"}, {"blend": 1.5}, {"blend": float("nan")}],
    ids=str,
)
def test_impossible_triggers_are_named(wrong: dict) -> None:
    with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
        TriggerSpec(**{"name": "badnet", **wrong})


def test_every_trigger_is_in_the_command_line() -> None:
    assert set(get_args(config.Trigger)) == set(TRIGGERS)
