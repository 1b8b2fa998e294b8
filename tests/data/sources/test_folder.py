from __future__ import annotations

import json
import os
import sys

import pytest
from data.sources.mutations import COUNT, mutations
from layouts import build, data_of, read, save, write

from fastbd.base.errors import UserError


def named(*names: str) -> dict[str, bytes]:
    """Files whose contents say their names."""
    return {name: f"this is {name}".encode() for name in names}


def rows(items) -> list[tuple]:
    """(image, caption or class) of each item, or (image, problem)."""
    return [(item.name, item.problem or item.caption or [item.class_name]) for item in items]


def both(*keys: str) -> list[str]:
    return [f"{key}{suffix}" for key in keys for suffix in (".jpg", ".txt")]


def test_class_folders(tmp_path):
    for name in ("b/2.jpg", "b/deep/1.png", "a/1.jpg"):
        save(tmp_path / "set" / name)
    (tmp_path / "set/a/notes.txt").write_text("no image")
    (tmp_path / "templates.txt").write_text("one {}")
    data, rejects = build(tmp_path, tmp_path / "set", templates=str(tmp_path / "templates.txt"))
    assert [data.caption(i) for i in range(3)] == ["one a", "one b", "one b"]
    assert data.labels.tolist() == [0, 1, 1] and data.row_id.tolist() == [0, 2, 3]
    assert rejects == [["1", "a/notes.txt", "unreadable image: no known format"]]


def test_pairs_of_files_are_packed(tmp_path):
    red, blue = save(tmp_path / "set/x/1.jpg"), save(tmp_path / "set/x/2.jpg", (0, 0, 250))
    write(tmp_path / "set", {"x/1.txt": b"a red square", "x/2.json": b'{"caption": "a blue square"}', "x/3.txt": b"x"})
    data, rejects = build(tmp_path, tmp_path / "set", layout="pairs")
    assert [data.caption(i) for i in range(2)] == ["a red square", "a blue square"] and data.labels is None
    assert [data.jpeg(i).tobytes() for i in range(2)] == [red, blue]
    assert rejects == [["2", "x/3", "no image in the sample"]]


def test_one_folder_of_pairs(tmp_path):
    write(tmp_path, named(*both("1", "2.b", "c d"), "e.PNG", "e.txt", "f.jpg", "g.txt", "h.npy"))
    write(tmp_path, {"latin.jpg": b"x", "latin.txt": b"caf\xe9"} | named("t.jpg", "t.png", "t.txt"))
    assert rows(read(tmp_path)) == [
        ("1.jpg", "this is 1.txt"),
        ("2.b.jpg", "this is 2.b.txt"),
        ("c d.jpg", "this is c d.txt"),
        ("e.PNG", "this is e.txt"),
        ("f.jpg", "no caption in the sample"),
        ("g", "no image in the sample"),
        ("h", "no image in the sample"),
        ("latin.jpg", "not UTF-8 text: latin.txt"),
        ("t.jpg", "this is t.txt"),
        ("t.png", "another image of its sample is taken: t.jpg"),
    ]


def test_shard_folders(tmp_path):
    """As img2dataset writes them: the images of a shard begin with its name."""
    write(tmp_path, named(*both("00000/000000000", "00000/000000007", "00001/000010003"), "00000/000000001.jpg"))
    write(tmp_path, named("00000.parquet", "00000_stats.json", "00001.parquet", "00001_stats.json"))
    items = read(tmp_path)
    assert rows(items) == [
        ("00000/000000000.jpg", "this is 00000/000000000.txt"),
        ("00000/000000001.jpg", "no caption in the sample"),
        ("00000/000000007.jpg", "this is 00000/000000007.txt"),
        ("00001/000010003.jpg", "this is 00001/000010003.txt"),
    ]
    assert [item.row_id for item in items] == [0, 1, 2, 3] and data_of(items[3]) == b"this is 00001/000010003.jpg"


