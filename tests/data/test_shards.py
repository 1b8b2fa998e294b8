from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest

from fastbd.base.errors import UserError
from fastbd.data.beton import Beton, BetonWriter
from fastbd.data.shards import Shards, open_beton


def write(path: Path, rows: range, views: int = 1, classes: str | None = None) -> Path:
    """Row i has width i + 1, tokens i and the class classes[i]; the row ids begin anew in each file."""
    labels = {name: label for label, name in enumerate(sorted({classes[i] for i in rows}))} if classes else {}
    with BetonWriter(path, len(rows), views, bool(classes)) as writer:
        for row_id, i in enumerate(rows):
            writer.add(
                jpeg=bytes([i] * (i + 1)),
                width=i + 1,
                height=100 + i,
                caption=f"caption {i}",
                row_id=row_id,
                tokens=np.full(77, i),
                text_views=np.full((views, 77), 1000 + i),
                label=labels.get(classes[i]) if classes else None,
                class_name=classes[i] if classes else None,
            )
    return path


def test_shards_read_as_the_one_file_they_were_cut_from(tmp_path):
    classes = "dbadcbaacdab"
    whole = Beton(write(tmp_path / "whole.beton", range(12), classes=classes))
    for shard, rows in {1: range(0, 5), 2: range(5, 6), 10: range(6, 12)}.items():
        write(tmp_path / f"part-{shard}.beton", rows, classes=classes)
    data = open_beton(tmp_path / "part-*.beton")
    assert isinstance(data, Shards) and len(data) == 12 and data.num_text_views == 1
    assert data.class_names == whole.class_names == list("abcd")
    for column in ("width", "height", "labels"):
        assert np.array_equal(getattr(data, column), getattr(whole, column)), column
    assert data.row_id.tolist() == [*range(5), 0, *range(6)]
    ids = np.array([11, 0, 5, 4, 6, 5])
    assert np.array_equal(data.tokens(ids), whole.tokens(ids))
    assert np.array_equal(data.text_view(ids), whole.text_view(ids))
    assert np.array_equal(data.tokens(7), whole.tokens(7))
    for i in range(12):
        assert data.caption(i) == whole.caption(i) and np.array_equal(data.jpeg(i), whole.jpeg(i))
    with pytest.raises(IndexError):
        data.jpeg(12)
    with pytest.raises(UserError, match="part-1.beton holds 1 text views"):
        data.text_view(ids, 1)


def test_images_are_numbered_through(tmp_path):
    """Image 7 is in two shards, and stored twice in one of them."""
    for name, images in {"a1": [5, None, 7], "a2": [9], "a3": [8, 7, None, 6, 7]}.items():
        with BetonWriter(tmp_path / f"{name}.beton", 5, 0, False) as writer:
            for i, image in enumerate(images):
                writer.add(
                    jpeg=image and bytes([image] * 99),
                    width=1,
                    height=1,
                    caption="",
                    row_id=i,
                    tokens=np.zeros(77),
                    text_views=None,
                )
    images = open_beton(tmp_path / "a*.beton").image_of
    assert images.tolist() == [0, 0, 1, 2, 3, 1, 1, 4, 1] and images.dtype == np.int64


def test_the_fingerprint_names_the_shards_and_their_order(tmp_path):
    write(tmp_path / "a1.beton", range(3))
    alone = open_beton(tmp_path / "a*.beton")
    assert isinstance(alone, Beton) and alone.fingerprint == Beton(tmp_path / "a1.beton").fingerprint
    write(tmp_path / "a2.beton", range(3, 7))
    both = open_beton(tmp_path / "a*.beton").fingerprint
    (tmp_path / "a1.beton").rename(tmp_path / "a3.beton")
    turned = open_beton(tmp_path / "a*.beton").fingerprint
    assert len({alone.fingerprint, both, turned}) == 3 and len(both) == 64


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    write(tmp_path / "set[1].beton", range(3))
    assert len(open_beton(tmp_path / "set[1].beton")) == 3


