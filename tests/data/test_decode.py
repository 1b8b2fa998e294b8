from __future__ import annotations

import gc
import importlib.util
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastbd.data.decode import BadImage, OnDemand, open_decoder, read, to_jpeg
from fastbd.errors import UserError

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


class Files:
    """As much of a .beton as a decoder needs."""

    path = "files"

    def __init__(self, *files: bytes):
        self.files = as_arrays(*files)

    def jpeg(self, i: int) -> np.ndarray:
        return self.files[i]


def decoded(backend: str, files: Files, batches: list[list[int]], bad: list[int] | None = None) -> list[list]:
    """Each batch's images, kept until all have been taken."""

    def one(row: int) -> torch.Tensor:
        try:
            return torch.from_numpy(read(files.jpeg(row)))
        except BadImage:
            bad.append(row)
            return torch.zeros(1, 1, 3, dtype=torch.uint8)

    decoder = open_decoder(backend, 2, "cpu")
    assert decoder.name == backend
    found = [list(images) for images in decoder.stream(files, [np.array(batch) for batch in batches], one)]
    assert decoder.decoded == sum(map(len, batches))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_come_whole_and_in_order_and_as_pillow_reads_them(backend):
    files = [encoded(picture(40 + i, 50, i), quality=60 + i, progressive=i % 2 == 0) for i in range(28)]
    files += [encoded(picture(50, 40).convert("L")), encoded(picture(41, 33), subsampling="4:4:4")]
    files += [encoded(picture(1, 1)), encoded(picture(17, 301))]
    exif = Image.Exif()
    exif[0x0112] = 6  # an orientation is not applied: files are upright when they are built
    files.append(encoded(picture(50, 40), exif=exif))
    rows = np.random.default_rng(0).permutation(len(files)).tolist()
    batches = [rows[:7], rows[7:14], rows[14:21], rows[21:28], rows[28:]]
    found = decoded(backend, Files(*files), batches)
    for batch, images in zip(batches, found, strict=True):
        assert len(batch) == len(images)
        for row, image in zip(batch, images, strict=True):
            assert image.dtype == torch.uint8 and np.array_equal(image, pixels(files[row])), row


@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_images_are_left_to_the_caller_and_do_no_harm_to_others(backend):
    files = [encoded(picture(30 + i, 20, i), quality=95) for i in range(12)]
    whole = [pixels(file) for file in files]
    files[4], files[6] = files[4][: len(files[4]) // 2], b"no image"
    bad = []
    found = decoded(backend, Files(*files), [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10], [11, 4]], bad)
    assert sorted(bad) == [4, 4, 6]
    rows = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 4]
    for row, image in zip(rows, (image for batch in found for image in batch), strict=True):
        assert row in (4, 6) or np.array_equal(image, whole[row]), row


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decoder_can_be_used_again_and_left_in_the_middle(backend):
    files = Files(*(encoded(picture(30 + i, 20, i)) for i in range(9)))
    decoder = open_decoder(backend, 1, "cpu")
    for batches in ([[0, 1], [2, 3], [4]], [[5, 6, 7], [8]], [[3]]):
        stream = decoder.stream(
            files, [np.array(batch) for batch in batches], lambda i: torch.from_numpy(read(files.jpeg(i)))
        )
        assert [[len(image[0]) for image in images] for images in stream] == [[30 + i for i in b] for b in batches]
        left = decoder.stream(files, [np.arange(4), np.arange(4)], lambda i: torch.from_numpy(read(files.jpeg(i))))
        assert [len(image[0]) for image in next(left)] == [30, 31, 32, 33]
        left.close()


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
def test_a_dali_stream_that_is_left_takes_its_threads_along():
    files = Files(encoded(picture(30, 20)))
    decoder = open_decoder("dali", 2, "cpu")
    counts = []
    gc.disable()  # it would end them too, some time
    try:
        for _ in range(3):
            left = decoder.stream(files, [np.zeros(2, int)] * 5, lambda i: torch.from_numpy(read(files.jpeg(i))))
            next(left)
            left.close()
            counts.append(len(os.listdir("/proc/self/task")))
    finally:
        gc.enable()
    assert counts[1] <= counts[0] and counts[2] <= counts[0]


def test_an_image_on_demand_is_made_when_asked_for():
    made = []
    images = OnDemand(3, lambda k: made.append(k) or k)
    assert len(images) == 3 and not made
    assert list(images) == [0, 1, 2] == made


def test_decoding_threads_leave_the_number_of_this_one_as_it_is():
    """In a process of its own, where nothing has asked for the number before."""
    pool = "from fastbd.data.decode import open_decoder; pool = open_decoder('pil', 2, 'cpu').pool;"
    inner = "print(*set(pool.map(lambda _: torch.get_num_threads(), range(8))));"
    own, env = "import torch; print(torch.get_num_threads())", os.environ | {"OMP_NUM_THREADS": "2"}
    with_pool, alone = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
        for code in ("import torch;" + pool + inner + own, own)
    )
    assert with_pool == "1\n" + alone


def test_a_decoder_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert open_decoder("auto", 1, "cpu").name == "pil"
    for name, remedy in (("dali", "pip install nvidia-dali-cuda130"), ("ffcv", "make ffcv")):
        with pytest.raises(UserError, match=f"--decode {name} needs .*{remedy}, or give --decode pil"):
            open_decoder(name, 1, "cpu")


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