def test_many_pairs_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("fastbd.data.sources.folder.CHUNK", 5)
    keys = [f"{i}{rest}" for i in range(10) for rest in ("", "-a", " b", ".c")]
    write(tmp_path, named(*both(*keys)))
    found = {item.name: item.caption for item in read(tmp_path, workers=2) if not item.problem}
    assert found == {f"{key}.jpg": f"this is {key}.txt" for key in keys}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (
            both("cat/1", "dog/2"),
            r"could be pairs \(cat/1.jpg has a caption .*\) or class folders \(cat/1.jpg is in one\)",
        ),
        (["cat/1.jpg", "cat/2.jpg", *both("dog/9")], "give --layout pairs or --layout classes"),
        ([*both("0"), "cat/1.jpg"], "give --layout pairs or --layout classes"),
        (both("0/1", "1/2"), "give --layout pairs"),  # digits, as MNIST's class folders
        (["a.tar", "cat/1.jpg"], r"holds tars \(a.tar\) and images \(cat/1.jpg\): say with --layout which"),
        (["n01440764/README.txt", "n01440764/1.JPEG", "n2/labels.txt", "n2/2.JPEG", "n2/2.json"], "classes"),
        (["cat/1.jpg", "dog/2.jpg", "classes.txt", "README.md"], "classes"),
        (["00000/00000_00001.jpg", "00001/00000_00001.jpg", "00001/GT-00001.csv"], "classes"),  # GTSRB's
    ],
)
def test_folders_that_can_be_read_in_two_ways(tmp_path, files, wanted):
    write(tmp_path / "set", named(*files))
    if wanted != "classes":
        with pytest.raises(UserError, match=wanted):
            read(tmp_path / "set")
    items = read(tmp_path / "set", layout="classes")
    assert {item.class_name for item in items if not item.problem} == {f.split("/")[0] for f in files if "/" in f}
    if wanted == "classes":
        assert rows(read(tmp_path / "set")) == rows(items)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["train/cat/1.jpg", "val/cat/2.jpg"], "the folder train of .*set holds no images but in .*train/cat/1.jpg"),
        (["n1/images/1.jpg", "n2/images/2.jpg"], "give --source .*set/n1 if these are the classes, or --layout clas"),
        (["cat/1.jpg", "more/dog/2.jpg"], "the folder more of .* holds no images but in folders of its own"),
        (["train2014/1.jpg", "val2014/2.jpg"], "the only folders of images in .*set are train2014, val2014: give"),
        (
            ["Images/1.jpg", "Images/2.jpg", "captions.txt"],
            "the only folders of images in .*set are Images: give --lay",
        ),
        (["train/1.jpg", "train/metadata.csv"], "the only folders of images in .*set are train"),
    ],
)
def test_folders_that_may_not_be_classes(tmp_path, files, wanted):
    write(tmp_path / "set", named(*files))
    with pytest.raises(UserError, match=wanted):
        read(tmp_path / "set")
    assert {item.class_name for item in read(tmp_path / "set", layout="classes")} == {
        file.split("/")[0] for file in files if "/" in file
    }


@pytest.mark.parametrize("files", [["train/1.jpg", "bus/2.jpg"], ["cat/1.jpg", "cat/young/2.jpg", "dog/1.jpg"]])
def test_folders_that_are_classes(tmp_path, files):
    write(tmp_path, named(*files))
    assert {item.class_name for item in read(tmp_path)} == {file.split("/")[0] for file in files}


def test_endings_in_capitals_are_captions_too(tmp_path):
    write(tmp_path, named("1.JPG", "1.TXT") | {"2.JPG": b"x", "2.JSON": b'{"caption": "two"}'})
    assert rows(read(tmp_path)) == [("1.JPG", "this is 1.TXT"), ("2.JPG", "two")]
    (tmp_path / "1.TXT").unlink()
    assert rows(read(tmp_path))[1] == ("2.JPG", "two")


def test_boxes_are_not_captions(tmp_path):
    """YOLO's .txt: a class's number, and x, y, width and height of its box, on each line."""
    boxes = b"0 0.5 0.5 0.1 0.2\n11 0.25 1 3e-05 0.2\n"
    write(tmp_path, {"1.jpg": b"x", "1.txt": boxes, "2.jpg": b"x", "2.txt": b"1 2 3", "3.jpg": b"x", "3.txt": b"1 dog"})
    reason = "boxes of objects in the .txt, as YOLO's"
    assert rows(read(tmp_path)) == [("1.jpg", reason), ("2.jpg", "1 2 3"), ("3.jpg", "1 dog")]