def test_shards_that_do_not_fit_together(tmp_path):
    write(tmp_path / "a0.beton", range(2))
    write(tmp_path / "a1.beton", range(2), views=2)
    with pytest.raises(UserError, match=r"a0.beton and .*a1.beton differ in their number of text views"):
        open_beton(tmp_path / "a*.beton")
    write(tmp_path / "a1.beton", range(2), classes="ab")
    with pytest.raises(UserError, match=r"differ in their kind \(with labels, or without\)"):
        open_beton(tmp_path / "a*.beton")
    with pytest.raises(UserError, match=r"no file matches .*b\*.beton"):
        open_beton(tmp_path / "b*.beton")
    (tmp_path / "a1.beton").write_bytes(b"no beton" * 100)
    with pytest.raises(UserError, match="a1.beton is no whole .beton file"):
        open_beton(tmp_path / "a*.beton")


def test_a_study_on_shards(fastbd, study, tmp_path):
    """Poison, train, clean and evaluate on patterns; the clean rows are those that the plan leaves alone."""
    lines = (study / "train.csv").read_text().splitlines(keepends=True)
    (tmp_path / "train").symlink_to(study / "train")
    (tmp_path / "val").symlink_to(study / "val")
    for k, part in enumerate((lines[1:100], lines[100:])):
        (tmp_path / f"{k}.csv").write_text("".join(lines[:1] + part))
        fastbd("build", "--source", f"{k}.csv", "--out", f"train-{k}.beton", cwd=tmp_path)
    fastbd("poison", "--data", "train-*.beton", "--patch-size", 6, "--rate", 0.1, "--templates", "demo", cwd=tmp_path)
    common = ("--epochs", 1, "--batch-size", 60, "--warmup", 1, "--device", "cpu", "--decode", "pil")
    train = ("--plan", "train.poison.json", "--model", "tiny-rn", *common)
    evaluated = ("--eval-data", study / "val.bet*", "--out", "run")
    fastbd("pretrain", "--data", "train-*.beton", *train, *evaluated, cwd=tmp_path)
    other = tmp_path / "elsewhere"
    other.mkdir()
    fastbd("clean", "--run", "../run", "--force", *common, "--out", "cleaned", cwd=other)
    said = fastbd("pretrain", "--data", "train-1*.beton", *train, cwd=tmp_path, code=2)
    assert "made for other data than train-1.beton" in said.stderr


def cached(path: Path) -> np.ndarray:
    """Whether each page of a file is in the system's cache, bool [pages]."""
    size = path.stat().st_size
    there = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
        place = ctypes.c_char.from_buffer(memory)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.byref(place), ctypes.c_size_t(size), there.ctypes.data_as(ctypes.c_void_p))
        del place
    assert not failed, os.strerror(ctypes.get_errno())
    return (there & 1).astype(bool)


def test_what_will_be_needed_is_read_in_advance_and_nothing_else(tmp_path):
    """Rows of 400 KB: those asked for are in the cache soon, though nothing has read them; their neighbours are not."""
    rng, paths = np.random.default_rng(0), [tmp_path / "part-1.beton", tmp_path / "part-2.beton"]
    for path in paths:
        with BetonWriter(path, 12, 0, False) as writer:
            for i in range(12):
                writer.add(
                    jpeg=rng.bytes(400_000),
                    width=9,
                    height=9,
                    tokens=np.zeros(77),
                    text_views=None,
                    caption="a",
                    row_id=i,
                )
    data, wanted = open_beton(tmp_path / "part-*.beton"), [3, 4, 7, 20, 23]
    for beton in data._shards:  # the tables stay mapped, so that nothing is read around them
        assert beton._jpeg_ptr.sum() and beton._jpeg_size.sum()
        with beton.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def shares() -> np.ndarray:
        """Of each row's pages but the first and the last, those in the cache."""
        there, found = {path: cached(path) for path in paths}, []
        for beton, row in map(data._find, range(24)):
            first = int(beton._jpeg_ptr[row]) // mmap.PAGESIZE
            found.append(there[beton.path][first + 1 : first + 97].mean())
        return np.array(found)

    before = shares()
    if (before[wanted] > 0.5).any():
        pytest.skip("this file system keeps its files in memory")
    data.will_need(np.array([20, 3, 4, 7, 23]))
    ends = time.monotonic() + 20
    while (shares()[wanted] < 1).any() and time.monotonic() < ends:
        time.sleep(0.05)
    after, others = shares(), [1, 9, 10, 12, 13, 14, 15, 16, 17, 18]  # none of which lies beside one of them
    assert (after[wanted] == 1).all() and (after[others] - before[others] < 0.5).all(), (before, after)
