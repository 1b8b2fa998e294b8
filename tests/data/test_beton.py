from __future__ import annotations

import hashlib
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from containers import without_checksums
from PIL import Image
from tables import table

from fastbd.base.errors import UserError
from fastbd.data.beton import Beton, BetonWriter
from fastbd.data.layout import ALLOCATION, HEADER, PAGE


def jpeg(i: int, width: int = 20, height: int = 10) -> bytes:
    return flat((i * 40 % 256, 128, 255 - i), width, height)


def flat(colour: tuple[int, int, int], width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(data, "JPEG")
    return data.getvalue()


def sample(i: int, views: int = 2, labelled: bool = True) -> dict:
    """Row ids leave gaps, as rejects do; the classes are a, b, c in turn."""
    rng = np.random.default_rng(i)
    values = {
        "jpeg": jpeg(i, 20 + i, 10),
        "width": 20 + i,
        "height": 10,
        "caption": f"caption {i} é",
        "row_id": 3 * i,
        "tokens": rng.integers(0, 49408, 77).astype(np.uint16),
        "text_views": rng.integers(0, 49408, (views, 77)).astype(np.uint16),
    }
    return values | ({"label": i % 3, "class_name": "abc"[i % 3]} if labelled else {})


def write(path: Path, n: int, views: int = 2, labelled: bool = True) -> Path:
    with BetonWriter(path, n + 5, views, labelled) as writer:
        for i in range(n):
            writer.add(**sample(i, views, labelled))
    return path


def read_by_hand(path: Path, views: int, labelled: bool) -> list[dict]:
    """The format table of version 2 with struct alone: C alignment, an image record of 13 packed bytes."""
    data = path.read_bytes()
    version, num_fields, page, count, table = struct.unpack_from("<HHIQQ", data)
    assert version == 2 and page == PAGE
    names, types = [], []
    for field in range(num_fields):
        at = 24 + 1041 * field
        types.append(data[at])
        names.append(data[at + 1 : at + 17].rstrip(b"\0").decode())
    wanted = [("image", 2), ("tokens", 4), *[("text_views", 4)] * bool(views), ("caption", 3), ("row_id", 1)]
    wanted += [("label", 1), ("class_name", 3)] * labelled
    assert list(zip(names, types, strict=True)) == [*wanted, ("checksum", 1)]
    shape = struct.unpack_from("<33Q", data, 24 + 1041 + 17)
    assert shape[:2] == (77, 0)
    assert data[24 + 1041 + 17 + 264 :][: shape[32]] == b'[["", "<u2"]]'

    sizes = {ptr: (owner, size) for owner, ptr, size in struct.iter_unpack("<QQQ", data[table:])}
    offset = 24 + 1041 * num_fields
    form = "<BHHQ3xQ" + "Q" * bool(views) + "QQq" + "qQQ" * labelled + "q"
    rows = []
    for i in range(count):
        mode, width, height, image, tokens, *rest = struct.unpack_from(form, data, offset + i * struct.calcsize(form))
        assert mode == 0 and sizes[image][0] == i
        row = {"jpeg": data[image : image + sizes[image][1]], "width": width, "height": height}
        row["tokens"] = np.array(struct.unpack_from("<77H", data, tokens))
        if views:
            row["text_views"] = np.array(struct.unpack_from(f"<{77 * views}H", data, rest.pop(0))).reshape(views, 77)
        ptr, size, row["row_id"] = rest[:3]
        row["caption"] = data[ptr : ptr + size].decode()
        if labelled:
            row["label"], ptr, size = rest[3:6]
            row["class_name"] = data[ptr : ptr + size].decode()
        rows.append(row)
    return rows


@pytest.mark.parametrize(("views", "labelled"), [(2, True), (0, False), (1, False)])
def test_the_file_follows_the_format(tmp_path, views, labelled):
    rows = read_by_hand(write(tmp_path / "a.beton", 7, views, labelled), views, labelled)
    assert len(rows) == 7
    for i, row in enumerate(rows):
        wanted = sample(i, views, labelled)
        assert all(np.array_equal(row[name], wanted[name]) for name in row)


def test_reading_gives_what_was_written(tmp_path):
    data = Beton(write(tmp_path / "a.beton", 7))
    assert len(data) == 7 and data.num_text_views == 2
    assert data.width.tolist() == [20, 21, 22, 23, 24, 25, 26] and set(data.height) == {10}
    assert data.row_id.tolist() == [0, 3, 6, 9, 12, 15, 18]
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2, 0] and data.class_names == ["a", "b", "c"]
    ids = np.array([5, 0, 5])
    assert np.array_equal(data.tokens(ids), [sample(i)["tokens"] for i in ids])
    for k in (0, 1):
        assert np.array_equal(data.text_view(ids, k), [sample(i)["text_views"][k] for i in ids])
    assert [data.caption(i) for i in (0, 6)] == ["caption 0 é", "caption 6 é"]
    assert all(data.jpeg(i).tobytes() == jpeg(i, 20 + i) for i in range(7))
    with pytest.raises(UserError, match="holds 2 text views"):
        data.text_view(ids, 2)


