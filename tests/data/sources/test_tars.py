from __future__ import annotations

import gzip
import io
import json
import os
import re
import sys
import tarfile

import pytest
from data.sources.mutations import mutations
from layouts import build, data_of, read, save, tar_bytes, write
from PIL import Image

from fastbd.base.errors import UserError
from fastbd.data.sources.item import CAPTION_LIMIT


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
    assert data.row_id.tolist() == [0]
    assert [reason for *_, reason in rejects] == ["no image in the sample", "damaged tar: its end is missing"]


def members(*names: str) -> list[tuple[str, bytes]]:
    """Members whose data say their names."""
    return [(name, f"this is {name}".encode()) for name in names]


def info(name: str, **fields) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(header, field, value)
    return header


SPARSE = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 40)}
TWICE = "twice in its sample: c/0.txt"
ANOTHER = "another image of its sample is taken: c/0.jpg"
CASES = {  # members of a tar; its rows: the image, its caption or [class], or why there is none
    "follow": (members("0.jpg", "0.txt", "1.txt", "1.jpg"), [("0.jpg", "0.txt"), ("1.jpg", "1.txt")]),
    "fields": (members("0.jpg", "0.seg.png", "0.txt", "0.npy"), [("0.jpg", "0.txt"), ("0.seg.png", ANOTHER)]),
    "mask_first": (members("0.a.jpg", "0.png", "0.txt"), [("0.png", "0.txt"), ("0.a.jpg", ANOTHER)]),
    "two_kinds": (members("0.webp", "0.JPG", "0.txt"), [("0.JPG", "0.txt"), ("0.webp", ANOTHER)]),
    "compound": (members("0.image.jpg", "0.txt"), [("0.image.jpg", "0.txt")]),
    "in_doubt": (
        members("0.left.jpg", "0.right.jpg", "0.txt"),
        [("0.left.jpg", "several images in the sample: give --image-key left.jpg or right.jpg"),
         ("0.right.jpg", "several images in the sample: give --image-key left.jpg or right.jpg")],
    ),
    "dotted": (members("a.1.jpg", "a.1.txt", "a.2.txt", "a.2.jpg"), [("a.1.jpg", "a.1.txt"), ("a.2.jpg", "a.2.txt")]),
    "dotted_one": (members("a.1.jpg", "a.1.txt"), [("a.1.jpg", "a.1.txt")]),
    "dotted_too": (
        members("a.jpg", "a.txt", "a.1.jpg", "a.1.txt", "a.2.jpg"),
        [("a.jpg", "a.txt"), ("a.1.jpg", "a.1.txt"), ("a.2.jpg", "no caption in the sample")],
    ),
    "folders": (members("x.y/0.jpg", "x.y/0.txt", "z/0.jpg"), [("x.y/0.jpg", "x.y/0.txt"), ("z/0.jpg", "no caption")]),
    "apart": (members("0.jpg", "1.jpg", "0.txt", "1.txt"), [("0.jpg", "0.txt"), ("1.jpg", "1.txt")]),
    "again": (
        [*members("0.jpg", "0.txt", "1.jpg", "0.jpg"), ("0.txt", b"another"), *members("1.txt")],
        [("0.jpg", "0.txt"), ("0.jpg", ["another"]), ("1.jpg", "1.txt")],
    ),
    "twice": ([*members("0.jpg", "0.txt"), ("0.txt", b"another")], [("0.jpg", "twice in its sample: ")]),
    "torn": (members("0.jpg", "5.txt", "1.jpg", "1.txt", "5.jpg", "5.txt"),
             [("0.jpg", "no caption"), ("5", "no image in the sample"), ("5.jpg", "5.txt"), ("1.jpg", "1.txt")]),
    "alone": (members("0.jpg", "1.txt", "readme"),
              [("0.jpg", "no caption"), ("1", "no image"), ("readme", "no image")]),
    "kinds": (
        members(*(f"{i}.{s}" for i, s in enumerate(("gif", "BMP", "tif", "tiff", "avif", "jpeg"))),
                *(f"{i}.txt" for i in range(6))),
        [(f"{i}.{s}", f"{i}.txt") for i, s in enumerate(("gif", "BMP", "tif", "tiff", "avif", "jpeg"))],
    ),
    "systems": (
        members("./0.jpg", "./._0.jpg", "__MACOSX/0.jpg", ".DS_Store", "a/.ipynb_checkpoints/0.txt", "./0.txt"),
        [("./0.jpg", "./0.txt")],
    ),
    "absolute": (members("/etc/0.jpg", "/etc/0.txt", "../1.jpg", "../1.txt"),
                 [("/etc/0.jpg", "/etc/0.txt"), ("../1.jpg", "../1.txt")]),
    "long": (members(f"{'d' * 200}/0.jpg", f"{'d' * 200}/0.txt"), [(f"{'d' * 200}/0.jpg", f"{'d' * 200}/0.txt")]),
    "links": (
        [info("d", type=tarfile.DIRTYPE), *members("0.jpg", "0.txt"),
         info("1.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), *members("1.txt", "2.jpg"),
         info("2.txt", type=tarfile.LNKTYPE, linkname="0.txt"), info("3.jpg", type=tarfile.CHRTYPE), *members("3.txt")],
        [("0.jpg", "0.txt"), ("1.jpg", "a link or device, not a file: "), ("2.jpg", "a link or device, not a file: "),
         ("3.jpg", "a link or device")],
    ),
    "sparse": (
        [info("0.jpg", pax_headers=SPARSE), *members("0.txt", "1.jpg"), info("1.json", pax_headers=SPARSE),
         *members("2.jpg", "2.txt")],
        [("0.jpg", "a sparse file: "), ("1.jpg", "a sparse file: "), ("2.jpg", "2.txt")],
    ),
    "texts": (
        [*members("0.jpg"), ("0.txt", "caf\u00e9".encode("latin-1")), *members("1.jpg"),
         ("1.txt", "\ufeffcaf\u00e9\n".encode()), *members("2.jpg"), ("2.txt", "\u00e9".encode() * 50_000),
         *members("3.jpg"), ("3.txt", b" "), *members("4.jpg"), ("4.txt", b""), ("4.json", b'{"caption": "four"}')],
        [("0.jpg", "not UTF-8 text: "), ("1.jpg", ["caf\u00e9"]), ("2.jpg", ["\u00e9" * CAPTION_LIMIT]),
         ("3.jpg", [""]), ("4.jpg", ["four"])],
    ),
    "jsons": (
        [*members("0.jpg"), ("0.json", b"[" * 100_000), *members("1.jpg"), ("1.json", b'{"caption": 3}'),
         *members("2.jpg"), ("2.json", b"["), *members("3.jpg"), ("3.json", b"[1]"),
         *members("4.jpg"), ("4.json", b" " * (1 << 24) + b'{"caption": "x"}'),
         *members("5.jpg", "5.txt"), ("5.json", b"[" * 100_000), *members("6.jpg"), ("6.json", b"9" * 5000)],
        [("0.jpg", "damaged .json: nested too deep"), ("1.jpg", "'caption' in the .json is not text"),
         ("2.jpg", "damaged .json: Expecting"), ("3.jpg", "no caption in the sample"), 
         ("4.jpg", "a .json of more than"), ("5.jpg", "5.txt"), ("6.jpg", "damaged .json")],
    ),
    "classes_beside": ([*members("0.jpg", "0.txt"), ("0.cls", b"3")], [("0.jpg", "0.txt")]),
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, list]:
    """The items of each case's tar, all of them read as the shards of one source."""
    folder = tmp_path_factory.mktemp("cases")
    write(folder, {f"{name}.tar": tar_bytes(case[0]) for name, case in CASES.items()})
    found: dict[str, list] = {name: [] for name in CASES}
    for item in read(folder, workers=2):
        found[item.name.split(".tar/")[0]].append(item)
    return found


@pytest.mark.parametrize("case", CASES)
def test_samples_of_a_tar(rows, case):
    wanted = CASES[case][1]
    assert [item.name.removeprefix(f"{case}.tar/") for item in rows[case]] == [name for name, _ in wanted]
    for item, (name, text) in zip(rows[case], wanted, strict=True):
        assert item.class_name is None
        if isinstance(text, list):
            assert (item.problem, [item.caption]) == (None, text)
        elif item.problem:
            assert item.problem.startswith(text.split(": c/")[0]), item.problem
        else:
            assert item.caption == f"this is {text}" and data_of(item) == f"this is {name}".encode()


def test_the_entry_of_the_json_that_is_asked_for(tmp_path):
    both = json.dumps({"caption": "alt text", "blip_caption": "a red square", "synthetic": None}).encode()
    samples = [
        ("0.jpg", b"0"),
        ("0.txt", b"alt text"),
        ("0.json", both),
        ("1.jpg", b"1"),
        ("1.txt", b"no json"),
        ("2.jpg", b"2"),
        ("2.json", b'{"caption": "x"}'),
    ]
    (tmp_path / "a.tar").write_bytes(tar_bytes(samples))
    items = read(tmp_path / "a.tar", caption_key="blip_caption")
    assert [(item.caption, item.problem) for item in items] == [
        ("a red square", None),
        ("", "no .json in the sample"),
        ("", "no 'blip_caption' in the .json"),
    ]
    assert read(tmp_path / "a.tar", caption_key="caption")[0].caption == "alt text"
    assert read(tmp_path / "a.tar", caption_key="synthetic")[0][3:8:4] == ("", None)  # empty, as build says
    with pytest.raises(UserError, match="--class-key is for a table.*a.tar is tars: leave it out"):
        read(tmp_path / "a.tar", class_key="cls")


def test_the_image_that_is_asked_for(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_bytes(members("0.jpg", "0.left.jpg", "0.right.jpg", "0.png", "0.txt")))
    for key, name in {"png": "0.png", ".PNG": "0.png", "left.jpg": "0.left.jpg", "right.jpg": "0.right.jpg"}.items():
        (item,) = read(tmp_path / "a.tar", image_key=key)
        assert data_of(item) == f"this is {name}".encode() and item.caption == "this is 0.txt" and not item.problem
    assert read(tmp_path / "a.tar", image_key="gif")[0].problem == "no image in the sample"


def test_classes_of_webdataset(tmp_path):
    samples = [("0.jpg", b"0"), ("0.cls", b"7"), ("1.jpg", b"1"), ("1.cls", b"sea lion\n"), ("2.jpg", b"2")]
    write(tmp_path / "set", {"x/y/0.tar": tar_bytes(samples), "x/1.tar": tar_bytes([("9.jpg", b"9"), ("9.cls", b"7")])})
    items = read(tmp_path / "set")
    assert [(item.name, item.class_name, item.problem) for item in items] == [
        ("x/1.tar/9.jpg", "7", None),
        ("x/y/0.tar/0.jpg", "7", None),
        ("x/y/0.tar/1.jpg", "sea lion", None),
        ("x/y/0.tar/2.jpg", None, "no caption in the sample"),
    ]
    write(tmp_path / "set", {"z.tar": tar_bytes([("3.jpg", b"3"), ("3.txt", b"a caption")])})
    problems = [item.problem for item in read(tmp_path / "set")]
    assert problems == [None] + ["no caption in the sample, only a class"] * 3 + ["no caption in the sample"]


def test_imagenets_tars(tmp_path):
    """A tar a class, in a folder and in one tar: the images of the inner tars are read where they lie."""
    tench = tar_bytes([("n01440764_1.JPEG", b"one tench"), ("n01440764_2.JPEG", b"two tenches")])
    goldfish = tar_bytes([("n01443537_9.JPEG", b"a goldfish")])
    write(tmp_path / "train", {"n01440764.tar": tench, "n01443537.tar": goldfish})
    whole = [("n01440764.tar", tench), ("n01443537.tar", goldfish), ("too.tar.gz", gzip.compress(tench))]
    (tmp_path / "train.tar").write_bytes(tar_bytes(whole, tarfile.GNU_FORMAT))
    for source, before in ((tmp_path / "train", ""), (tmp_path / "train.tar", "train.tar/")):
        items = [item for item in read(source, workers=2) if "too" not in item.name]
        assert [(item.name.removeprefix(before), item.class_name, data_of(item)) for item in items] == [
            ("n01440764.tar/n01440764_1.JPEG", "n01440764", b"one tench"),
            ("n01440764.tar/n01440764_2.JPEG", "n01440764", b"two tenches"),
            ("n01443537.tar/n01443537_9.JPEG", "n01443537", b"a goldfish"),
        ]
    assert read(tmp_path / "train.tar")[-1].problem.startswith("damaged tar: it is compressed (gzip)")


def test_an_empty_tar_of_a_class(tmp_path):
    save(tmp_path / "a.jpg")
    image = (tmp_path / "a.jpg").read_bytes()
    write(tmp_path / "set", {"n01440764.tar": tar_bytes([("a.JPEG", image)]), "n01443537.tar": tar_bytes([])})
    with pytest.raises(UserError, match="no image of class 'n01443537' of .* can be used"):
        build(tmp_path, tmp_path / "set")


def test_inner_tars_end_where_they_end(tmp_path):
    cut = tar_bytes([("0.jpg", b"0" * 2000), ("0.txt", b"zero")])[:1024]
    (tmp_path / "a.tar").write_bytes(tar_bytes([("cut.tar", cut), ("1.jpg", b"1"), ("1.txt", b"one")]))
    assert [(item.name, item.problem) for item in read(tmp_path / "a.tar")] == [
        ("a.tar/cut.tar/0.jpg", "cut off by the end of the tar: 0.jpg"),
        ("a.tar/1.jpg", None),
    ]


def test_damage_in_the_middle_is_told(tmp_path):
    """tarfile itself takes a header whose checksum is wrong for the end of the tar."""
    whole = tar_bytes([("0.jpg", b"0"), ("0.txt", b"zero"), ("1.jpg", b"1"), ("1.txt", b"one")])
    negative = tarfile.TarInfo("2.jpg").tobuf(tarfile.GNU_FORMAT)
    negative = negative[:124] + b"\xff" * 12 + negative[136:]
    checksum = sum(negative[:148]) + 8 * 32 + sum(negative[156:])
    negative = negative[:148] + f"{checksum:06o}\0 ".encode() + negative[156:]
    deep = tarfile.TarInfo("././@LongLink")
    deep.type, deep.size = tarfile.GNUTYPE_LONGNAME, 1
    deep = (deep.tobuf(tarfile.GNU_FORMAT) + b"x" + bytes(511)) * 3000
    told_negative = "invalid offset" if sys.version_info >= (3, 14) else "a member of negative size"  # tarfile; ours
    damaged = {
        "flip": (whole[:2048] + b"X" + whole[2049:], "damaged tar: bad checksum"),
        "no_end": (whole[:4096], "damaged tar: its end is missing"),
        "negative": (whole[:4096] + negative + bytes(1024), f"damaged tar: {told_negative}"),
        "attributes": (
            whole[:4096] + info("x", pax_headers={"comment": "x" * 40_000}).tobuf() + bytes(1024),
            "damaged",
        ),
        "deep": (whole[:4096] + deep, "damaged tar: RecursionError"),
        "rubbish": (whole + b"rubbish", "damaged tar"),
        "empty": (b"", "damaged tar: its end is missing"),
        "zeros": (bytes(10_240), "empty tar"),
        "cat": (whole + tar_bytes([("2.jpg", b"2"), ("2.txt", b"two")]), None),
    }
    write(tmp_path / "set", {f"{name}.tar": data for name, (data, _) in damaged.items()})
    items = read(tmp_path / "set", workers=2)
    for name, (_, problem) in damaged.items():
        own = [item for item in items if item.name.startswith(name + ".tar/")]
        told = [item.problem for item in own if item.problem]
        assert (not told and not problem) or told[-1].startswith(problem), (name, told)
        whole_samples = 0 if name in ("empty", "zeros") else 1 if name == "flip" else 3 if name == "cat" else 2
        assert sum(item.problem is None for item in own) == whole_samples, name


def test_images_of_every_format_are_packed(tmp_path):
    suffixes = ("jpg", "png", "webp", "gif", "bmp", "tif", "tiff")
    files = {f"{i}.{s}": save(tmp_path / f"{i}.{s}", (30 * i, 60, 90)) for i, s in enumerate(suffixes)}
    captions = {f"{i}.txt": f"in {s}".encode() for i, s in enumerate(suffixes)}
    (tmp_path / "a.tar").write_bytes(tar_bytes([*files.items(), *captions.items()]))
    data, rejects = build(tmp_path, tmp_path / "a.tar")
    assert [data.caption(i) for i in range(7)] == [f"in {s}" for s in suffixes] and rejects == []
    reds = [Image.open(io.BytesIO(data.jpeg(i))).convert("RGB").getpixel((5, 5))[0] for i in range(7)]
    assert all(abs(red - 30 * i) < 5 for i, red in enumerate(reds))


def test_a_compressed_tar_is_refused(tmp_path):
    data = tar_bytes(members("0.jpg", "0.txt"))
    write(tmp_path, {"a.tar.gz": gzip.compress(data), "in/b.tgz": gzip.compress(data), "c.tar": gzip.compress(data)})
    for name, path in {"a.tar.gz": "a.tar.gz", "in": "in/b.tgz", "c.tar": "c.tar", "*.tar.gz": "a.tar.gz"}.items():
        with pytest.raises(UserError, match=rf"{path} is compressed \(gzip\).*: unpack it to a .tar first"):
            read(tmp_path / name)


def test_patterns_of_tars(tmp_path, monkeypatch):
    write(tmp_path, {f"{i:05}.tar": tar_bytes([(f"{i}.jpg", b"x"), (f"{i}.txt", b"y")]) for i in range(12)})
    monkeypatch.chdir(tmp_path)
    for pattern, wanted in {
        "{00000..00003}.tar": [0, 1, 2, 3],
        "0000{9..9}.tar": [9],
        "{00010,00002}.tar": [10, 2],
        "0001?.tar": [10, 11],
        "{0000,0001}[01].tar": [0, 1, 10, 11],
    }.items():
        names = [item.name for item in read(tmp_path / pattern, workers=2)]
        assert [int(re.search(r"(\d+)\.jpg$", name)[1]) for name in names] == wanted, pattern
    for pattern, message in {
        "{00009..00331}.tar": r"00331}.tar names 323 tars, and 320 are missing, first .*00012.tar",
        "{5..1}.tar": "the range {5..1} in .* is empty or too long",
        "{0..9999999999}.tar": "too long",
        "x*.tar": r"names 1 tars, and 1 are missing, first .*x\*.tar",
    }.items():
        with pytest.raises(UserError, match=message):
            read(tmp_path / pattern)
    os.rename("00003.tar", "{00000..00003}.tar")  # a name that is there is no pattern
    assert [item.name for item in read(tmp_path / "{00000..00003}.tar")] == ["{00000..00003}.tar/3.jpg"]


def test_no_damage_to_a_tar_gives_a_wrong_pair(tmp_path):
    """Images and captions carry the key of their sample, in their names and in their text."""
    keys = [f"{i:04}" * 6 for i in range(4)]
    samples = [
        (f"{key}.{suffix}", f"<{key}>".encode() if suffix != "json" else json.dumps({"caption": f"<{key}>"}).encode())
        for key in keys
        for suffix in ("jpg", "txt", "json")
    ]
    for seed, format in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        folder = tmp_path / str(seed)
        whole = tar_bytes(samples, format)[: 512 * 2 * len(samples) + 1024]
        write(folder, {f"{i:05}.tar": data for i, data in enumerate(mutations(whole, seed=seed))})
        pairs = 0
        for item in read(folder, workers=2):
            if item.problem or not item.caption:
                continue
            image, of_image = (
                data_of(item).decode(errors="replace"),
                [key for key in keys if f"<{key}>" in item.caption],
            )
            pairs += 1
            assert not of_image or not any(f"<{key}>" == image for key in set(keys) - set(of_image)), item
        assert pairs
