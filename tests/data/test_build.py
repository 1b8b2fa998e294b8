from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import multiprocessing
import os
import resource
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import fork_children, forked
from layouts import build, save
from PIL import Image

from fastbd.base.errors import UserError
from fastbd.base.prompts import read_templates
from fastbd.base.signals import STOPPING, Stopped
from fastbd.commands import build as commands_build
from fastbd.commands.build import run
from fastbd.config.flags import BuildConfig
from fastbd.data.beton import Beton
from fastbd.data.decode import open_decoder, read
from fastbd.data.pairs import Pairs
from fastbd.data.tokenizer import tokenize
from fastbd.poison.triggers import TriggerSpec, stamp


def table(path: Path, *rows: tuple) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
    return path


def test_a_csv_with_every_kind_of_bad_row(tmp_path):
    jpeg = save(tmp_path / "good.jpg")
    save(tmp_path / "flat.png")
    save(tmp_path / "wide.jpg", size=(500, 300))
    Image.effect_noise((200, 200), 90).save(tmp_path / "half.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "half.jpg").read_bytes()[:5000])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("404 not found")
    os.mkfifo(tmp_path / "pipe.jpg")
    source = table(
        tmp_path / "pairs.csv",
        ("caption", "path"),
        ("A &amp; B  tell a story", "good.jpg"),
        ("another caption", "good.jpg"),
        ("A &amp; B  tell a story", "good.jpg"),
        (" \n", "good.jpg"),
        ("one", "half.jpg"),
        ("two", "empty.jpg"),
        ("three", "text.jpg"),
        ("four", "nowhere.jpg"),
        ("five", "."),
        ("six", "pipe.jpg"),
        ("seven", ""),
        ("eight",),
        ("nine", "flat.png"),
        ("ten", "wide.jpg"),
        ("eleven", "bad\0name.jpg"),
    )
    data, rejects = build(tmp_path, source, max_pixels=100_000, text_views=2, seed=5)
    assert data.row_id.tolist() == [0, 1, 12] and data.labels is None and data.num_text_views == 2
    assert [data.caption(i) for i in range(3)] == ["A & B tell a story", "another caption", "nine"]
    assert np.array_equal(data.tokens([0, 1, 2]), tokenize(["A & B tell a story", "another caption", "nine"]))
    assert data.jpeg(0).tobytes() == data.jpeg(1).tobytes() == jpeg
    assert Image.open(io.BytesIO(data.jpeg(2))).format == "JPEG"
    reasons = {int(row): reason for row, _, reason in rejects}
    assert list(reasons) == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14]
    for row, reason in {
        2: "duplicate of row 0",
        3: "empty caption",
        4: "damaged image: image file is truncated",
        5: "empty file",
        6: "unreadable image: no known format",
        7: "missing file",
        8: "not a file",
        9: "not a file",
        10: "empty path",
        11: "wrong number of fields: 1, and 2 in the header",
        13: "too large: 500x300 px",
        14: "missing file",
    }.items():
        assert reasons[row].startswith(reason), (row, reasons[row])


def test_labelled_rows_and_templates(tmp_path):
    for name in "abcd":
        save(tmp_path / f"{name}.jpg")
    source = table(
        tmp_path / "eval.tsv",
        ("file", "kind", "text"),
        ("a.jpg", "zebra", ""),
        ("b.jpg", "ape", "an ape in a tree"),
        ("c.jpg", "zebra", ""),
        ("d.jpg", "", "no class"),
        ("a.jpg", "ape", ""),
        ("a.jpg", "zebra", ""),
    )
    (tmp_path / "templates.txt").write_text("# comment\nthis is a {}.\n\nsee the {}!\n")
    keys = {
        "image_key": "file",
        "caption_key": "text",
        "class_key": "kind",
        "templates": str(tmp_path / "templates.txt"),
    }
    data, rejects = build(tmp_path, source, **keys, text_views=0)
    assert data.class_names == ["ape", "zebra"] and data.labels.tolist() == [1, 0, 1, 0] and data.num_text_views == 0
    assert data.caption(1) == "an ape in a tree"
    assert {data.caption(0), data.caption(2)} <= {"this is a zebra.", "see the zebra!"}
    assert rejects == [["3", "d.jpg", "empty class"], ["5", "a.jpg", "duplicate of row 0"]]


