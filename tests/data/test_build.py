from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbd.commands.build import run
from fastbd.config import BuildConfig
from fastbd.data.beton import Beton
from fastbd.data.tokenizer import tokenize
from fastbd.errors import UserError
from fastbd.prompts import read_templates


def save(path: Path, colour=(200, 30, 30), size=(40, 30)) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path.read_bytes()


def table(path: Path, *rows: tuple) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
    return path


def build(tmp_path: Path, source: Path, **options) -> tuple[Beton, list[list[str]]]:
    out = tmp_path / "out" / "set.beton"
    assert run(BuildConfig(source=source, out=out, workers=2, **options)) == 0
    with (out.parent / "set.rejects.csv").open(newline="") as file:
        header, *rejects = csv.reader(file)
    assert header == ["row_id", "path", "reason"]
    assert sorted(p.name for p in out.parent.iterdir()) == ["set.beton", "set.rejects.csv"]
    return Beton(out), rejects


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
        tmp_path / "pairs.csv", ("caption", "path"),
        ("A &amp; B  tell a story", "good.jpg"), ("another caption", "good.jpg"),
        ("A &amp; B  tell a story", "good.jpg"), (" \n", "good.jpg"), ("one", "half.jpg"), ("two", "empty.jpg"),
        ("three", "text.jpg"), ("four", "nowhere.jpg"), ("five", "."), ("six", "pipe.jpg"), ("seven", ""),
        ("eight",), ("nine", "flat.png"), ("ten", "wide.jpg"),
        ("eleven", "bad\0name.jpg"),
    )  # fmt: skip
    data, rejects = build(tmp_path, source, max_pixels=100_000, text_views=2, seed=5)
    assert data.row_id.tolist() == [0, 1, 12] and data.labels is None and data.num_text_views == 2
    assert [data.caption(i) for i in range(3)] == ["A & B tell a story", "another caption", "nine"]
    assert np.array_equal(data.tokens([0, 1, 2]), tokenize(["A & B tell a story", "another caption", "nine"]))
    assert data.jpeg(0).tobytes() == data.jpeg(1).tobytes() == jpeg
    assert Image.open(io.BytesIO(data.jpeg(2))).format == "JPEG"
    reasons = {int(row): reason for row, _, reason in rejects}
    assert list(reasons) == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14]
    for row, reason in {
        2: "duplicate of row 0", 3: "empty caption", 4: "damaged image: image file is truncated", 5: "empty file",
        6: "unreadable image: no known format", 7: "missing file", 8: "not a file", 9: "not a file", 10: "empty path",
        11: "empty path", 13: "too large: 500x300 px", 14: "missing file",
    }.items():  # fmt: skip
        assert reasons[row].startswith(reason), (row, reasons[row])


def test_labelled_rows_and_templates(tmp_path):
    for name in "abcd":
        save(tmp_path / f"{name}.jpg")
    source = table(
        tmp_path / "eval.tsv", ("file", "kind", "text"),
        ("a.jpg", "zebra", ""), ("b.jpg", "ape", "an ape in a tree"), ("c.jpg", "zebra", ""), ("d.jpg", "", "no class"),
        ("a.jpg", "ape", ""), ("a.jpg", "zebra", ""),
    )  # fmt: skip
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


def test_a_labelled_csv_needs_no_caption_column(tmp_path):
    save(tmp_path / "a.jpg")
    source = table(tmp_path / "eval.csv", ("path", "class"), ("a.jpg", "ape"))
    data, _ = build(tmp_path, source, class_key="class")
    assert data.caption(0) in [template.replace("{}", "ape") for template in read_templates("imagenet80")]