def test_jpegs_and_columns_are_views_of_the_file(tmp_path):
    data = Beton(write(tmp_path / "a.beton", 2))
    for view in (data.jpeg(1), data.width, data.height, data.row_id, data.labels, data._jpeg_size):
        assert np.shares_memory(view, data._bytes)


def test_an_unlabelled_file_has_no_classes(tmp_path):
    data = Beton(write(tmp_path / "a.beton", 2, labelled=False))
    assert data.labels is None and data.class_names is None


def test_an_allocation_table_in_any_order(tmp_path):
    path = without_checksums(write(tmp_path / "new.beton", 7), tmp_path / "a.beton")
    raw = bytearray(path.read_bytes())
    start = int(np.frombuffer(raw, HEADER, 1)["table"][0])
    table = np.frombuffer(raw[start:], ALLOCATION)
    empty = np.array([(3, table["ptr"][15], 0)], ALLOCATION)  # an empty value shares the pointer of the next one
    raw[start:] = np.concatenate([empty, np.random.default_rng(0).permutation(table)]).tobytes()
    path.write_bytes(raw)
    data = Beton(path)
    assert all(data.jpeg(i).tobytes() == jpeg(i, 20 + i) for i in range(7))


def test_no_sample_crosses_a_page(tmp_path):
    with BetonWriter(tmp_path / "a.beton", 9, 0, False) as writer:
        for i in range(5):
            writer.add(**sample(i, 0, False) | {"jpeg": bytes([i]) * 3_000_000})
        with pytest.raises(ValueError, match="of at most 8,388,608"):
            writer.add(**sample(5, 0, False) | {"jpeg": bytes(PAGE)})
    data = Beton(tmp_path / "a.beton")
    ends = [read["ptr"] + read["size"] - 1 for read in data._allocations.reshape(5, 3)[:, -1]]
    starts = data._allocations.reshape(5, 3)[:, 0]["ptr"]
    assert [int(s) // PAGE for s in starts] == [int(e) // PAGE for e in ends] == [1, 1, 2, 2, 3]
    assert all(set(data.jpeg(i).tolist()) == {i} for i in range(5))


def test_rows_that_share_an_image(tmp_path, monkeypatch):
    monkeypatch.setattr("fastbd.data.beton.ROWS", 2)  # so that a part of the table begins with a shared one
    with BetonWriter(tmp_path / "a.beton", 9, 2, True) as writer:
        for i, owner in enumerate([0, 0, 0, 3, 4, 4]):
            shared = {"jpeg": jpeg(owner, 20 + owner) if i == owner else None, "width": 20 + owner}
            writer.add(**sample(i) | shared)
    data = Beton(tmp_path / "a.beton")
    assert data.image_of.tolist() == [0, 0, 0, 1, 2, 2] and data.image_of.dtype == np.int64
    for i, owner in enumerate([0, 0, 0, 3, 4, 4]):
        assert data.jpeg(i).tobytes() == jpeg(owner, 20 + owner) and data.width[i] == 20 + owner
        assert np.array_equal(data.tokens(i)[0], sample(i)["tokens"]) and data.caption(i) == sample(i)["caption"]
    table = data._allocations.reshape(6, 5)
    assert table["sample"].tolist() == [[i] * 5 for i in range(6)]
    assert table["size"][:, 0].tolist() == [len(data.jpeg(i)) for i in range(6)]
    raw = data.path.read_bytes()
    assert [raw.count(jpeg(i, 20 + i)) for i in (0, 3, 4)] == [1, 1, 1]


def test_images_are_numbered_as_they_appear(tmp_path):
    data = Beton(write(tmp_path / "a.beton", 4))
    order = [2, 1, 2, 0]  # FFCV's writer has several processes, and no order
    data._jpeg_ptr, data._jpeg_size = data._jpeg_ptr[order], data._jpeg_size[order]
    assert data.image_of.tolist() == [0, 1, 0, 2]


def test_an_image_that_is_stored_several_times_is_one(tmp_path):
    """Flat pictures of one length, whose colour is at the beginning alone."""
    a, b, c = images = [flat((red, 0, 200), 400, 400) for red in (3, 9, 15)]
    assert len(set(images)) == 3 and len({(len(image), image[-1024:]) for image in images}) == 1
    with BetonWriter(tmp_path / "a.beton", 9, 0, False) as writer:
        for i, image in enumerate([a, b, a, None, c, b, jpeg(1), None]):
            writer.add(**sample(i, 0, False) | {"jpeg": image})
    assert Beton(tmp_path / "a.beton").image_of.tolist() == [0, 1, 0, 0, 2, 1, 3, 3]


def test_an_error_leaves_the_old_file_alone(tmp_path):
    path = write(tmp_path / "a.beton", 2)
    before = path.read_bytes()
    with pytest.raises(RuntimeError), BetonWriter(path, 9, 2, True) as writer:
        writer.add(**sample(0))
        raise RuntimeError
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.beton"]


def test_the_fingerprint_names_the_data(tmp_path):
    first, same = Beton(write(tmp_path / "a.beton", 5)), Beton(write(tmp_path / "b.beton", 5))
    other = Beton(write(tmp_path / "c.beton", 6))
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_the_fingerprint_is_a_hash_of_the_tables(tmp_path, monkeypatch):
    """Plans hold it, so it may never change: header, fields, metadata, then the allocation table."""
    monkeypatch.setattr("fastbd.data.beton.BLOCK", 1000)
    path = write(tmp_path / "a.beton", 5)
    raw, head = path.read_bytes(), 24 + 8 * 1041 + 5 * 88
    table = struct.unpack_from("<Q", raw, 16)[0]
    assert Beton(path).fingerprint == hashlib.sha256(raw[:head] + raw[table:]).hexdigest()


@pytest.mark.parametrize("keep", [0, 10, 24, 2000, PAGE + 100, -1, -24])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = write(tmp_path / "a.beton", 5)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="no whole .beton file"):
        Beton(path)


