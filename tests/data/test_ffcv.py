from __future__ import annotations

import importlib.util
import io
import os
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastbd.base.errors import UserError
from fastbd.data.beton import Beton, BetonWriter
from fastbd.data.decode_ffcv import CHUNK, open_stream

needs_ffcv = pytest.mark.skipif(not importlib.util.find_spec("ffcv"), reason="FFCV is not installed: make ffcv")
COUNT = 6 * CHUNK + 11  # the ring of three chunks is used twice


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colours, each seed its own; nothing symmetric."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", **{"quality": 90} | options)
    return data.getvalue()


def write(path: Path, jpegs: list[bytes], size: tuple[int, int] | None = None) -> Beton:
    with BetonWriter(path, len(jpegs), 0, False) as writer:
        for i, jpeg in enumerate(jpegs):
            width, height = size or Image.open(io.BytesIO(jpeg)).size
            tokens = np.zeros(77, np.uint16)
            writer.add(
                jpeg=jpeg, width=width, height=height, tokens=tokens, text_views=None, caption=f"image {i}", row_id=i
            )
    return Beton(path)


def pil(beton: Beton, i: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(beton.jpeg(i))).convert("RGB")).astype(int)


def assert_images(beton: Beton, batches, stream) -> None:
    """The images of the batches, in order, as near to PIL's as the fast transform comes on smooth colours."""
    found = list(stream)
    assert [len(images) for images in found] == [len(batch) for batch in batches]
    for ids, images in zip(batches, found, strict=True):
        for i, image in zip(ids, images, strict=True):
            wanted = pil(beton, i)
            assert image.shape == wanted.shape and image.dtype == np.uint8
            distance = np.abs(image - wanted)
            assert distance.max() <= 8 and distance.mean() < 2


def shuffled(beton: Beton, size: int, seed: int) -> list[np.ndarray]:
    order = np.random.default_rng(seed).permutation(len(beton))
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.fixture(scope="module")
def beton(tmp_path_factory) -> Beton:
    """Sizes of all kinds, full and halved chroma, progressive and grey."""
    jpegs = [
        encoded(picture(i, 20 + i % 50, 15 + i % 70), progressive=i % 3 == 0, subsampling=i % 3) for i in range(COUNT)
    ]
    for i, size in enumerate([(1, 1), (17, 301), (301, 17), (8, 8), (2, 1)]):
        jpegs[40 * i + 7] = encoded(picture(i, *size))
    jpegs[3], jpegs[99] = encoded(picture(3, 33, 47).convert("L")), encoded(picture(9, 1, 9).convert("L"))
    return write(tmp_path_factory.mktemp("ffcv") / "a.beton", jpegs)


@needs_ffcv
def test_order_and_pixels(beton):
    """All batches are kept until the end: none may lie in memory that FFCV has used again."""
    batches = shuffled(beton, 37, seed=0)
    assert len(batches[-1]) < 37
    assert_images(beton, batches, open_stream(beton, batches, 2))
    assert np.abs(pil(beton, 10) - pil(beton, 360)).mean() > 20  # another image of one size would not pass for it


@needs_ffcv
def test_a_second_stream_has_its_own_order(beton):
    for size, seed in ((500, 1), (1, 2), (64, 3)):
        batches = shuffled(beton, size, seed)[:20]
        assert_images(beton, batches, open_stream(beton, batches, 2))
    batches = [np.array([5, 5, 7]), np.array([5])]
    assert_images(beton, batches, open_stream(beton, batches, 2))
    assert list(open_stream(beton, [], 2)) == []


@needs_ffcv
def test_two_streams_at_once(beton):
    batches, others = shuffled(beton, 40, 4), shuffled(beton, 40, 5)
    pairs = list(zip(open_stream(beton, batches, 2), open_stream(beton, others, 2), strict=True))
    assert_images(beton, batches, [first for first, _ in pairs])
    assert_images(beton, others, [second for _, second in pairs])


@needs_ffcv
def test_any_number_of_threads_gives_the_same(beton):
    batches = shuffled(beton, 50, 6)[:3]
    few, many = (list(open_stream(beton, batches, threads)) for threads in (1, 10_000))
    for one, other in zip(sum(few, []), sum(many, []), strict=True):
        assert np.array_equal(one, other)


@needs_ffcv
@pytest.mark.parametrize("taken", [0, 1, 5, 10, 11])
def test_a_stream_left_early_leaves_no_thread(beton, taken):
    before = set(threading.enumerate())
    with closing(open_stream(beton, shuffled(beton, 37, 7), 2)) as stream:
        for _ in range(taken):
            next(stream)
    assert set(threading.enumerate()) == before