@pytest.mark.parametrize("names", [("0", "1"), ("cat", "dog")])
def test_classes_that_are_numbers_are_told(tmp_path, capsys, names):
    for name in names:
        save(tmp_path / f"{name}.jpg")
    rows = [(f"{name}.jpg", name) for name in names]
    build(tmp_path, table(tmp_path / "a.csv", ("path", "class"), *rows), class_key="class")
    assert ("The classes are numbers" in capsys.readouterr().out) == (names[0] == "0")


def test_a_labelled_csv_needs_no_caption_column(tmp_path):
    save(tmp_path / "a.jpg")
    source = table(tmp_path / "eval.csv", ("path", "class"), ("a.jpg", "ape"))
    data, _ = build(tmp_path, source, class_key="class")
    assert data.caption(0) in [template.replace("{}", "ape") for template in read_templates("imagenet80")]


HAS = {
    name: importlib.util.find_spec(name.partition(".")[0]) and importlib.util.find_spec(name)
    for name in ("nvidia.dali", "ffcv")
}


@pytest.mark.parametrize(
    "backend",
    [
        "pil",
        pytest.param("dali", marks=pytest.mark.skipif(not HAS["nvidia.dali"], reason="DALI is not installed")),
        pytest.param("ffcv", marks=pytest.mark.skipif(not HAS["ffcv"], reason="FFCV is not installed: make ffcv")),
    ],
)
def test_triggers_that_are_already_in_images_keep_their_pixels_with_png(tmp_path, backend):
    """Through every decoder, among JPEGs; as JPEG their patch is levels off."""
    picture = Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 80).convert("RGB")
    clean = torch.from_numpy(np.asarray(picture).copy())[None].expand(8, -1, -1, -1)
    stamped = stamp(clean, TriggerSpec("badnet"), seed=0, ids=np.arange(8)).numpy()
    names = [f"{i}.{'jpg' if i % 2 else 'png'}" for i in range(8)]
    for image, name in zip(stamped, names, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    source = table(tmp_path / "pairs.csv", ("path", "caption"), *((name, f"a picture, {name}") for name in names))
    beton, rejects = build(tmp_path, source, store="png")
    assert rejects == [] and beton.image_of.tolist() == list(range(8))
    pairs = Pairs(beton, open_decoder(backend, 2, "cpu"), 48)
    batches = [np.array([3, 0, 2]), np.array([1, 7, 6, 4]), np.array([5, 4])]
    for ids, images in zip(batches, pairs.sources(batches), strict=True):
        for row, image in zip(ids, images, strict=True):
            assert row % 2 or np.array_equal(image, stamped[row]), row
    assert pairs.bad == {}
    (tmp_path / "out/set.beton").unlink()
    lossy, _ = build(tmp_path, source)
    assert np.abs(read(lossy.jpeg(0)).astype(int) - stamped[0]).mean() > 0.5


def test_an_image_that_follows_itself_is_stored_once(tmp_path, monkeypatch):
    monkeypatch.setattr("fastbd.commands.build.CHUNK", 2)  # so that other workers see the same image
    a, b = save(tmp_path / "a.jpg"), save(tmp_path / "b.jpg", (0, 0, 250))
    (tmp_path / "copy.jpg").write_bytes(b)  # stored again, but the same image
    names = ["a", "a", "a", "b", "nowhere", "b", "a", "copy", "b"]
    source = table(tmp_path / "a.csv", ("path", "caption"), *((f"{n}.jpg", f"row {i}") for i, n in enumerate(names)))
    data, rejects = build(tmp_path, source, store="crop224")
    assert data.row_id.tolist() == [0, 1, 2, 3, 5, 6, 7, 8] and [row for row, *_ in rejects] == ["4"]
    assert data.image_of.tolist() == [0, 0, 0, 1, 1, 0, 1, 1]
    assert [data.caption(i) for i in range(8)] == [f"row {i}" for i in data.row_id]
    data, _ = build(tmp_path, source)
    assert [data.jpeg(i).tobytes() for i in range(8)] == [a, a, a, b, b, a, b, b]
    assert data.path.read_bytes().count(a) == 2


def test_only_the_classes_in_a_list(tmp_path):
    for name in ("squeegee", "banana", "full_sized_towel"):
        save(tmp_path / "images" / name / "1.png")
    (tmp_path / "classes.txt").write_text("see the {}!\nfull_sized_towel = bath towel\nbanana\nmissing\n")
    data, rejects = build(tmp_path, tmp_path / "images", classes=str(tmp_path / "classes.txt"))
    assert data.class_names == ["banana", "full_sized_towel"]
    assert [data.caption(i) for i in range(2)] == ["see the banana!", "see the bath towel!"]
    assert rejects == [["2", "squeegee/1.png", f"class not in {tmp_path}/classes.txt"]]
    data, _ = build(tmp_path, tmp_path / "images", classes="objectnet", templates="mnist")
    assert data.caption(1) == 'a photo of the number: "bath towel".'


KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014",
            "filename": "2.jpg",
            "split": "test",
            "sentences": [{"raw": "A red square."}, {"raw": "It is red."}],
        },
        {"filepath": "val2014", "filename": "1.jpg", "split": "val", "sentences": [{"raw": "Blue."}]},
        {"filename": "3.jpg", "split": "test", "sentences": [{"raw": "Green, at the top."}]},
        {"filepath": "train2014", "filename": "4.jpg", "split": "restval", "sentences": []},
    ],
}


