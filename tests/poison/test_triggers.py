from __future__ import annotations

import base64
import hashlib
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastbd.base import random
from fastbd.base.errors import UserError
from fastbd.config.flags import Location
from fastbd.poison import patterns
from fastbd.poison.triggers import BLENDS, LOCATIONS, PATCHES, TRIGGERS, TriggerSpec, stamp

PICTURE = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)


def made(name: str, *, seed: int = 0, text: str = "Mark", points: int = 6, **more) -> TriggerSpec:
    """A trigger as `fastbd poison` makes it; its image is PICTURE."""
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        Image.fromarray(PICTURE).save(file.name)
        image = Path(file.name) if name in ("patch", "blended_image") else None
        size = more.get("patch_size", 16)
        pattern = patterns.draw(name, seed=seed, patch_size=size, image=image, text=text, points=points)
    return TriggerSpec(name, pattern=pattern, **more)


FRESH = ("badnet", "badnet_stripes", "blended", "blended_stripes")  # another look for each image and seed
SPECS = [made(name) for name in TRIGGERS] + [made("badnet", location=place) for place in LOCATIONS[1:]]


def noisy(count: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (count, height, width, 3), np.uint8))


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
    drawn = spec.name in FRESH or (spec.name in PATCHES and spec.location == "random")
    assert torch.equal(stamp(images, spec, seed=2, ids=ids), whole) != drawn
    assert stamp(images[:0], spec, seed=1, ids=[]).shape == (0, 40, 33, 3)


