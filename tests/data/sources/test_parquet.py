from __future__ import annotations

import os
from pathlib import Path

import pytest
from data.sources.mutations import COUNT, mutations
from PIL import Image

from fastbd.base.errors import UserError
from fastbd.commands.build import run
from fastbd.config.flags import BuildConfig
from fastbd.data.beton import Beton
from fastbd.data.decode import BadImage
from fastbd.data.sources import parquet, read_items
from fastbd.data.sources.parquet import read_image

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, columns: dict, **options) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def read(source: Path, **options) -> list:
    return read_items(BuildConfig(source=source, out=source.with_suffix(".beton"), **options))


def rows(items: list) -> list[tuple]:
    return [(item.row_id, item.name, item.problem or item.caption) for item in items]


def jpegs(folder: Path, count: int) -> list[bytes]:
    """Images whose colours tell them apart."""
    for i in range(count):
        Image.new("RGB", (24, 24), (10 * i, 0, 255 - 10 * i)).save(folder / "image.jpg")
        yield (folder / "image.jpg").read_bytes()


def test_columns_of_paths(tmp_path):
    columns = {
        "path": ["a.jpg", "b.jpg", None, "b.jpg", "b.jpg"],
        "caption": ["a dog", None, "x", "NaN", "a dog"],
        "text": [["one", "two"], [], ["x"], None, ["three"]],
        "kind": pa.array(["ape", "cat", "ape", None, "cat"]).dictionary_encode(),
        "number": [1, 2, 3, 4, 5],
    }
    source = write(tmp_path / "a.parquet", columns)
    items = read(source)
    assert rows(items) == [
        (0, "a.jpg", "a dog"),
        (1, "b.jpg", "missing caption: 'null'"),
        (2, "", "path is not text: NoneType"),
        (3, "b.jpg", "missing caption: 'NaN'"),
        (4, "b.jpg", "a dog"),
    ]
    assert items[0].file == str(tmp_path / "a.jpg") and items[0].column is None
    assert [row[2] for row in rows(read(source, caption_key="text"))] == [
        "one",
        "two",
        "no captions in the list 'text'",
        "path is not text: NoneType",
        "missing caption: 'null'",
        "three",
    ]
    labelled = read(source, class_key="kind")
    assert [(item.class_name, item.caption, item.problem) for item in labelled[:2]] == [
        ("ape", "a dog", None),
        ("cat", "", None),
    ]
    assert labelled[3].problem == "empty class" and read(source, class_key="number")[4].class_name == "5"
    assert rows(read(source, caption_key="number"))[0] == (0, "a.jpg", "caption is not text: 1")


@pytest.mark.parametrize("kind", ["bytes", "hugging face", "large"])
@pytest.mark.parametrize("row_group", [3, 100])
def test_images_in_the_file_are_built(tmp_path, kind, row_group):
    images = list(jpegs(tmp_path, 20))
    stored = {
        "bytes": pa.array(images),
        "large": pa.array(images, pa.large_binary()),
        "hugging face": pa.array([{"bytes": image, "path": "same.jpg"} for image in images], HUGGING_FACE),
    }[kind]
    captions = [None if i == 4 else f"number {i}" for i in range(20)]
    for shard, part in enumerate((slice(0, 7), slice(7, 20))):
        columns = {"image": stored[part], "caption": captions[part]}
        write(tmp_path / f"set/train-{shard:05d}-of-00002.parquet", columns, row_group_size=row_group)
    assert run(BuildConfig(source=tmp_path / "set", out=tmp_path / "set.beton", workers=2)) == 0
    data = Beton(tmp_path / "set.beton")
    assert data.row_id.tolist() == [i for i in range(20) if i != 4]
    assert [data.jpeg(k).tobytes() for k in range(19)] == [images[i] for i in data.row_id]
    assert [data.caption(k) for k in range(19)] == [captions[i] for i in data.row_id]
    rejects = (tmp_path / "set.rejects.csv").read_text().splitlines()
    assert rejects[1:] == ["4,,train-00000-of-00002.parquet/4,missing caption: 'null'"]


def test_what_img2dataset_writes(tmp_path):
    """Its columns with --output_format parquet --save_additional_columns; a failed download has no image."""
    (image,) = jpegs(tmp_path, 1)
    columns = {
        "key": ["000000000", "000000001"],
        "jpg": [image, None],
        "txt": ["a dog", None],
        "url": ["http://x.org/1"] * 2,
        "caption": ["a dog", "a cat"],
        "status": ["success", "failed_to_download"],
        "width": [24, None],
    }
    source = write(tmp_path / "set/00000.parquet", columns).parent
    (source / "00000_stats.json").write_text("{}")
    items = read(source)
    assert rows(items) == [(0, "00000.parquet/0", "a dog"), (1, "00000.parquet/1", "a cat")]
    assert read_image(items[0]) == image
    with pytest.raises(BadImage, match="no image in the row"):
        read_image(items[1])