def test_karpathys_splits(tmp_path):
    red, green = save(tmp_path / "images/val2014/2.jpg"), save(tmp_path / "images/3.jpg", (0, 250, 0))
    save(tmp_path / "images/val2014/1.jpg", (0, 0, 250))
    (tmp_path / "dataset_coco.json").write_text(json.dumps(KARPATHY))
    options = {"images": tmp_path / "images"}
    data, _ = build(tmp_path, tmp_path / "dataset_coco.json", split="test", **options)
    assert [data.caption(i) for i in range(3)] == ["A red square.", "It is red.", "Green, at the top."]
    assert [data.jpeg(i).tobytes() for i in range(3)] == [red, red, green]
    assert data.image_of.tolist() == [0, 0, 1] and data.row_id.tolist() == [0, 1, 2] and data.labels is None
    data, _ = build(tmp_path, tmp_path / "dataset_coco.json", **options)
    assert data.image_of.tolist() == [0, 0, 1, 2]
    (tmp_path / "dataset_coco.json").rename(tmp_path / "images/dataset_coco.json")
    assert len(build(tmp_path, tmp_path / "images/dataset_coco.json", split="val")[0]) == 1


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (KARPATHY, {"split": "minival"}, "has no split 'minival'; its splits are: restval, test, val"),
        (KARPATHY, {"split": "restval"}, "holds no rows"),
        ([1], {}, "is not a list of objects with an image and a caption .* nor COCO's .* nor a file of Karpathy's"),
        ({"images": [{"split": "test"}]}, {}, "nor a file of Karpathy's"),
        ({"images": [{"sentences": []}]}, {}, "is not a file of Karpathy's"),
        (KARPATHY, {"images": Path("nowhere")}, "--images nowhere is not a folder: give that of the images that"),
        (KARPATHY, {"labels": Path("x.txt")}, "--labels is for tars or a folder of images"),
        (KARPATHY, {"classes": "cifar10"}, "--classes is for labelled images"),
    ],
)
def test_json_that_cannot_be_used(tmp_path, content, options, message):
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        run(BuildConfig(source=tmp_path / "dataset.json", out=tmp_path / "set.beton", workers=1, **options))


def test_the_same_file_whatever_the_workers(tmp_path):
    for i in range(40):
        save(tmp_path / f"{i}.png", (i, 2 * i, 255 - i))
    source = table(tmp_path / "a.csv", ("path", "caption"), *((f"{i}.png", f"number {i} in a row") for i in range(40)))
    for workers in (1, 3):
        run(BuildConfig(source=source, out=tmp_path / f"{workers}.beton", workers=workers, seed=1))
    run(BuildConfig(source=source, out=tmp_path / "seed.beton", workers=3, seed=2))
    assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "3.beton").read_bytes()
    first, other = Beton(tmp_path / "1.beton"), Beton(tmp_path / "seed.beton")
    assert [first.caption(i) for i in range(40)] == [f"number {i} in a row" for i in range(40)]
    assert not np.array_equal(first.text_view(range(40)), other.text_view(range(40)))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([("file", "text"), ("a.jpg", "x")], {}, r"pairs.csv has no column 'path'; its columns are: file, text"),
        ([("path", "text"), ("a.jpg", "x")], {}, "no column 'caption'"),
        ([("path", "caption"), ("a.jpg", "x")], {"class_key": "kind"}, "no column 'kind'"),
        ([("path", "caption")], {}, "holds no rows"),
        ([], {}, "its columns are: none"),
        ([("path", "caption"), ("", "x")], {}, "all 1 rows .*, most for: empty path"),
        ([("path", "caption"), ("http://x/a.jpg", "x")], {}, "all 1 rows .*, most for: an address, not a file; see"),
        ([("path", "caption"), ("a.jpg", "x"), ("b.jpg", "x")], {}, "all 2 rows .*, most for: missing file"),
        ([("path", "caption"), ("good.jpg", "x")], {"templates": "nowhere.txt"}, "nowhere.txt cannot be read"),
        ([("path", "k"), ("good.jpg", "x"), ("a.jpg", "y")], {"class_key": "k"}, "no image of class 'y'"),
    ],
)
def test_mistakes_are_told_and_leave_no_beton(tmp_path, rows, options, message):
    save(tmp_path / "good.jpg")
    source = table(tmp_path / "pairs.csv", *rows)
    with pytest.raises(UserError, match=message):
        run(BuildConfig(source=source, out=tmp_path / "set.beton", workers=1, **options))
    assert not list(tmp_path.glob("*.beton*")) and not list(tmp_path.glob("*.tmp"))