def test_a_json_makes_pairs_only_with_a_caption(tmp_path):
    write(tmp_path, {f"00000/00000{i}.jpg": b"x" for i in range(3)} | {"00000/000000.json": b"[" * 100_000})
    write(tmp_path, {"00000/000001.json": json.dumps({"caption": None, "blip": "one"}).encode()})
    assert rows(read(tmp_path))[1:] == [("00000/000001.jpg", [None]), ("00000/000002.jpg", "no caption in the sample")]
    assert rows(read(tmp_path, caption_key="blip"))[1] == ("00000/000001.jpg", "one")
    (tmp_path / "00000/000001.json").write_text('{"width": 3}')
    assert {item.class_name for item in read(tmp_path, layout="classes")} == {"00000"}
    with pytest.raises(UserError, match="--caption-key is for .* is a folder of class folders: leave it out"):
        read(tmp_path, caption_key="caption")
    write(tmp_path, named("000009.jpg", "000009.txt"))
    with pytest.raises(UserError, match="--labels is for .* a folder of pairs: leave it out"):
        read(tmp_path, labels=tmp_path / "labels.txt", layout="pairs")


SYSTEMS = (
    ".DS_Store",
    ".git/1.jpg",
    ".ipynb_checkpoints/2.jpg",
    "cat/.ipynb_checkpoints/3-checkpoint.jpg",
    "cat/._1.jpg",
    "__MACOSX/cat/4.jpg",
    "cat/Thumbs.db",
    "dog/desktop.ini",
    "lost+found/5.jpg",
    "dog/@eaDir/6.jpg",
    "$RECYCLE.BIN/7.jpg",
    "System Volume Information/8.jpg",
    ".hidden.txt",
    "cat/__MACOSX/1.txt",
)


def test_what_systems_leave_is_passed_over(tmp_path):
    write(tmp_path / "set", named(*SYSTEMS, "cat/1.jpg", "dog/deep/2.jpg"))
    (tmp_path / "set/.empty").mkdir()
    assert rows(read(tmp_path / "set", layout="classes")) == [("cat/1.jpg", ["cat"]), ("dog/deep/2.jpg", ["dog"])]
    (tmp_path / "labels.txt").write_text("a\nb\n")
    assert rows(read(tmp_path / "set", labels=tmp_path / "labels.txt")) == [
        ("cat/1.jpg", ["a"]),
        ("dog/deep/2.jpg", ["b"]),
    ]
    write(tmp_path / "set", named("cat/1.txt", "dog/deep/2.txt"))
    assert [name for name, _ in rows(read(tmp_path / "set", layout="pairs"))] == ["cat/1.jpg", "dog/deep/2.jpg"]


def test_no_class_is_lost_silently(tmp_path):
    save(tmp_path / "set/cat/1.jpg")
    write(tmp_path / "set", {"dog/Thumbs.db": b"", "loose.jpg": b"x"})
    assert rows(read(tmp_path / "set")) == [
        ("loose.jpg", "in no class folder"),
        ("cat/1.jpg", ["cat"]),
        ("dog", "empty class folder"),
    ]
    with pytest.raises(UserError, match=r"no image of class 'dog' of .*set can be used: see .*rejects.csv"):
        build(tmp_path, tmp_path / "set")
    (tmp_path / "classes.txt").write_text("cat\n")
    data, rejects = build(tmp_path, tmp_path / "set", classes=str(tmp_path / "classes.txt"))
    assert data.class_names == ["cat"] and len(rejects) == 2


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path, named("real/1.jpg", "set/dog/2.jpg"))
    (tmp_path / "set/cat").symlink_to(tmp_path / "real")
    (tmp_path / "real/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/dog/again").symlink_to(tmp_path / "set/dog")
    assert [row for row in rows(read(tmp_path / "set")) if row[0].count("/") == 1] == [
        ("cat/1.jpg", ["cat"]),
        ("dog/2.jpg", ["dog"]),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="a name that is not UTF-8")