def test_a_table_beside_a_folder_of_images_is_not_the_source(tmp_path):
    """img2dataset --output_format files: the folder 00000 with the images, and 00000.parquet about them."""
    write(tmp_path / "set/00000.parquet", {"key": ["0"], "caption": ["x"]})
    (tmp_path / "set/00000").mkdir()
    assert parquet.parquet_files(tmp_path / "set") == []


def test_splits_of_a_folder(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"set/{split}-00000-of-00001-1234.parquet", {"path": [f"{split}.jpg"], "caption": ["x"]})
    with pytest.raises(UserError, match="set holds the splits test, train: choose one with --split"):
        read(tmp_path / "set")
    assert rows(read(tmp_path / "set", split="test")) == [(0, "test.jpg", "x")]
    with pytest.raises(UserError, match="set has no split 'val'; its splits are: test, train"):
        read(tmp_path / "set", split="val")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"url": ["x"], "caption": ["x"]},
            "a.parquet has no column 'path'; its columns are: url, caption: .* --image-key",
        ),
        ({"path": ["x"], "text": ["x"]}, "no column 'caption'; .*: name one of them with --caption-key"),
        ({"path": [], "caption": []}, "holds no rows"),
    ],
)
def test_a_file_that_is_refused(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "a.parquet", columns))


def test_a_file_that_is_not_parquet(tmp_path):
    (tmp_path / "a.parquet").write_text("path,caption\n")
    with pytest.raises(UserError, match="a.parquet cannot be read .*: repair it, or take it out"):
        read(tmp_path / "a.parquet")
    table = pa.Table.from_arrays([pa.array(["x"])] * 3, names=["path", "caption", "caption"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet has two columns 'caption'"):
        read(tmp_path / "a.parquet")


def test_without_pyarrow(tmp_path, monkeypatch):
    source = write(tmp_path / "a.parquet", {"path": ["x"], "caption": ["x"]})
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"parquet files need PyArrow: pip install 'fastbd\[parquet\]'"):
        read(source)


def test_images_are_read_in_any_order_and_a_few_at_a_time(tmp_path):
    images = [os.urandom(50_000) for _ in range(1500)]
    source = write(
        tmp_path / "a.parquet",
        {"jpg": images, "caption": [f"{i}" for i in range(1500)]},
        row_group_size=1000,
        use_dictionary=False,
        write_batch_size=16,
    )
    items = read(source)
    for row in (0, 1, 31, 32, 640, 5, 1499, 1000, 999):
        assert read_image(items[row]) == images[row]
    del images
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    for item in items[:900:100]:
        read_image(item)
        assert pool.bytes_allocated() - before < 10_000_000


def test_a_damaged_page_costs_its_rows_only(tmp_path):
    images = [bytes([i]) * 1000 for i in range(200)]
    source = write(
        tmp_path / "a.parquet",
        {"jpg": images, "caption": [f"{i}" for i in range(200)]},
        row_group_size=100,
        use_dictionary=False,
        compression="none",
        write_page_checksum=True,
        data_page_size=10_000,
        write_batch_size=10,
    )
    content = source.read_bytes()
    source.write_bytes(content.replace(images[50], b"?" * 1000))
    for item in read(source):
        row = item.offset
        if row < 32 or row >= 100:
            assert read_image(item) == images[row]
        elif row >= 50:
            with pytest.raises(BadImage, match="damaged parquet file: .*checksum"):
                read_image(item)


def test_damaged_files_give_right_pairs_rejects_or_a_refusal(tmp_path):
    """With checksums, as some writers add them: without, no reader can see a changed letter."""
    images = [f"<image {i}>".encode() * 3 for i in range(40)]
    captions = [f"caption of {i}" for i in range(40)]
    whole = write(
        tmp_path / "whole.parquet",
        {"image": images, "caption": captions},
        row_group_size=16,
        write_page_checksum=True,
        use_dictionary=False,
    ).read_bytes()
    good, read_whole = set(zip(images, captions, strict=True)), 0
    for damaged in mutations(whole):
        (tmp_path / "a.parquet").write_bytes(damaged)
        parquet._rows.cache_clear()
        try:
            items = read(tmp_path / "a.parquet")
        except UserError as error:
            assert "\n" not in str(error)
            continue
        for item in items:
            try:
                image = read_image(item)
            except BadImage:
                continue
            if not item.problem:
                assert (image, item.caption) in good
                read_whole += 1
    assert read_whole > COUNT / 2