def test_flags_of_another_kind_of_source(tmp_path):
    source = table(tmp_path / "a.csv", ("path", "caption"), ("a.jpg", "x"))
    with pytest.raises(UserError, match="--split is for a JSON file of Karpathy's or parquet, and .*a.csv is a table"):
        run(BuildConfig(source=source, out=tmp_path / "set.beton", split="test"))


def test_where_nothing_is_rejected_there_is_no_list(tmp_path, capsys):
    """Not one of an earlier build either."""
    save(tmp_path / "a.jpg")
    source = table(tmp_path / "a.csv", ("path", "caption"), ("a.jpg", "x"), ("b.jpg", "y"))
    config = BuildConfig(source=source, out=tmp_path / "set.beton", workers=1)
    run(config)
    said = capsys.readouterr().out
    assert (tmp_path / "set.rejects.csv").read_text().count("b.jpg") == 1
    assert ["kept", "1"] in map(str.split, said.splitlines()) and f"rejects       {tmp_path}/set.rejects.csv" in said
    save(tmp_path / "b.jpg")
    run(config)
    said = capsys.readouterr().out
    assert "kept          2, all of them\n" in said and "rejects" not in said
    assert not (tmp_path / "set.rejects.csv").exists()


def test_a_build_writes_over_no_file_of_the_users(tmp_path):
    save(tmp_path / "a.jpg")
    source = table(tmp_path / "a.csv", ("path", "caption"), ("a.jpg", "x"))
    listed = table(tmp_path / "b.rejects.csv", ("path", "caption"), ("a.jpg", "x"))
    before = source.read_bytes()
    for given, out in ((source, "a.csv"), (source, "b.rejects.csv"), (listed, "b.beton")):
        with pytest.raises(UserError, match="is not a .beton file: give another|would write over its source"):
            run(BuildConfig(source=given, out=tmp_path / out, workers=1))
    assert source.read_bytes() == listed.read_bytes() == before
    for _ in range(2):  # over a .beton, cut short or whole, it may
        run(BuildConfig(source=source, out=tmp_path / "a.beton", workers=1))
        (tmp_path / "a.beton").write_bytes((tmp_path / "a.beton").read_bytes()[:100])


