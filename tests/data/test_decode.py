from __future__ import annotations

import importlib.util
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastbd.data.decode import BadImage, open_decoder, to_jpeg

LIMIT = 10_000_000
HAS_DALI = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
BACKENDS = ["pil", pytest.param("dali", marks=pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed"))]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, nothing symmetric."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def as_arrays(*files: bytes) -> list[np.ndarray]:
    return [np.frombuffer(file, np.uint8) for file in files]


def pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(int)


def torch_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    x = torch.nn.functional.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return x[0].clamp(0, 255).round().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("width", "height", "resized", "left", "top"),
    # Long side int(size * long / short), then the middle; half a pixel rounds to the even one.
    [(90, 60, (32, 48), 8, 0), (60, 90, (48, 32), 0, 8), (33, 32, (32, 33), 0, 0), (35, 32, (32, 35), 2, 0),
     (20, 31, (49, 32), 0, 8), (32, 32, (32, 32), 0, 0)],
)  # fmt: skip
def test_crop_follows_torchvisions_geometry(backend, width, height, resized, left, top):
    file = encoded(picture(width, height), quality=95)
    (out,) = open_decoder(backend, 1, "cpu")(as_arrays(file), 32, np.array([False]))
    wanted = torch_resize(pixels(file), *resized)[top : top + 32, left : left + 32]
    assert out.shape == (32, 32, 3) and np.abs(out - wanted).max() <= 2  # PIL rounds after each of its two passes


@pytest.mark.parametrize("backend", BACKENDS)
def test_squash_uses_the_whole_image(backend):
    file = encoded(picture(90, 60), quality=95)
    out = open_decoder(backend, 2, "cpu")(as_arrays(file, file), 32, np.array([True, False]))
    assert out.dtype == np.uint8 and out.shape == (2, 32, 32, 3)
    assert np.abs(out[0] - torch_resize(pixels(file), 32, 32)).max() <= 2
    assert np.abs(out[0].astype(int) - out[1]).max() > 20


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
def test_dali_on_the_cpu_equals_pil_bit_for_bit():
    files = [encoded(picture(40 + i, 50, i), quality=60 + i, progressive=i % 2 == 0) for i in range(68)]
    files += [encoded(picture(50, 40).convert("L")), encoded(picture(41, 33), subsampling="4:4:4")]
    exif = Image.Exif()
    exif[0x0112] = 6  # an orientation is not applied: files are upright when they are built
    files.append(encoded(picture(50, 40), exif=exif))
    squash = np.arange(len(files)) % 3 == 0
    dali, pil = (open_decoder(backend, 2, "cpu") for backend in ("dali", "pil"))
    assert (dali.name, pil.name) == ("dali", "pil")
    assert np.array_equal(dali(as_arrays(*files), 32, squash), pil(as_arrays(*files), 32, squash))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [3, 66])
def test_a_damaged_jpeg_is_named_and_does_no_harm_to_the_next_batch(backend, first):
    good = encoded(picture(300, 200), quality=95)
    batch = [good] * 70
    batch[first], batch[68] = good[: len(good) // 2], b"no image"
    decoder, squash = open_decoder(backend, 2, "cpu"), np.zeros(70, bool)
    wanted = decoder(as_arrays(good), 32, squash[:1])
    with pytest.raises(BadImage) as caught:
        decoder(as_arrays(*batch), 32, squash)
    assert caught.value.index == first and "truncated" in caught.value.reason
    assert np.array_equal(decoder(as_arrays(good, good), 32, squash[:2]), np.repeat(wanted, 2, axis=0))


def test_an_upright_jpeg_keeps_its_bytes():
    for image in (picture(60, 40), picture(60, 40).convert("L")):
        file = encoded(image, quality=70, comment=b"kept")
        assert to_jpeg(file, "original", LIMIT) == (file, 60, 40)
        assert to_jpeg(file, "short256", LIMIT) == (file, 60, 40)  # never made larger


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_orientation_is_baked_in(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(picture(60, 40), form, exif=exif)
    jpeg, width, height = to_jpeg(file, "original", LIMIT)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
    assert (width, height) == upright.size == ((40, 60) if orientation > 4 else (60, 40))
    assert np.abs(pixels(jpeg) - np.asarray(upright).astype(int)).mean() < 2
    assert Image.open(io.BytesIO(jpeg)).getexif().get(0x0112) is None


def test_16_bit_grey_is_scaled():
    levels = np.repeat(np.array([0, 16448, 32896, 65535], np.uint16), 16)[None].repeat(16, 0)
    jpeg, *_ = to_jpeg(encoded(Image.fromarray(levels), "PNG"), "original", LIMIT)
    assert np.abs(pixels(jpeg)[8, 8::16, 0] - [0, 64, 128, 255]).max() <= 2


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1", "CMYK"])
def test_other_modes_become_rgb_as_pil_converts_them(mode):
    image = picture(48, 48)
    if mode.endswith("A"):
        image.putalpha(Image.linear_gradient("L").resize((48, 48)))  # alpha is dropped, not blended
    image = image.convert(mode)
    file = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    jpeg, width, height = to_jpeg(file, "original", LIMIT)
    stored = Image.open(io.BytesIO(jpeg))
    assert (stored.mode, stored.size, width, height) == ("RGB", (48, 48), 48, 48)
    assert np.abs(pixels(jpeg) - np.asarray(image.convert("RGB")).astype(int)).mean() < 4


def test_a_cmyk_jpeg_is_not_kept():
    jpeg, *_ = to_jpeg(encoded(picture(48, 48).convert("CMYK")), "original", LIMIT)
    assert Image.open(io.BytesIO(jpeg)).mode == "RGB"


@pytest.mark.parametrize(
    ("store", "size", "wanted"),
    [("short256", (600, 300), (512, 256)), ("short256", (301, 400), (256, 340)), ("crop224", (600, 300), (224, 224)),
     ("crop224", (50, 40), (224, 224))],
)  # fmt: skip
def test_stored_sizes(store, size, wanted):
    jpeg, *stored = to_jpeg(encoded(picture(*size)), store, LIMIT)
    assert tuple(stored) == Image.open(io.BytesIO(jpeg)).size == wanted


GOOD = encoded(picture(400, 300), quality=95)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (GOOD[: len(GOOD) // 2], "damaged image: image file is truncated"),
        (encoded(picture(64, 64), "PNG")[:-40], "damaged image"),
        (b"<html>not found</html>", "unreadable image: no known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "unreadable image: no known format"),
        (encoded(picture(4000, 2600), quality=10), "too large: 4000x2600 px"),
        (encoded(Image.new("F", (9, 9)), "TIFF"), "no known brightness range: mode F"),
    ],
)
def test_what_is_no_whole_image_is_refused(file, reason):
    with pytest.raises(BadImage) as caught:
        to_jpeg(file, "original", LIMIT)
    assert caught.value.reason.startswith(reason)