def test_names_that_are_not_utf8(tmp_path):
    save(tmp_path / "set/cat/1.jpg")
    os.mkdir(os.fsencode(tmp_path / "set") + b"/caf\xe9")
    write(tmp_path / "set", {os.fsdecode(b"caf\xe9/2.jpg"): (tmp_path / "set/cat/1.jpg").read_bytes()})
    with pytest.raises(UserError, match="no image of class 'caf.*' of .* can be used"):
        build(tmp_path, tmp_path / "set")
    write(tmp_path / "set", {os.fsdecode(b"caf\xe9/2.txt"): b"coffee"})
    assert rows(read(tmp_path / "set", layout="pairs"))[0] == (os.fsdecode(b"caf\xe9/2.jpg"), "coffee")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read(tmp_path):
    write(tmp_path, named("cat/1.jpg", "dog/2.jpg"))
    (tmp_path / "dog").chmod(0)
    with pytest.raises(UserError, match="the folder .*dog cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize(
    "image, path, content",
    [
        ("Images/1.jpg", "captions.txt", "image,caption\n1.jpg,A dog\n"),
        ("train/1.jpg", "train/metadata.csv", "file_name,text\n1.jpg,A dog\n"),
        ("train/1.jpg", "train/metadata.jsonl", '{"file_name": "1.jpg", "text": "A dog"}\n'),
        (
            "train2017/1.jpg",
            "annotations/captions_train2017.json",
            '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "A dog"}]}',
        ),
        ("images/1.jpg", "list.json", '[{"image": "images/1.jpg", "caption": "A dog"}]'),
    ],
)
def test_a_list_of_captions_beside_folders_is_in_doubt(tmp_path, image, path, content):
    """As Flickr8k, ImageFolder of Hugging Face's datasets and COCO are unpacked: no folder there is a class."""
    write(tmp_path, {image: b"1", path: content.encode()})
    with pytest.raises(UserError, match=f"could be class folders, or images that .*{path} lists: give --source"):
        read(tmp_path)
    assert (image, image.split("/")[0]) in [(item.name, item.class_name) for item in read(tmp_path, layout="classes")]


@pytest.mark.parametrize("content", [b"", b"The image, and its path\n", b"image\n", b"\xff\xfe", b"cat\ndog\n", b"{}"])
def test_other_files_beside_class_folders(tmp_path, content):
    names = ["README.txt", "classes.csv", "a.json", "a.jsonl", "a.tsv"]
    write(tmp_path, {"cat/1.jpg": b"1", "dog/2.jpg": b"2"} | dict.fromkeys(names, content))
    assert [item.class_name for item in read(tmp_path)] == ["cat", "dog"]


def test_no_damage_to_files_gives_a_wrong_pair(tmp_path):
    """Pairs whose captions and images carry their key; of each set one file is damaged, or one name."""
    keys = [f"{i:03}" * 4 for i in range(3)]
    files = {}
    for key in keys:
        files[f"{key}.jpg"], files[f"{key}.txt"] = f"<{key}>".encode(), f"<{key}>".encode()
        files[f"{key}.json"] = json.dumps({"caption": f"<{key}>", "width": 9}).encode()
    names = list(files)
    changed = [iter(mutations(data, COUNT // len(names) + 1)) for data in files.values()]
    renamed = iter(mutations(names[1].encode(), COUNT, special=(b".", b"/", b"..", b"\xff", b" ", b"\n", b"~")))
    for i in range(COUNT):
        name = names[i % len(names)]
        damaged = files | {name: next(changed[i % len(names)])}
        if i % 5 == 0:  # this one's name, instead
            new = next(renamed).replace(b"\0", b"").replace(b"/", b"_")[:200]
            damaged = {key: data for key, data in files.items() if key != name}
            damaged |= {} if new in (b"", b".", b"..") else {os.fsdecode(new): files[name]}
        write(tmp_path / "set" / f"{i:05}", damaged)
    pairs = 0
    for caption_key in (None, "caption"):
        for item in read(tmp_path / "set", layout="pairs", caption_key=caption_key, workers=2):
            if not item.problem and item.caption:
                image = data_of(item).decode(errors="replace")
                wrong = [key for key in keys if f"<{key}>" in item.caption and f"<{key}>" not in image]
                assert not (wrong and any(f"<{key}>" == image for key in keys)), item
                pairs += 1
    assert pairs