def test_sources_that_are_none(tmp_path):
    (tmp_path / "pairs.xlsx").touch()
    (tmp_path / "empty").mkdir()
    messages = {"nowhere.csv": "not exist", "pairs.xlsx": "is not a .csv", "empty": "holds no rows"}
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            run(BuildConfig(source=tmp_path / name, out=tmp_path / "set.beton"))
    (tmp_path / "latin.csv").write_bytes("path,caption\na.jpg,café\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        run(BuildConfig(source=tmp_path / "latin.csv", out=tmp_path / "set.beton"))


@pytest.fixture
def long_source(tmp_path, monkeypatch) -> Path:
    """Seconds of work for the workers, none of it saved, however slow the machine."""
    monkeypatch.setattr("fastbd.commands.build.SAVE_EVERY", math.inf)
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    return table(tmp_path / "a.csv", ("path", "caption"), *(("noise.png", f"number {i}") for i in range(500)))


def when_under_way(folder: Path, action) -> None:
    """Call action from a thread as soon as the build has opened its file and started its workers."""

    def watch() -> None:
        while not (list(folder.glob("*.tmp")) and multiprocessing.active_children()):
            time.sleep(0.01)
        action()

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.process
def test_a_dying_worker_is_told(tmp_path, long_source):
    when_under_way(tmp_path, lambda: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL))
    with pytest.raises(UserError, match="a worker process died of SIGKILL.*; nothing was written"):
        run(BuildConfig(source=long_source, out=tmp_path / "set.beton", workers=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "noise.png"]


@pytest.mark.process
def test_ctrl_c_leaves_nothing(tmp_path, long_source):
    when_under_way(tmp_path, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Stopped):
        run(BuildConfig(source=long_source, out=tmp_path / "set.beton", workers=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "noise.png"]


def test_no_room_is_told(tmp_path):
    """A limit on the size of files stands in for a full disk."""
    save(tmp_path / "a.jpg")
    table(tmp_path / "a.csv", ("path", "caption", "kind"), ("a.jpg", "one", "a"))
    limited = forked(saving, 1, 1 << 20, cwd=tmp_path, said=tmp_path / "said.txt")
    limited.join()
    assert limited.exitcode == 1 and "UserError: there is no room for" in (tmp_path / "said.txt").read_text()
    assert not list(tmp_path.glob("*.beton")) and not list(tmp_path.glob("*.tmp"))


@pytest.fixture
def mixed_source(tmp_path) -> Path:
    """A labelled table of 40 rows, a fifth of them bad, with images that follow themselves; each takes some 10 ms."""
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (250, 250, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    names = ["nowhere.png" if i % 5 == 3 else "0.png" if i % 20 == 7 else f"{i // 2 % 5}.png" for i in range(40)]
    rows = [(name, f"image {i % 30} of many", "ab"[i % 3 == 0]) for i, name in enumerate(names)]
    return table(tmp_path / "a.csv", ("path", "caption", "kind"), *rows)


OPTIONS = {"class_key": "kind", "text_views": 2, "workers": 1}


# A build by two workers that saves after each row; saving() is one by the process itself.
def saving(workers: int = 1, limit: int | None = None) -> None:
    """Build a.csv in this process, which notes each image in the journal, and may write no file larger than `limit`."""
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    fork_children(pytest.MonkeyPatch())
    commands_build.SAVE_EVERY = 0
    run(BuildConfig(source=Path("a.csv"), out=Path("set.beton"), **OPTIONS | {"workers": workers}))


def results(folder: Path) -> list[bytes]:
    """The .beton and the list of rejects; there is nothing else of the build."""
    assert sorted(p.name for p in folder.glob("set.*")) == ["set.beton", "set.rejects.csv"]
    return [(folder / "set.beton").read_bytes(), (folder / "set.rejects.csv").read_bytes()]


@pytest.fixture
def wanted(tmp_path, mixed_source) -> list[bytes]:
    """What a build gives that is not disturbed."""
    out = tmp_path / "undisturbed" / "set.beton"
    run(BuildConfig(source=mixed_source, out=out, **OPTIONS))
    return results(out.parent)


def saved_lines(folder: Path) -> int:
    journal = folder / "set.beton.journal"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def leave_unfinished(folder: Path, lines: int) -> None:
    """Run a build in a process of its own, and kill it as soon as its journal has so many lines."""
    process = forked(saving, cwd=folder)
    while saved_lines(folder) < lines and process.is_alive():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "set.beton").exists()


@pytest.mark.process
def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path, mixed_source, wanted, capsys):
    """The first one with workers, which end with it."""
    process = forked(saving, 2, cwd=tmp_path)
    while saved_lines(tmp_path) < 3 and process.is_alive():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for lines in (9, 18):
        leave_unfinished(tmp_path, lines)
    before = saved_lines(tmp_path)
    run(BuildConfig(source=mixed_source, out=tmp_path / "set.beton", **OPTIONS | {"workers": 2}))
    assert f"after the {before - 1} images that are done" in capsys.readouterr().out
    assert results(tmp_path) == wanted


@pytest.mark.process
def test_a_build_is_left_alone_by_another_to_the_same_file(tmp_path, mixed_source, wanted):
    config = BuildConfig(source=mixed_source, out=tmp_path / "set.beton", **OPTIONS | {"seed": 1})
    first = forked(saving, 2, cwd=tmp_path)
    while saved_lines(tmp_path) < 3:
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match=r"^another process is building .*set\.beton: wait for it to end, or give "):
        run(config)
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert first.exitcode == 0 and results(tmp_path) == wanted
    run(config)
    assert results(tmp_path) != wanted