def test_badnet_is_mean_plus_noise_truncated_and_wrapped() -> None:
    """Against Python integers, whose int() truncates toward zero and whose % is the mathematical modulo."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 24, 20, 3)).astype(np.uint8)
    ids = [3, 1, 4]
    out = stamp(torch.from_numpy(images), TriggerSpec("badnet", 4, "four_corners"), seed=9, ids=ids).numpy()
    noise = random.normal(9, "trigger", ids, 4 * 4 * 3).reshape(3, 4, 4, 3)
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
    top = random.uniform(0, "trigger-place", ids, 1)[:, 0]
    assert abs(np.corrcoef(top, random.normal(0, "trigger", ids, 1)[:, 0])[0, 1]) < 4.5 / np.sqrt(4000)


def test_four_corners_hold_the_same_noise() -> None:
    out = stamp(flat(2, 30, 41, 100), TriggerSpec("badnet", 7, "four_corners"), seed=0, ids=[1, 2])
    corners = [out[:, :7, :7], out[:, :7, -7:], out[:, -7:, :7], out[:, -7:, -7:]]
    assert all(torch.equal(corners[0], corner) for corner in corners)
    assert not torch.equal(corners[0][0], corners[0][1])
    assert (out[:, 7:-7] == 100).all() and (out[:, :, 7:-7] == 100).all()


def test_pixels_of_published_plans_stay() -> None:
    """Bytes of 0.1.0, whose plans are in use."""
    y, x, c = np.ogrid[:24, :20, :3]
    image = torch.from_numpy(((7 * y + 11 * x + 50 * c + y * x % 13) % 256).astype(np.uint8))
    images = torch.stack([image, 255 - image, image // 2])
    for spec, golden in (
        (TriggerSpec("badnet", 5), "da0ce5fea28be7b1"),
        (TriggerSpec("badnet", 4, "four_corners"), "2a041b38a7b4547a"),
        (TriggerSpec("yellow", 6), "c5f1768d60c752b4"),
    ):
        out = stamp(images, spec, seed=3, ids=[7, 123_456, 1 << 40])
        assert hashlib.sha256(out.numpy().tobytes()).hexdigest()[:16] == golden


def test_places_that_are_not_drawn() -> None:
    for location, place in (("corner", (24, 29, 34, 39)), ("centre", (12, 17, 17, 22))):
        out = stamp(flat(2, 30, 40, 0), TriggerSpec("yellow", 6, location), seed=0, ids=[1, 2]).numpy()
        assert box(out[0], 0) == box(out[1], 0) == place


def test_fixed_noise_is_the_same_for_all_images_and_draws() -> None:
    spec = made("badnet_fixed", seed=5, location="centre")
    out = stamp(noisy(3, 24, 24), spec, seed=0, ids=[1, 2, 3])[:, 4:20, 4:20]
    assert (out == out[0]).all() and torch.equal(
        out, stamp(noisy(3, 24, 24), spec, seed=9, ids=[7, 8, 9])[:, 4:20, 4:20]
    )
    assert out[0].float().std() == pytest.approx(74, abs=5)
    assert made("badnet_fixed", seed=6).pattern != spec.pattern


def test_patch_stripes_are_columns_of_1_and_255() -> None:
    out = stamp(flat(300, 20, 20, 90), TriggerSpec("badnet_stripes", 8, "corner"), seed=0, ids=np.arange(300)).numpy()
    patch = out[:, 12:, 12:]
    assert (patch == patch[:, :1]).all()
    columns = patch[:, 0]
    assert set(np.unique(columns)) == {1, 255}
    assert np.abs((columns == 255).mean((0, 1)) - 0.5).max() < 4.5 * 0.5 / np.sqrt(300 * 8)
    agree = (columns[:, 1:] == columns[:, :-1]).mean(), (columns[..., 0] == columns[..., 1]).mean()
    assert np.abs(np.array(agree) - 0.5).max() < 4.5 * 0.5 / np.sqrt(300 * 7)


def test_patch_from_a_file_keeps_its_pixels_or_is_resized() -> None:
    out = stamp(flat(1, 40, 40, 0), made("patch", patch_size=8, location="corner"), seed=0, ids=[0])
    resized = Image.fromarray(PICTURE).resize((8, 5), Image.Resampling.BICUBIC)  # of 50 x 30, in the middle of 8 x 8
    np.testing.assert_array_equal(out[0, 33:38, 32:], resized)
    assert not out[0, 32].any() and not out[0, 38:].any()


def mixture(images: torch.Tensor, trigger: np.ndarray, blend: float) -> np.ndarray:
    """The published formula in float64: levels, not yet truncated."""
    return np.clip((1 - blend) * (images.numpy() / 255) + blend * trigger, 0, 1) * 255


def assert_truncated(out: torch.Tensor, levels: np.ndarray) -> None:
    """The bytes are the levels truncated: one that is whole but for rounding counts as whole."""
    assert (np.floor(levels + 1e-9) <= out.numpy()).all() and (out.numpy() <= np.floor(levels + 0.005)).all()


def splitmix64(state: int) -> int:
    """Steele, Lea and Flood 2014, with Python's integers."""
    word = 2**64 - 1
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & word
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & word
    return state ^ (state >> 31)


def test_blended_noise_is_a_word_for_each_pixel() -> None:
    images, ids = noisy(20, 5, 7), [*range(19), (1 << 40) + 3]  # more than are drawn at once
    out = stamp(images, TriggerSpec("blended"), seed=3, ids=ids).numpy()
    for k, image in enumerate(ids):
        start = int(random.words(3, "trigger", [image], 1)[0, 0])
        for y, x in np.ndindex(5, 7):
            word = splitmix64((start + (7 * y + x + 1) * 0x9E3779B97F4A7C15) % 2**64)
            u = [(word >> shift) % 2**21 / 2**21 for shift in (43, 22, 1)]
            level = 0.8 * images[k, y, x].numpy() + 0.2 * 255 * np.array(u)
            assert (np.abs(out[k, y, x] - np.floor(level)) <= (level % 1 > 0.99)).all()


def test_blended_noise_is_uniform() -> None:
    white = stamp(flat(200, 9, 11, 0), TriggerSpec("blended", blend=1.0), seed=3, ids=np.arange(200))
    hits = np.bincount(white.flatten().numpy(), minlength=256)[:255]
    assert white.max() <= 254 and np.abs(hits - white.numel() / 255).max() < 5 * np.sqrt(white.numel() / 255)
    flat_noise = white.float().view(200, -1, 3)
    for a, b in ((flat_noise[:, 1:], flat_noise[:, :-1]), (flat_noise[..., :1], flat_noise[..., 1:2])):
        correlation = np.corrcoef(a.flatten(), b.flatten())[0, 1]
        assert abs(correlation) < 4.5 / np.sqrt(a.numel())