@needs_ffcv
def test_a_stream_left_early_decodes_no_more(beton, monkeypatch):
    from ffcv.loader.epoch_iterator import EpochIterator

    decoded, run_pipeline = [], EpochIterator.run_pipeline
    monkeypatch.setattr(EpochIterator, "run_pipeline", lambda self, *a: (decoded.append(a), run_pipeline(self, *a))[1])
    with closing(open_stream(beton, shuffled(beton, 37, 7) * 20, 2)) as stream:
        next(stream)
    assert 1 <= len(decoded) <= 5


@needs_ffcv
def test_pytorch_keeps_its_threads(beton):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        stream = open_stream(beton, shuffled(beton, 37, 8), 2)
        next(stream)
        new = []
        thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert new == [torch.get_num_threads()] == [3]
        stream.close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


@needs_ffcv
def test_a_damaged_image_is_none_and_never_another(tmp_path):
    """FFCV shows the image that had the slot before; `slight` is damage that PIL reads over."""
    jpegs = [encoded(picture(i, 60, 50)) for i in range(8)]
    slight = jpegs[6].replace(b"\xff\xdb", b"\0\0\xff\xdb", 1)
    beton = write(tmp_path / "a.beton", [*jpegs[:6], slight, jpegs[7]])
    data = bytearray(beton.path.read_bytes())
    for i in (2, 4):  # one is cut short, one has no header
        start = data.index(jpegs[i])
        at = start + (len(jpegs[i]) // 2 if i == 2 else 0)
        data[at : at + 2] = b"\xff\xd9"
    beton.path.write_bytes(data)
    beton = Beton(beton.path)
    batches = [np.arange(8)] * (4 * CHUNK // 8)
    for images in open_stream(beton, batches, 2):
        assert [i for i, image in enumerate(images) if image is None] == [2, 4, 6]
        rest = [0, 1, 3, 5, 7]
        assert_images(beton, [rest], [[images[i] for i in rest]])
    assert pil(beton, 6).shape == (50, 60, 3)


@needs_ffcv
def test_a_file_made_anew_under_the_same_name(tmp_path):
    for seed in (1, 2):
        beton = write(tmp_path / "a.beton", [encoded(picture(10 * seed + i, 40, 30)) for i in range(3)])
        os.utime(beton.path, (seed, seed))
        batches = [np.array([2, 0, 1])]
        assert_images(beton, batches, open_stream(beton, batches, 2))


@needs_ffcv
def test_a_large_image_makes_the_chunks_smaller(tmp_path):
    beton = write(
        tmp_path / "a.beton", [*(encoded(picture(i, 30, 20)) for i in range(40)), encoded(picture(0, 3000, 2600))]
    )
    batches = [np.array([3, 40, 1]), np.arange(2, 40)]
    assert_images(beton, batches, open_stream(beton, batches, 2))


def test_an_image_too_large_for_the_ring_is_refused(tmp_path):
    beton = write(tmp_path / "a.beton", [encoded(picture(0, 9, 9))], size=(65535, 12000))
    with pytest.raises(UserError, match="image of 786 million pixels.*--decode pil"):
        open_stream(beton, [np.array([0])], 1)


def test_several_files_are_refused(beton):
    one = Beton(beton.path)
    one.path = beton.path.with_name("*.beton")  # as the reader of several files has it
    with pytest.raises(UserError, match=r"reads a single \.beton file.*\*\.beton is several.*--decode pil"):
        open_stream(one, [np.array([0])], 1)


@needs_ffcv
def test_a_file_of_ffcvs_own_writer_is_refused(tmp_path):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    path = tmp_path / "theirs.beton"
    fields = {"image": RGBImageField(write_mode="jpg"), "row_id": IntField()}
    images = [(np.full((9, 12, 3), 20 * i, np.uint8), i) for i in range(4)]
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(images, chunksize=2)
    with pytest.raises(UserError, match="not made by `fastbd build`.*unchecked.*--decode pil"):
        open_stream(Beton(path), [np.arange(4)], 1)


def test_without_ffcv(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv.loader", None)
    with pytest.raises(UserError, match="cannot load FFCV .*make ffcv.*--decode pil"):
        open_stream(write(tmp_path / "a.beton", [encoded(picture(0, 9, 9))]), [np.array([0])], 1)


@needs_ffcv
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_in_ffcvs_thread_ends_the_stream(beton, monkeypatch):
    from ffcv.loader.epoch_iterator import EpochIterator

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(EpochIterator, "run_pipeline", fail)
    with pytest.raises(RuntimeError, match="FFCV's thread has died"):
        next(open_stream(beton, shuffled(beton, 37, 9), 2))