def test_files_that_are_no_beton_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Beton(tmp_path / "none.beton")
    (tmp_path / "a.beton").write_bytes(b"path,caption\n" * 500)
    with pytest.raises(UserError, match="format version"):
        Beton(tmp_path / "a.beton")
    raw = bytearray(write(tmp_path / "b.beton", 1).read_bytes())
    raw[24 + 8 * 1041] = 1  # the mode of the first image: raw pixels
    (tmp_path / "b.beton").write_bytes(raw)
    with pytest.raises(UserError, match="not JPEG"):
        Beton(tmp_path / "b.beton")


@pytest.fixture
def compiled(request, monkeypatch) -> None:
    """Have FFCV compile what reads, as it does, or run it in Python: compiling takes it many times as long."""
    pytest.importorskip("ffcv")
    from ffcv.pipeline.compiler import Compiler

    monkeypatch.setattr(Compiler, "is_enabled", request.param)


by_ffcv = pytest.mark.parametrize(
    ("os_cache", "compiled"),
    table([(True, True), (True, False), (False, True), (False, False)], (True, False), (False, False)),
    indirect=["compiled"],
)


@by_ffcv
def test_ffcv_reads_our_file(tmp_path, os_cache, compiled):
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.bytes import BytesDecoder
    from ffcv.fields.ndarray import NDArrayDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    path, built = tmp_path / "a.beton", {"exif": "ignore"}
    with BetonWriter(path, 9, 2, True, built=built) as writer:
        for i in range(7):
            writer.add(**sample(i) | {"jpeg": jpeg(i, 16, 16), "width": 16, "height": 16})
    assert Beton(path).built == built
    pipelines = {
        "image": [CenterCropRGBImageDecoder((16, 16), 1)],
        "tokens": [NDArrayDecoder()],
        "text_views": [NDArrayDecoder()],
        "caption": [BytesDecoder()],
        "row_id": [IntDecoder()],
        "label": [IntDecoder()],
        "class_name": [BytesDecoder()],
        "checksum": [IntDecoder()],
    }
    loader = Loader(str(path), 7, 1, os_cache, OrderOption.SEQUENTIAL, pipelines=pipelines)
    image, tokens, text_views, caption, row_id, label, class_name, checksum = next(iter(loader))
    for i in range(7):
        pixels = np.asarray(Image.open(io.BytesIO(jpeg(i, 16, 16)))).astype(int)
        assert np.abs(image[i].astype(int) - pixels).max() <= 8  # FFCV decodes with a coarser transform
        assert np.array_equal(tokens[i], sample(i)["tokens"])
        assert np.array_equal(text_views[i], sample(i)["text_views"])
        text = sample(i)["caption"].encode()
        assert caption[i][: len(text)].tobytes() == text and chr(class_name[i][0]) == "abc"[i % 3]
    assert checksum[:, 0].tolist() == Beton(path)._metadata["checksum"].tolist()
    assert row_id[:, 0].tolist() == [3 * i for i in range(7)] and label[:, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]