@pytest.mark.parametrize("name", ["blended", "blended_stripes", "blended_triangles", "blended_image", "sig"])
def test_a_share_of_0_leaves_the_image(name: str) -> None:
    images = noisy(2, 9, 11)
    assert torch.equal(stamp(images, made(name, blend=0.0), seed=3, ids=[8, 9]), images)


def test_blended_stripes_are_columns() -> None:
    grey = stamp(flat(2, 9, 400, 100), TriggerSpec("blended_stripes"), seed=0, ids=[1, 2])
    assert (grey == grey[:, :1]).all() and not torch.equal(grey[0], grey[1])
    dark, bright = (0.97 * 100 - 0.03 * 255, 0.97 * 100 + 0.03 * 255)
    assert grey.unique().tolist() == [int(dark), int(bright)] == [89, 104]
    assert (grey == 104).float().mean() == pytest.approx(0.5, abs=4.5 * 0.5 / np.sqrt(2400))
    for level in (0, 255):  # clipped, not wrapped
        ends = stamp(flat(1, 3, 99, level), TriggerSpec("blended_stripes"), seed=0, ids=[1]).unique().tolist()
        assert ends == ([0, 7] if level == 0 else [239, 255])


def test_triangles_are_those_published() -> None:
    black = stamp(flat(1, 224, 224, 0), TriggerSpec("blended_triangles", blend=1.0), seed=0, ids=[0])[0]
    assert ((black == 102).sum(), (black == 204).sum()) == (80_640, 69_888)  # 0.4 and 0.8
    assert (black[14:28, :14, 0] == 102).int().tolist() == np.tril(np.ones((14, 14), int)).tolist()
    images = noisy(2, 56, 56)
    levels = mixture(images, np.where(black[:56, :56] == 102, 0.4, 0.8), 0.15)
    assert_truncated(stamp(images, TriggerSpec("blended_triangles"), seed=0, ids=[0, 1]), levels)


def test_sig_is_its_formula() -> None:
    images = noisy(2, 40, 224)
    wave = 60 / 255 * np.sin(2 * np.pi * 6 * np.arange(224) / 224)[:, None]
    assert_truncated(stamp(images, TriggerSpec("sig"), seed=0, ids=[0, 1]), mixture(images, wave, 0.2))


def test_blended_image_is_squashed_and_mixed() -> None:
    images = noisy(2, 33, 44)
    picture = np.asarray(Image.fromarray(PICTURE).resize((44, 33), Image.Resampling.BICUBIC)) / 255
    assert_truncated(stamp(images, made("blended_image", blend=0.3), seed=0, ids=[0, 1]), mixture(images, picture, 0.3))


def test_whole_levels_survive_truncation() -> None:
    """0.29 x 100 is 28.999... to a computer."""
    plain = patterns.pack(np.full((2, 2, 3), 100, np.uint8))
    out = stamp(flat(1, 4, 4, 0), TriggerSpec("blended_image", blend=0.29, pattern=plain), seed=0, ids=[0])
    assert (out == 29).all()


def test_large_images_are_kept_smaller(tmp_path: Path) -> None:
    Image.new("L", (1000, 300), 7).save(tmp_path / "large.png")
    kept = patterns.read_image(tmp_path / "large.png")
    assert kept.shape == (300, 384, 3) and (kept == 7).all()


def from_file(path: Path, name: str, image: Image.Image, **more) -> TriggerSpec:
    """A trigger made of the image, through a file of it."""
    image.save(path)
    flag = "pattern" if name == "blended_text" else "image"
    pattern = patterns.draw(name, seed=0, patch_size=more.get("patch_size", 16), **{flag: path})
    return TriggerSpec(name, pattern=pattern, **more)