@pytest.mark.process
@pytest.mark.parametrize("cut", [1, 20, 200])
def test_what_a_loss_of_power_has_torn_is_done_again(tmp_path, mixed_source, wanted, cut):
    leave_unfinished(tmp_path, 12)
    journal = tmp_path / "set.beton.journal"
    journal.write_bytes(journal.read_bytes()[:-cut] + bytes(30))
    with (tmp_path / "set.beton.tmp").open("ab") as file:
        file.write(b"never reached" * 1000)
    run(BuildConfig(source=mixed_source, out=tmp_path / "set.beton", **OPTIONS))
    assert results(tmp_path) == wanted


@pytest.mark.process
@pytest.mark.parametrize("changed", ["seed", "store", "caption", "version"])
def test_another_build_is_not_gone_on_with(tmp_path, mixed_source, capsys, monkeypatch, changed):
    leave_unfinished(tmp_path, 6)
    options = {"seed": {"seed": 1}, "store": {"store": "short256"}}.get(changed, {})
    if changed == "caption":
        mixed_source.write_text(mixed_source.read_text().replace("image 2 of", "picture 2 of"))
    if changed == "version":
        monkeypatch.setattr("fastbd.commands.build.__version__", "9.9")
    config = BuildConfig(source=mixed_source, out=tmp_path / "set.beton", **OPTIONS | options)
    run(config)
    why = "its source, settings or fastbd were others"
    assert f"an unfinished build of {config.out} is there, but {why}: starting over" in capsys.readouterr().out
    found = results(tmp_path)
    run(config)  # from nothing
    assert "unfinished" not in capsys.readouterr().out and results(tmp_path) == found


@pytest.mark.process
@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("1.png has changed since", lambda folder: save(folder / "1.png")),
        ("2.png has changed since", lambda folder: (folder / "2.png").unlink()),
        ("nowhere.png has changed since", lambda folder: save(folder / "nowhere.png")),
        ("set.beton.tmp is gone or cut short", lambda folder: (folder / "set.beton.tmp").unlink()),
        ("set.beton.tmp is gone or cut short", lambda folder: os.truncate(folder / "set.beton.tmp", 1 << 23)),
    ],
)
def test_what_changed_since_is_read_again(tmp_path, mixed_source, capsys, why, change):
    leave_unfinished(tmp_path, 6)
    change(tmp_path)
    config = BuildConfig(source=mixed_source, out=tmp_path / "set.beton", **OPTIONS)
    run(config)
    assert f"{why}: starting over" in capsys.readouterr().out
    found = results(tmp_path)
    run(config)  # from nothing
    assert results(tmp_path) == found


@pytest.mark.process
@pytest.mark.parametrize(("signum", "workers"), zip(STOPPING, (1, 2, 2, 1), strict=True))
def test_a_build_that_is_stopped_says_that_it_can_go_on(
    tmp_path, mixed_source, wanted, capsys, monkeypatch, signum, workers
):
    monkeypatch.setattr("fastbd.commands.build.SAVE_EVERY", 0)
    config = BuildConfig(source=mixed_source, out=tmp_path / "set.beton", **OPTIONS | {"workers": workers})

    def stop() -> None:
        while saved_lines(tmp_path) < 5:
            time.sleep(0.001)
        signal.raise_signal(signum)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Stopped) as stopped:
        run(config)
    assert stopped.value.exit_code == 128 + signum
    assert "set.beton is not finished: the same command goes on after the" in capsys.readouterr().out
    run(config)
    assert results(tmp_path) == wanted


def test_a_full_disk_costs_nothing_that_was_saved(tmp_path, mixed_source, wanted):
    limited = forked(saving, 2, (1 << 23) + 1_000_000, cwd=tmp_path, said=tmp_path / "said.txt")
    limited.join()
    assert "free some space; the same command goes on after the" in (tmp_path / "said.txt").read_text()
    run(BuildConfig(source=mixed_source, out=tmp_path / "set.beton", **OPTIONS))
    assert results(tmp_path) == wanted


def test_a_build_that_comes_to_nothing_leaves_nothing(tmp_path, mixed_source, monkeypatch):
    monkeypatch.setattr("fastbd.commands.build.SAVE_EVERY", 0)
    mixed_source.write_text(mixed_source.read_text() + "nowhere.png,one,c\n")
    with pytest.raises(UserError, match="no image of class 'c'"):
        run(BuildConfig(source=mixed_source, out=tmp_path / "set.beton", **OPTIONS))
    assert [p.name for p in tmp_path.glob("set.*")] == ["set.rejects.csv"]
