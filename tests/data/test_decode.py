from __future__ import annotations

import ctypes
import gc
import importlib.util
import io
import os
import resource
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import torch
from damage import damaged, harmless, scan_of
from forked import forked
from PIL import Image, ImageOps, features

from fastbd.base.errors import UserError
from fastbd.data import decode
from fastbd.data.decode import BadImage, OnDemand, _by_turbo, open_decoder, read, to_stored
from fastbd.data.decode_dali import Dali, Known, _with_left, engine_hints, is_like
from fastbd.kernels.augment import Ragged

LIMIT = 10_000_000
HAS_DALI = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
BACKENDS = ["pil", pytest.param("dali", marks=needs_dali)]


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

    def __len__(self) -> int:
        return len(self.files)

    def jpeg(self, i: int) -> np.ndarray:
        return self.files[i]

    def will_need(self, ids: np.ndarray) -> None:
        """They are in memory."""


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


KINDS = {
    "baseline": {},
    "full chroma": {"subsampling": 0},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_which_images_are_bad_is_pillows_word_whatever_the_damage_and_the_others_come_to_no_harm(backend, kind):
    """Three images to a batch, of a width that names them; the one in the middle is damaged."""
    cases = damaged(encoded(picture(200, 150), quality=95, **KINDS[kind]))
    files = [encoded(picture(200 + i, 20, i), **KINDS[kind]) for i in range(3 * len(cases))]
    files[1::3] = [file for file, _ in cases.values()]
    expected, refused = {}, []
    for row, file in enumerate(files):
        try:
            expected[row] = pixels(file)
        except Exception:  # Pillow's are of nearly any kind
            refused.append(row)
    bad = []
    batches = [[row, row + 1, row + 2] for row in range(0, len(files), 3)]
    found = decoded(backend, Files(*files), batches, bad)
    assert len(refused) >= 20 and bad == refused
    for row, image in zip(range(len(files)), (image for batch in found for image in batch), strict=True):
        name = list(cases)[row // 3]
        assert row in refused or np.array_equal(image, expected[row]), (name, row)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pillow_is_agreed_with_on_any_damage(backend):
    """Cuts, zeros, noise, missing bytes and single bits at random places: the same images are bad, the others alike."""
    rng, files = np.random.default_rng(5), []
    for i in range(300):
        width, height = rng.integers(16, 120, 2)
        file = bytearray(encoded(picture(width, height, i), quality=90, **list(KINDS.values())[i % 4]))
        at, length = int(rng.integers(len(file))), int(2 ** rng.uniform(0, 9))
        new = {
            0: b"",
            1: bytes(length),
            2: rng.integers(0, 256, length, np.uint8).tobytes(),
            3: b"",
            4: bytes([file[at] ^ 1 << rng.integers(8)]),
        }[i // 4 % 5]
        file[at : at + (len(file) if i // 4 % 5 == 0 else length if i // 4 % 5 == 3 else len(new))] = new
        files.append(bytes(file))
    bad, by_pillow = [], {}
    for row, file in enumerate(files):
        with suppress(Exception):  # Pillow's are of nearly any kind
            by_pillow[row] = pixels(file)
    batches = [list(range(first, first + 10)) for first in range(0, len(files), 10)]
    ours = sum(decoded(backend, Files(*files), batches, bad), [])
    assert 100 < len(bad) < 200 and [*by_pillow] == [row for row in range(len(files)) if row not in bad]
    for row, image in by_pillow.items():
        assert np.array_equal(ours[row], image), row


@pytest.mark.parametrize("samples", ["444", "422", "420", "440", "411", "Gray"])
def test_libjpeg_turbo_gives_pillows_pixels(samples):
    """Of odd sizes, sparse and progressive files, however the chroma is sampled; it reads them all."""
    simplejpeg = pytest.importorskip("simplejpeg")
    for width, height in ((1, 1), (2, 3), (7, 9), (16, 16), (17, 31), (100, 75)):
        image = np.asarray(picture(width, height))
        for quality in (5, 60, 100):
            grey = samples == "Gray"
            space = {"colorspace": "GRAY"} if grey else {"colorsubsampling": samples}
            source = np.ascontiguousarray(image[..., :1] if grey else image)
            file = simplejpeg.encode_jpeg(source, quality, **space)
            (data,) = as_arrays(file)
            assert np.array_equal(_by_turbo(data), pixels(file)), (width, height, quality)
    for options in ({"progressive": True}, {"restart_marker_blocks": 2}, {"optimize": True}):
        file = encoded(picture(61, 47).convert("L" if samples == "Gray" else "RGB"), **options)
        (data,) = as_arrays(file)
        assert np.array_equal(_by_turbo(data), pixels(file)), options


def test_what_libjpeg_turbo_would_convert_in_another_way_is_left_to_pillow(monkeypatch):
    cmyk, png = encoded(picture(20, 10).convert("CMYK")), encoded(picture(20, 10), "PNG")
    for file in (cmyk, png):
        assert _by_turbo(*as_arrays(file)) is None and np.array_equal(read(*as_arrays(file)), pixels(file))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 199)  # which Pillow warns of
    assert _by_turbo(*as_arrays(encoded(picture(20, 10)))) is None


def test_a_file_whose_samples_simplejpeg_has_no_name_for_is_left_to_pillow():
    """4:4:1, as of a turned 4:1:1 of a video camera: a unit has six blocks, as that of 4:2:0 has."""
    file = bytearray(encoded(picture(16, 16), subsampling=2))
    at = file.index(b"\xff\xc0")
    assert file[at + 5 : at + 12] == bytes((0, 16, 0, 16, 3, 1, 0x22))
    file[at + 5 : at + 9], file[at + 11] = struct.pack(">HH", 32, 8), 0x14
    (data,) = as_arrays(bytes(file))
    assert np.array_equal(read(data), pixels(bytes(file))) and read(data).shape == (32, 8, 3)


def test_without_libjpeg_turbo_pillow_reads_all(monkeypatch):
    monkeypatch.setattr(decode, "simplejpeg", None)
    file = encoded(picture(30, 20))
    assert _by_turbo(*as_arrays(file)) is None and np.array_equal(read(*as_arrays(file)), pixels(file))


@needs_dali
@pytest.mark.parametrize("places", [[0], [3], [3, 4], [4, 6], [8], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
def test_no_batch_is_lost_or_repeated_after_an_error_and_the_image_is_not_tried_again(places, capsys):
    """The damage is one that only DALI itself finds; the widths name the images."""
    broken = damaged(encoded(picture(99, 50)))["no such Huffman code"][0]
    files = Files(*(broken if i // 2 in places and i % 2 else encoded(picture(30 + i, 20, i)) for i in range(18)))
    decoder, bad = open_decoder("dali", 2, "cpu"), []

    def one(row: int) -> torch.Tensor:
        bad.append(row)
        return torch.zeros(1, 1, 3, dtype=torch.uint8)

    order = [np.array([2 * k, 2 * k + 1]) for k in range(9)]
    for _ in range(2):
        widths = [image.shape[1] for images in decoder.stream(files, order, one) for image in images]
        assert widths == [1 if i // 2 in places and i % 2 else 30 + i for i in range(18)]
    assert bad == 2 * [2 * place + 1 for place in places] and decoder.left_to_pillow == len(places)
    assert capsys.readouterr().out.count("DALI cannot decode image") == len(places)


@needs_dali
def test_what_is_no_images_fault_is_not_laid_on_one():
    """A file that is damaged the first time it is read only."""
    whole, broken = encoded(picture(99, 50)), damaged(encoded(picture(99, 50)))["no such Huffman code"][0]

    class Flickering(Files):
        reads = 0

        def jpeg(self, i: int) -> np.ndarray:
            self.reads += i == 1
            return as_arrays(broken if i == 1 and self.reads <= 2 else whole)[0]  # looked at, and decoded

    decoder = open_decoder("dali", 1, "cpu")
    with pytest.raises(RuntimeError, match="Failed to decode sample"):
        list(decoder.stream(Flickering(whole, whole), [np.arange(2)], lambda row: pytest.fail("went to Pillow")))
    assert decoder.left_to_pillow == 0


@needs_dali
def test_images_left_to_pillow_take_their_places_among_those_on_a_gpu():
    """Here all lie in main memory; the addresses and sizes are what a kernel reads."""
    images = [torch.full((4 + k, 5, 3), k, dtype=torch.uint8) for k in range(4)]
    left = np.zeros(10, bool)
    left[[7, 2]] = True
    mended = _with_left(
        Ragged.of(images),
        np.array([5, 7, 9, 2]),
        left,
        lambda row: torch.full((2, row, 3), 100 + row, dtype=torch.uint8),
    )
    assert mended.sizes.tolist() == [[4, 5], [2, 7], [6, 5], [2, 2]]
    for address, (height, width), level in zip(mended.addresses, mended.sizes, [0, 107, 2, 102], strict=True):
        there = np.ctypeslib.as_array((ctypes.c_uint8 * int(height * width * 3)).from_address(int(address)))
        assert (there == level).all()


def test_pixels_that_are_a_little_off_are_like_pillows_and_a_damaged_part_is_not():
    for size in ((200, 150), (640, 480), (17, 301), (8, 8), (1, 1)):
        file = as_arrays(encoded(picture(*size), quality=95))[0]
        right = read(file).astype(int)
        noise = np.random.default_rng(0).integers(-8, 9, right.shape)
        shifted = np.roll(right, 1, 1)
        for near in (right, right + noise, right + 4, shifted if min(size) > 30 else right):
            assert is_like(near.clip(0, 255).astype(np.uint8), file), size
        cut = right.copy()
        cut[-8:] = 255 * (right[-8:].mean() < 128)  # as if the last blocks had not been decoded
        assert not is_like(cut.astype(np.uint8), file), size
        assert not is_like(np.zeros((2, 2, 3), np.uint8), file), size
    assert not is_like(np.zeros((150, 200, 3), np.uint8), as_arrays(encoded(picture(200, 150))[:2000])[0])


def test_what_the_engines_may_have_decoded_is_compared_once(capsys):
    files = Files(*(encoded(picture(60, 50, i), quality=95) for i in range(3)), encoded(picture(60, 50, 3))[:-100])
    right = [pixels(file.tobytes()).astype(np.uint8) for file in files.files[:3]]
    dali = Dali(1, 1.0, open_decoder("pil", 2, "cpu").pool)
    known = Known(len(files))
    known.left[3] = True  # it has been before
    dali._compare(files, known, np.array([1, 3, 0]), [right[1], right[0], 255 - right[0]])
    assert known.left.tolist() == [True, False, False, True] and known.compared.tolist() == [True, True, False, True]
    dali._compare(files, known, np.array([2, 1]), [right[2], 255 - right[1]])  # row 1 was right
    assert known.left.tolist() == [True, False, False, True] and known.compared.all()
    assert capsys.readouterr().out.splitlines() == [
        "DALI gives other pixels than Pillow for image 0 of files: it is left to Pillow."
    ]


def test_the_engines_are_told_of_the_largest_image_unless_it_would_take_too_much():
    width, height = np.array([300, 500], np.uint16), np.array([400, 200], np.uint16)
    hints = {"preallocate_width_hint": 500, "preallocate_height_hint": 400}
    assert engine_hints(width, height, 256, 1.0) == hints
    assert engine_hints(width, height, 256, 0.0) == {}
    assert engine_hints(np.array([6000], np.uint16), np.array([4000], np.uint16), 256, 0.65) == {}
    assert engine_hints(np.array([6000], np.uint16), np.array([4000], np.uint16), 16, 0.65) != {}


@needs_dali
def test_a_decoder_says_what_its_pixels_depend_on():
    said = {load: open_decoder("dali", 1, "cuda", load).about for load in (0, 1, 0.65)}
    assert said[0] == open_decoder("auto", 1, "cuda:1").about == "dali on a GPU, hw_decoder_load 0"
    assert said[1] == "dali on a GPU, hw_decoder_load 1"
    assert said[0.65] == "dali on a GPU, hw_decoder_load 0.65 (an image's pixels depend on its batch)"
    for load in (0, 0.65):
        assert (
            open_decoder("dali-cpu", 1, "cuda", load).about == open_decoder("dali", 1, "cpu").about == "dali on a CPU"
        )


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


@needs_dali
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
    """In a thread that has not asked for it before."""

    def numbers() -> tuple[set[int], int]:
        pool = open_decoder("pil", 2, "cpu").pool
        return set(pool.map(lambda _: torch.get_num_threads(), range(8))), torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as fresh:
            assert fresh.submit(numbers).result() == ({1}, 2)
    finally:
        torch.set_num_threads(before)


def test_a_decoder_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert open_decoder("auto", 1, "cpu").name == "pil"
    for name, remedy in (("dali", "pip install nvidia-dali-cuda130"), ("ffcv", "make ffcv")):
        with pytest.raises(UserError, match=f"--decode {name} needs .*{remedy}, or give --decode pil"):
            open_decoder(name, 1, "cpu")


def test_an_upright_jpeg_keeps_its_bytes():
    for image in (picture(60, 40), picture(60, 40).convert("L")):
        file = encoded(image, quality=70, comment=b"kept")
        assert to_stored(file, "original", LIMIT) == (file, 60, 40)
        assert to_stored(file, "short256", LIMIT) == (file, 60, 40)  # never made larger


needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
AVIF = pytest.param("AVIF", marks=needs_avif)


def test_orientation_is_ignored_as_published():
    """The bytes stay, and no decoder turns what they hold; what is encoded anew is not turned either."""
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg, flat = (encoded(picture(60, 40), form, exif=exif) for form in ("JPEG", "PNG"))
    assert to_stored(jpeg, "original", 10**6, "ignore") == (jpeg, 60, 40)
    assert read(np.frombuffer(jpeg, np.uint8)).shape == (40, 60, 3)
    stored, *size = to_stored(flat, "original", 10**6, "ignore")
    assert size == [60, 40] and read(np.frombuffer(stored, np.uint8)).shape == (40, 60, 3)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", AVIF])
def test_orientation_is_baked_in(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(picture(60, 40), form, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
    for store, distance in (("original", 2), ("png", 0)):
        stored, width, height = to_stored(file, store, LIMIT)
        assert (width, height) == upright.size == ((40, 60) if orientation > 4 else (60, 40))
        assert np.abs(pixels(stored) - np.asarray(upright).astype(int)).mean() <= distance
        assert Image.open(io.BytesIO(stored)).getexif().get(0x0112) is None


LOSSLESS = {"PNG": {}, "GIF": {}, "BMP": {}, "TIFF": {}, "WEBP": {"lossless": True}}


@pytest.mark.parametrize("form", [*LOSSLESS, AVIF])
def test_a_png_keeps_the_pixels_of_what_is_no_jpeg(form):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    file = encoded(image, form, **LOSSLESS.get(form, {}))
    stored, *size = to_stored(file, "png", LIMIT)
    assert size == [50, 40] and np.array_equal(pixels(stored), pixels(file))
    assert np.array_equal(read(as_arrays(stored)[0]), pixels(file))
    assert (stored == file) == (form == "PNG")
    assert form in ("GIF", "AVIF") or np.array_equal(pixels(stored), image)
    assert to_stored(file, "original", LIMIT)[0][:2] == b"\xff\xd8"


def test_with_png_a_jpeg_stays_unless_it_must_be_written_anew():
    for image in (picture(60, 40), picture(60, 40).convert("L")):
        file = encoded(image, quality=70)
        assert to_stored(file, "png", LIMIT) == (file, 60, 40)
    file = encoded(picture(48, 48).convert("CMYK"))
    assert np.array_equal(pixels(to_stored(file, "png", LIMIT)[0]), pixels(file))


@needs_avif
def test_avif_is_read():
    jpeg, width, height = to_stored(encoded(picture(60, 40), "AVIF", quality=90), "original", LIMIT)
    assert (width, height) == (60, 40) and np.abs(pixels(jpeg) - np.asarray(picture(60, 40)).astype(int)).mean() < 3


def test_16_bit_grey_is_scaled():
    levels = np.repeat(np.array([0, 16448, 32896, 65535], np.uint16), 16)[None].repeat(16, 0)
    jpeg, *_ = to_stored(encoded(Image.fromarray(levels), "PNG"), "original", LIMIT)
    assert np.abs(pixels(jpeg)[8, 8::16, 0] - [0, 64, 128, 255]).max() <= 2


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1", "CMYK"])
def test_other_modes_become_rgb_as_pil_converts_them(mode):
    image = picture(48, 48)
    if mode.endswith("A"):
        image.putalpha(Image.linear_gradient("L").resize((48, 48)))  # alpha is dropped, not blended
    image = image.convert(mode)
    file = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    jpeg, width, height = to_stored(file, "original", LIMIT)
    stored = Image.open(io.BytesIO(jpeg))
    assert (stored.mode, stored.size, width, height) == ("RGB", (48, 48), 48, 48)
    assert np.abs(pixels(jpeg) - np.asarray(image.convert("RGB")).astype(int)).mean() < 4


def test_a_cmyk_jpeg_is_not_kept():
    jpeg, *_ = to_stored(encoded(picture(48, 48).convert("CMYK")), "original", LIMIT)
    assert Image.open(io.BytesIO(jpeg)).mode == "RGB"


@pytest.mark.parametrize(
    ("store", "size", "wanted"),
    [
        ("short256", (600, 300), (512, 256)),
        ("short256", (301, 400), (256, 340)),
        ("crop224", (600, 300), (224, 224)),
        ("crop224", (50, 40), (224, 224)),
    ],
)
def test_stored_sizes(store, size, wanted):
    jpeg, *stored = to_stored(encoded(picture(*size)), store, LIMIT)
    assert tuple(stored) == Image.open(io.BytesIO(jpeg)).size == wanted


def as_it_was(image: Image.Image) -> Image.Image:
    """Short side to 224 px, whatever the long side becomes, then cropped."""
    short, long = sorted(image.size)
    size = (224, int(224 * long / short)) if image.width <= image.height else (int(224 * long / short), 224)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    return image.crop((left, top, left + 224, top + 224))


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (50, 40), (90, 720), (296, 37)])
def test_the_middle_is_what_it_was_when_all_of_the_image_was_resized(size):
    stored, *_ = to_stored(encoded(picture(*size), "PNG"), "crop224", LIMIT)
    assert stored == encoded(as_it_was(picture(*size)), quality=95, subsampling="4:4:4")


@pytest.mark.parametrize("size", [(1, 600), (600, 1), (30, 1001), (3001, 100)])
def test_the_middle_of_a_slender_image_is_cut_out_before_it_is_resized(size):
    """At most half a pixel of the file away from where all of it would have been cropped, and nearly always alike."""
    image = picture(*size)
    stored, *_ = to_stored(encoded(image, "PNG"), "crop224", LIMIT)
    off = np.abs(pixels(stored) - np.asarray(as_it_was(image)).astype(int))
    assert off.mean() < 3


def memory_of_a_slender_image() -> None:
    """Print the kB that a process takes more for one."""
    file = io.BytesIO()
    Image.new("RGB", (1, 8000)).save(file, "PNG")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    to_stored(file.getvalue(), "crop224", 10**6)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_a_slender_image_takes_no_more_memory_than_another(tmp_path):
    """It was 1.7 GB."""
    process = forked(memory_of_a_slender_image, cwd=tmp_path, said=tmp_path / "said.txt")
    process.join()
    assert process.exitcode == 0 and int((tmp_path / "said.txt").read_text()) < 20_000


def test_sides_that_no_jpeg_can_have_are_refused():
    for store in ("original", "png", "short256"):
        with pytest.raises(BadImage, match="too long: 2x65501 px, of at most 65,500 a side"):
            to_stored(encoded(Image.new("L", (2, 65_501)), "PNG"), store, LIMIT)
    assert to_stored(encoded(Image.new("L", (2, 65_501)), "PNG"), "crop224", LIMIT)[1:] == (224, 224)


JPEGS = {**KINDS, "grey": {}, "own tables": {"optimize": True}, "halved chroma": {"subsampling": 1}}


def of_kind(kind: str, size: tuple[int, int], ground: bool) -> bytes:
    """A JPEG of smooth colours, on a white ground or all over."""
    image = Image.new("RGB", size, "white") if ground else picture(*size)
    image.paste(picture(size[0] // 2, size[1] // 2), (size[0] // 4, size[1] // 4))
    return encoded(image.convert("L" if kind == "grey" else "RGB"), quality=85, **JPEGS[kind])


@pytest.mark.parametrize("ground", [False, True])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_whose_data_end_early_is_refused_and_no_whole_one_is(kind, ground):
    """libjpeg fills in what is missing, and Pillow does not tell."""
    for size in ((200, 200), (33, 47), (301, 17), (129, 97)):
        file = of_kind(kind, size, ground)
        for name, whole in harmless(file).items():
            assert to_stored(whole, "original", LIMIT)[0] == whole, (size, name)
        start, length = scan_of(file), len(file) - scan_of(file)
        for share in (0, 0.1, 0.5, 0.8):
            if kind == "progressive" and share:
                continue  # where a scan ends, nothing is missing that a decoder could know of
            at = start + int(length * share)
            at -= file[at - 1] == 0xFF
            early = file[:at] + b"\xff\xd9"
            read(as_arrays(early)[0])  # it can be decoded
            with pytest.raises(BadImage, match="damaged image: its data end before its last row"):
                to_stored(early, "original", LIMIT)


def test_a_progressive_jpeg_that_ends_within_a_scan_is_refused():
    file = of_kind("progressive", (200, 200), False)
    scans = [at for at in range(len(file) - 1) if file[at : at + 2] == b"\xff\xda"]
    assert len(scans) > 5
    for scan, after in zip(scans, [*scans[1:], len(file)], strict=True):
        early = file[: (scan + 10 + after) // 2] + b"\xff\xd9"
        if after - scan > 200:
            with pytest.raises(BadImage, match="end before"):
                to_stored(early, "original", LIMIT)
        to_stored(file[:after] + b"\xff\xd9", "original", LIMIT)  # coarser, but nothing is missing


def png(size: tuple[int, int], depth: int, colours: int, interlaced: int, length: int, cuts: int = 1) -> bytes:
    """A PNG of black, white or the like, of so many unpacked bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = zlib.compress(bytes(length))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colours, 0, 0, interlaced))
    palette = chunk(b"PLTE", bytes(3)) if colours == 3 else b""
    parts = np.array_split(np.frombuffer(packed, np.uint8), cuts)
    data = b"".join(chunk(b"IDAT", part.tobytes()) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + header + palette + data + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "depth", "colours", "interlaced", "length"),
    [
        ((5, 3), 8, 2, 0, 3 * 16),
        ((5, 3), 8, 6, 0, 3 * 21),
        ((5, 3), 16, 4, 0, 3 * 21),
        ((9, 2), 1, 0, 0, 2 * 3),
        ((3, 7), 4, 3, 0, 7 * 3),
        ((8, 8), 8, 0, 1, 2 + 2 + 3 + 2 * 3 + 2 * 5 + 4 * 5 + 4 * 9),
        ((1, 1), 8, 2, 1, 4),  # all passes but the first are empty
        ((3, 1), 8, 0, 1, 2 + 2 + 2),
    ],
)
def test_a_png_that_lacks_rows_is_refused(size, depth, colours, interlaced, length):
    """Pillow would leave them black. The lengths are counted by hand."""
    for more in (0, 5):
        assert to_stored(png(size, depth, colours, interlaced, length + more), "png", LIMIT)[1:] == size
    assert to_stored(png(size, depth, colours, interlaced, length, cuts=3), "png", LIMIT)[1:] == size
    with pytest.raises(BadImage, match="damaged image"):
        to_stored(png(size, depth, colours, interlaced, length - 1), "png", LIMIT)


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
        to_stored(file, "original", LIMIT)
    assert caught.value.reason.startswith(reason)