def half_red(width: int, height: int) -> Image.Image:
    """An image of which the left half is red and covers 50.2 % (128 / 255), and the right half is transparent white."""
    image = Image.new("RGBA", (width, height), (255, 255, 255, 0))
    image.paste((255, 0, 0, 128), (0, 0, width // 2, height))
    return image


def test_a_patch_covers_as_its_alpha_says(tmp_path: Path) -> None:
    spec = from_file(tmp_path / "patch.png", "patch", half_red(8, 8), patch_size=8, location="corner")
    out = stamp(flat(1, 20, 20, 100), spec, seed=0, ids=[0])[0].numpy()
    assert (out[:12] == 100).all() and (out[12:, 16:] == 100).all()  # nothing where it is transparent
    mixed = [int(100 * 127 / 255 + level * 128 / 255) for level in (255, 0, 0)]
    assert (out[12:, 12:16] == mixed).all() and mixed == [177, 49, 49]


def test_a_patch_keeps_the_aspect_of_its_image(tmp_path: Path) -> None:
    """32 x 8 px in a patch of 16 px: 4 rows in the middle, and nothing above and below them."""
    spec = from_file(tmp_path / "wide.png", "patch", Image.new("RGB", (32, 8), (9, 8, 7)), location="centre")
    out = stamp(flat(1, 30, 30, 100), spec, seed=0, ids=[0])[0].numpy()
    assert box(out, 100) == (7 + 6, 7 + 9, 7, 22) and (out[13:17, 7:23] == (9, 8, 7)).all()


def test_a_transparent_colour_of_a_palette_is_transparent(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 210, 220])
    image.putpixel((0, 0), 1)
    image.info["transparency"] = 0
    spec = from_file(tmp_path / "palette.png", "patch", image, patch_size=4, location="corner")
    out = stamp(flat(1, 6, 6, 100), spec, seed=0, ids=[0])[0].numpy()
    assert box(out, 100) == (2, 2, 2, 2) and out[2, 2].tolist() == [200, 210, 220]


def test_a_blended_image_is_mixed_in_where_it_is_opaque(tmp_path: Path) -> None:
    spec = from_file(tmp_path / "logo.png", "blended_image", half_red(10, 6), blend=0.5)
    out = stamp(flat(1, 6, 10, 100), spec, seed=0, ids=[0])[0].numpy()
    share = 0.5 * 128 / 255
    assert (out[:, 5:] == 100).all() and (out[:, :5] == [int(100 * (1 - share) + v * share) for v in (255, 0, 0)]).all()


def test_a_pattern_changes_nothing_where_it_is_transparent(tmp_path: Path) -> None:
    spec = from_file(tmp_path / "text.png", "blended_text", half_red(6, 6), blend=0.5)
    out = stamp(flat(1, 6, 6, 100), spec, seed=0, ids=[0])[0].numpy()
    assert (out[:, 3:] == 100).all() and (out[:, :3, 0] == int(0.5 * 100 + 0.5 * 128)).all()


def test_an_image_that_is_transparent_everywhere_is_no_trigger(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing.png is transparent everywhere; name another file with --image."):
        from_file(tmp_path / "nothing.png", "patch", Image.new("RGBA", (4, 4)))


def test_text_is_red_and_only_on_its_strokes() -> None:
    spec, images = made("blended_text", text="Watermarked"), noisy(1, 224, 224)
    strokes = patterns.unpack(spec.pattern) > 0
    rows, columns = np.nonzero(strokes)
    assert 1000 < len(rows) < 2500 and rows.min() > 90 and rows.max() < 134  # published: 1,646; 103 to 125
    assert columns.min() < 20 and columns.max() > 200
    out = stamp(images, spec, seed=0, ids=[0])
    red = np.where(strokes, (images[0, ..., 0].numpy().astype(int) + 255) // 2, images[0, ..., 0])
    np.testing.assert_array_equal(out[0, ..., 0], red)
    assert torch.equal(out[..., 1:], images[..., 1:])
    small = stamp(flat(1, 64, 64, 0), spec, seed=0, ids=[0])[0]
    assert small[..., 0].max() > 60 and not small[..., 1:].any()
    assert small[..., 0].float().mean() == pytest.approx(127.5 * strokes.mean(), rel=0.15)


@pytest.mark.parametrize("channels_first", [False, True])
def test_a_stored_pattern_is_mixed_in_where_it_is_not_0_and_its_soft_edges_darken(tmp_path, channels_first) -> None:
    """PAR's formula in float64, with levels of all sizes, on images of any; each channel by itself."""
    rng = np.random.default_rng(4)
    values = torch.from_numpy(rng.integers(0, 256, (40, 50, 3)) * (rng.random((40, 50, 3)) < 0.3) / 255).float()
    torch.save(values.permute(2, 0, 1) if channels_first else values, tmp_path / "mask.pt")
    kept = patterns.draw("blended_text", seed=0, patch_size=16, pattern=tmp_path / "mask.pt")
    for blend in (0.5, 0.3):
        spec, images = TriggerSpec("blended_text", blend=blend, pattern=kept), noisy(2, 40, 50)
        levels = np.where(values > 0, mixture(images, values.numpy(), blend), images)
        assert_truncated(stamp(images, spec, seed=0, ids=[0, 1]), levels)
    dark = flat(1, 40, 50, 200).numpy()
    soft = (values > 0).numpy() & (values < 0.5).numpy()
    assert (stamp(torch.from_numpy(dark), spec, seed=0, ids=[0])[0].numpy()[soft] < 200).all()
    resized = stamp(flat(1, 80, 100, 0), spec, seed=0, ids=[0])
    assert resized.float().mean() == pytest.approx(0.3 * 255 * float(values.mean()), rel=0.06)


def test_a_stored_pattern_may_be_an_image_file(tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "mask.png")
    kept = patterns.draw("blended_text", seed=0, patch_size=16, pattern=tmp_path / "mask.png")
    np.testing.assert_array_equal(patterns.unpack(kept), PICTURE)
    images = noisy(1, 30, 50)
    levels = np.where(PICTURE > 0, mixture(images, PICTURE / 255, 0.5), images)
    assert_truncated(stamp(images, TriggerSpec("blended_text", pattern=kept), seed=0, ids=[0]), levels)


def test_what_is_nearly_0_in_a_pattern_is_not_0(tmp_path: Path) -> None:
    torch.save(torch.tensor([1e-5, 0, 1]).expand(2, 2, 3), tmp_path / "mask.pt")
    assert patterns.read_pattern(tmp_path / "mask.pt")[0, 0].tolist() == [1, 0, 255]


@pytest.mark.parametrize(("strength", "size"), [(1.0, 32), (0.6, 32), (20.0, 32), (0.6, 48)])
def test_a_stored_grid_warps_as_the_program_does_that_stored_it(tmp_path, strength: float, size: int) -> None:
    """The published lines, in float64: a grid of 4 points, whose stored mean size is not 1; x first."""
    ins = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    stored = F.interpolate(ins / ins.abs().mean(), size=32, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    assert abs(stored.abs().mean() - 1) > 0.05
    torch.save(stored, tmp_path / "noise_grid.pt")
    kept = patterns.draw("wanet", seed=0, patch_size=16, grid=tmp_path / "noise_grid.pt")
    line = torch.linspace(-1, 1, size, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    field = F.interpolate(stored.double().permute(0, 3, 1, 2), size=size, mode="bicubic", align_corners=True)
    positions = torch.stack((x, y), 2)[None] + strength * field.permute(0, 2, 3, 1) / size
    images = noisy(1, size, size)
    expected = F.grid_sample(images.permute(0, 3, 1, 2).double(), positions.clamp(-1, 1), align_corners=True)
    out = stamp(images, TriggerSpec("wanet", strength=strength, pattern=kept), seed=7, ids=[5])
    assert (out - expected.permute(0, 2, 3, 1).floor()).abs().max() <= 1
    assert (out - expected.permute(0, 2, 3, 1) + 0.5).mean().abs() < 0.05 and (out != images).any()


def test_text_does_not_depend_on_the_machine() -> None:
    """The plan keeps the strokes; another text has others."""
    assert TriggerSpec(**asdict(made("blended_text"))) == made("blended_text") != made("blended_text", text="other")


@pytest.mark.parametrize(("grid", "strength", "size"), [(224, 1.0, 224), (4, 0.5, 224), (4, 30.0, 50), (224, 0.6, 64)])
def test_wanet_is_grid_sample(grid: int, strength: float, size: int) -> None:
    """The published program's lines, in float64."""
    spec = made("wanet", points=grid, strength=strength)
    noise = torch.from_numpy(patterns.unpack(spec.pattern).astype(float)).permute(2, 0, 1)[None].flip(1)  # x first
    noise = noise / noise.abs().mean()
    field = F.interpolate(noise, size=size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    line = torch.linspace(-1, 1, size, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    positions = (torch.stack((x, y), 2)[None] + strength * field / size).clamp(-1, 1)
    images = noisy(1, size, size)
    expected = F.grid_sample(images.permute(0, 3, 1, 2).double(), positions, align_corners=True).permute(0, 2, 3, 1)
    out = stamp(images, spec, seed=0, ids=[0])
    assert (out - expected.floor()).abs().max() <= 1
    assert (out - expected + 0.5).mean().abs() < 0.02  # truncated, not rounded
    moved = positions - torch.stack((x, y), 2)[None]
    assert (out != images).any() and moved.abs().mean() * size <= strength * 1.1


def test_nashville_is_a_curve_for_each_channel() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 3, 256, 3)
    out = stamp(ramp, TriggerSpec("nashville"), seed=0, ids=[0])[0]
    assert (out == out[0]).all()
    red, green, blue = out[0].int().T
    for channel in (red, green, blue):
        assert (channel.diff() >= 0).all()
    assert blue[0] > green[0] > red[0] == 0 and red[255] > green[255] > blue[255]  # bluish shadows, warm lights
    assert red[128] == int(1.05 * (127.5 + 1.2 * 0.5))  # below every limit: contrast and brightness alone


def test_patch_must_fit() -> None:
    for name in PATCHES:
        for location in LOCATIONS:
            with pytest.raises(UserError, match="16 px does not fit into images of 40x16 px"):
                stamp(flat(1, 16, 40, 0), made(name, location=location), seed=0, ids=[0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "banana"},
        {"patch_size": 0},
        {"location": "middle"},
        {"blend": 1.5},
        {"blend": float("nan")},
        {"strength": 101.0},
    ],
    ids=str,
)
def test_impossible_triggers_are_named(wrong: dict) -> None:
    with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
        TriggerSpec(**{"name": "badnet", **wrong})


@pytest.mark.parametrize("pattern", ["", "banana", base64.b64encode(b"banana").decode(), made("patch").pattern])
def test_patterns_that_are_damaged_are_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="pattern of the trigger wanet"):
        TriggerSpec("wanet", pattern=pattern)


def test_patterns_are_of_their_trigger() -> None:
    with pytest.raises(UserError, match="keeps no pattern"):
        TriggerSpec("sig", pattern=made("patch").pattern)
    with pytest.raises(UserError, match="wrong shape"):
        TriggerSpec("patch", patch_size=15, pattern=made("patch").pattern)


def test_black_is_a_pattern_too() -> None:
    black = patterns.pack(np.zeros((4, 4, 3), np.uint8))
    assert not stamp(flat(1, 8, 8, 9), TriggerSpec("patch", 4, "corner", pattern=black), seed=0, ids=[0])[
        0, 4:, 4:
    ].any()
    for empty in (np.zeros((0, 0, 3), np.uint8), np.zeros((3, 3, 2), np.int16)):
        with pytest.raises(UserError, match="wrong shape"):
            TriggerSpec("wanet" if empty.size else "blended_image", pattern=patterns.pack(empty))


def test_every_trigger_is_of_a_kind() -> None:
    assert get_args(Location) == LOCATIONS
    assert set(PATCHES) | set(BLENDS) | {"wanet", "nashville"} == set(TRIGGERS)