def test_class_folders(tmp_path):
    for name in ("b/2.jpg", "b/deep/1.png", "a/1.jpg"):
        save(tmp_path / "set" / name)
    (tmp_path / "set/a/notes.txt").write_text("no image")
    (tmp_path / "templates.txt").write_text("one {}")
    data, rejects = build(tmp_path, tmp_path / "set", templates=str(tmp_path / "templates.txt"))
    assert [data.caption(i) for i in range(3)] == ["one a", "one b", "one b"]
    assert data.labels.tolist() == [0, 1, 1] and data.row_id.tolist() == [0, 2, 3]
    assert rejects == [["1", "a/notes.txt", "unreadable image: no known format"]]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_webdataset_shards(tmp_path):
    red, blue = save(tmp_path / "red.jpg"), save(tmp_path / "blue.png", (0, 0, 250))
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "00000.tar", "w") as tar:
        add(tar, "000000000.jpg", red)
        add(tar, "000000000.txt", b"from the text")
        add(tar, "000000000.json", json.dumps({"caption": "from the json", "status": "success"}).encode())
        add(tar, "000000001.json", json.dumps({"caption": "json alone"}).encode())
        add(tar, "000000001.png", blue)
        add(tar, "000000002.txt", b"no image here")
        add(tar, "000000003.jpg", red)
        add(tar, "000000003.json", b'{"caption": null}')
        add(tar, "000000004.jpg", red)
        add(tar, "000000004.json", b'{"caption": "half a pair \\ud83d"}')
    with tarfile.open(shards / "00001.tar", "w") as tar:
        add(tar, "000010000.jpg", red)
        add(tar, "000010000.txt", b"second shard")
    (shards / "00002.tar").write_bytes(b"no tar at all" * 100)
    data, rejects = build(tmp_path, shards)
    assert [data.caption(i) for i in range(4)] == ["from the text", "json alone", "half a pair \ufffd", "second shard"]
    assert data.jpeg(0).tobytes() == data.jpeg(3).tobytes() == red and data.row_id.tolist() == [0, 1, 4, 5]
    assert [(row, path, reason.partition(":")[0]) for row, path, reason in rejects] == [
        ("2", "00000.tar/000000002", "no image in the sample"),
        ("3", "00000.tar/000000003.jpg", "empty caption"),
        ("6", "00002.tar/", "damaged tar"),
    ]


def test_a_truncated_shard_keeps_its_whole_samples(tmp_path):
    red = save(tmp_path / "red.jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key in ("0", "1"):
            add(tar, f"{key}.txt", b"a caption")
            add(tar, f"{key}.jpg", red)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: 512 * 6 + len(red) // 512 * 512])  # in the middle of the second image
    data, rejects = build(tmp_path, tmp_path / "a.tar")
    assert data.row_id.tolist() == [0] and [row[0] for row in rejects] == ["1"]


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
        ([("path", "caption"), ("a.jpg", "x"), ("b.jpg", "x")], {}, "all 2 rows .*, most for: missing file"),
        ([("path", "caption"), ("good.jpg", "x")], {"templates": "nowhere.txt"}, "nowhere.txt cannot be read"),
        ([("path", "k"), ("good.jpg", "x"), ("a.jpg", "y")], {"class_key": "k"}, "no image of class 'y'"),
    ],
)  # fmt: skip
def test_mistakes_are_told_and_leave_no_beton(tmp_path, rows, options, message):
    save(tmp_path / "good.jpg")
    source = table(tmp_path / "pairs.csv", *rows)
    with pytest.raises(UserError, match=message):
        run(BuildConfig(source=source, out=tmp_path / "set.beton", workers=1, **options))
    assert not list(tmp_path.glob("*.beton*")) and not list(tmp_path.glob("*.tmp"))


def test_sources_that_are_none(tmp_path):
    (tmp_path / "pairs.xlsx").touch()
    (tmp_path / "empty").mkdir()
    for name, message in {"nowhere.csv": "not exist", "pairs.xlsx": "is not a .csv", "empty": "holds no rows"}.items():
        with pytest.raises(UserError, match=message):
            run(BuildConfig(source=tmp_path / name, out=tmp_path / "set.beton"))
    (tmp_path / "latin.csv").write_bytes("path,caption\na.jpg,café\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        run(BuildConfig(source=tmp_path / "latin.csv", out=tmp_path / "set.beton"))


@pytest.fixture
def long_source(tmp_path) -> Path:
    """Seconds of work for the workers."""
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


def test_a_dying_worker_is_told(tmp_path, long_source):
    when_under_way(tmp_path, lambda: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL))
    with pytest.raises(UserError, match="a worker process died"):
        run(BuildConfig(source=long_source, out=tmp_path / "set.beton", workers=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "noise.png"]


def test_ctrl_c_leaves_nothing(tmp_path, long_source):
    when_under_way(tmp_path, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(BuildConfig(source=long_source, out=tmp_path / "set.beton", workers=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "noise.png"]


def test_no_room_is_told(tmp_path):
    """A limit on the size of files stands in for a full disk."""
    save(tmp_path / "a.jpg")
    table(tmp_path / "a.csv", ("path", "caption"), ("a.jpg", "one"))
    code = (
        "import sys; from pathlib import Path\n"
        "from fastbd.commands.build import run; from fastbd.config import BuildConfig\n"
        "run(BuildConfig(source=Path(sys.argv[1], 'a.csv'), out=Path(sys.argv[1], 'a.beton'), workers=1))"
    )
    limited = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )  # fmt: skip
    assert "UserError: there is no room for" in limited.stderr
    assert not list(tmp_path.glob("*.beton")) and not list(tmp_path.glob("*.tmp"))