@by_ffcv
def test_ffcv_reads_images_that_rows_share(tmp_path, os_cache, compiled):
    """Also from a page that lies before that of the row's other values."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    views = PAGE // 154 // 3  # three rows fill a page
    with BetonWriter(tmp_path / "a.beton", 10, views, False) as writer:
        for i in range(10):
            shared = {"jpeg": None if i % 5 else jpeg(i * 20, 16, 16), "width": 16, "height": 16}
            writer.add(**sample(i, views, False) | shared)
    table = Beton(tmp_path / "a.beton")._allocations.reshape(10, 4)["ptr"] // PAGE
    assert (table[:, 0] < table[:, 1]).sum() >= 4
    pipelines = dict.fromkeys(["tokens", "text_views", "caption", "checksum"])
    pipelines |= {"image": [CenterCropRGBImageDecoder((16, 16), 1)], "row_id": [IntDecoder()]}
    order = OrderOption.SEQUENTIAL
    loader = Loader(str(tmp_path / "a.beton"), 1, 1, os_cache, order, pipelines=pipelines, batches_ahead=1)
    images = np.concatenate([batch[0].copy() for batch in loader])
    for i, image in enumerate(images):
        pixels = np.asarray(Image.open(io.BytesIO(jpeg(i // 5 * 100, 16, 16)))).astype(int)
        assert np.abs(image.astype(int) - pixels).max() <= 8
    assert len(images) == 10


def test_we_read_ffcvs_file(tmp_path):
    pytest.importorskip("ffcv")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    images = [(np.full((9, 12 + i, 3), 20 * i, np.uint8), i % 2) for i in range(10)]
    path = tmp_path / "theirs.beton"
    fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=2).from_indexed_dataset(images, chunksize=3)
    data = Beton(path)
    assert data.labels.tolist() == [0, 1] * 5 and data.row_id.tolist() == list(range(10))
    for i, (pixels, _) in enumerate(images):
        assert np.abs(np.asarray(Image.open(io.BytesIO(data.jpeg(i)))).astype(int) - pixels).max() <= 2
    with pytest.raises(UserError, match="holds no tokens"):
        data.tokens([0])
