from __future__ import annotations

import json
from pathlib import Path

import pytest
from data.sources.mutations import COUNT, mutations

from fastbd.base.errors import UserError
from fastbd.commands.build import run
from fastbd.config.flags import BuildConfig
from fastbd.data.sources import read_items
from fastbd.data.sources.item import Item


def read(path: Path, content, **options) -> list[Item]:
    """The items of a file with these bytes, this text, or this value as JSON."""
    text = content if isinstance(content, str) else "" if isinstance(content, bytes) else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else text.encode())
    return read_items(BuildConfig(source=path, out=path.with_suffix(".beton"), **options))


def rows(items: list[Item]) -> list[tuple]:
    """(row_id, line, path, caption or problem) of each."""
    return [(item.row_id, item.line, item.name, item.problem or item.caption) for item in items]


def lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


PAIRS = [{"image": "a.jpg", "caption": "a dog"}, {"image": "b.jpg", "caption": "a\ncat"}]


def test_a_list_and_lines_of_pairs(tmp_path):
    wanted = [(0, None, "a.jpg", "a dog"), (1, None, "b.jpg", "a\ncat")]
    assert rows(read(tmp_path / "a.json", PAIRS)) == wanted
    assert rows(read(tmp_path / "a.json", json.dumps(PAIRS, indent=2))) == wanted
    with_lines = [(row, row + 1, *rest) for row, _, *rest in wanted]
    for name in ("a.jsonl", "a.ndjson", "a.json"):
        items = read(tmp_path / name, lines(*PAIRS))
        assert rows(items) == with_lines and items[0].file == str(tmp_path / "a.jpg")
    assert rows(read(tmp_path / "a.jsonl", "\ufeff" + lines(*PAIRS).replace("\n", "\r\n\r\n"))) == [
        (0, 1, "a.jpg", "a dog"),
        (1, 3, "b.jpg", "a\ncat"),
    ]


def test_keys_and_the_folder_of_images(tmp_path):
    (tmp_path / "images").mkdir()
    record = {"file": "a.jpg", "text": "a dog", "label": 3, "image": "other.jpg", "caption": "another"}
    (item,) = read(
        tmp_path / "a.json",
        [record],
        image_key="file",
        caption_key="text",
        class_key="label",
        images=tmp_path / "images",
    )
    assert item == Item(0, "a.jpg", str(tmp_path / "images/a.jpg"), "a dog", "3")
    items = read(
        tmp_path / "a.jsonl",
        lines({"file_name": "a.jpg", "class": "ape"}, {"path": "b.jpg", "class": " "}, {"path": "b.jpg", "class": 1.5}),
        class_key="class",
    )
    assert rows(items) == [
        (0, 1, "a.jpg", ""),
        (1, 2, "b.jpg", "empty class"),
        (2, 3, "b.jpg", "class is not text: 1.5"),
    ]
    assert items[0].class_name == "ape"


def test_a_list_of_captions_is_several_rows(tmp_path):
    record = {"image": "a.jpg", "caption": ["one", "two", None, 3]}
    assert rows(read(tmp_path / "a.jsonl", lines(record, {"image": "b.jpg", "caption": []}))) == [
        (0, 1, "a.jpg", "one"),
        (1, 1, "a.jpg", "two"),
        (2, 1, "a.jpg", "missing caption: 'null'"),
        (3, 1, "a.jpg", "caption is not text: 3"),
        (4, 2, "b.jpg", "no captions in the list 'caption'"),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"image": "a.jpg", "caption": null}', "missing caption: 'null'"),
        ('{"image": "a.jpg", "caption": NaN}', "missing caption: 'nan'"),
        ('{"image": "a.jpg", "caption": "None"}', "missing caption: 'None'"),
        ('{"image": "a.jpg", "caption": 1.0}', "caption is not text: 1.0"),
        ('{"image": "a.jpg", "caption": true}', "caption is not text: True"),
        ('{"image": "a.jpg", "caption": {"en": "x"}}', "caption is not text: dict"),
        ('{"image": null, "caption": "x"}', "path is not text: NoneType"),
        ('{"image": " ", "caption": "x"}', "empty path"),
        ('{"caption": "x", "url": 1}', "no 'path': its keys are caption, url"),
        ('{"image": "a.jpg", "conversations": []}', "no 'caption': its keys are image, conversations"),
        ('{"image": "a.jpg", "caption": "x", "caption": "y"}', "not JSON: an object gives a key twice"),
        ('{"image": "a.jpg", "caption": "x"', "not JSON: Expecting ',' delimiter in column 34"),
        ("[" * 100_000, "not JSON: nested too deep"),
        ('{"a":' * 100_000, "not JSON: nested too deep"),
        ('{"image": "a.jpg", "caption": ' + "[" * 400 + "]" * 400 + "}", "caption is not text: list"),
        ('{"image": "a.jpg", "caption": ' + "9" * 5000 + "}", "not JSON: Exceeds the limit"),
        ('{"image": "a.jpg", "caption": "' + "x" * 1_000_000 + '"}', "line too long: more than 1,000,000 bytes"),
        ("[1]", "not an object: list"),
        ("5", "not an object: 5"),
    ],
)
def test_a_damaged_line_is_a_reject(tmp_path, line, problem):
    first, middle, last = rows(read(tmp_path / "a.jsonl", lines(PAIRS[0]) + line + "\n" + lines(PAIRS[1])))
    assert middle[:2] == (1, 2) and middle[3].startswith(problem)
    assert (first, last) == ((0, 1, "a.jpg", "a dog"), (2, 3, "b.jpg", "a\ncat"))


def test_half_a_surrogate_pair_is_passed_on(tmp_path):
    """clean() mends it in a caption; in a path no file can have it."""
    (item,) = read(tmp_path / "a.jsonl", '{"image": "\\ud83d.jpg", "caption": "half \\ud83d"}')
    assert (item.name, item.caption) == ("\ud83d.jpg", "half \ud83d")
    with pytest.raises(UserError, match="all 1 rows .* most for: missing file"):
        run(BuildConfig(source=tmp_path / "a.jsonl", out=tmp_path / "a.beton", workers=1))
    assert "\\ud83d.jpg,missing file" in (tmp_path / "a.rejects.csv").read_text()


COCO = {
    "info": {},
    "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 5, "file_name": "5.jpg"}, {"id": 6, "file_name": "6.jpg"}],
    "annotations": [
        {"image_id": 5, "id": 1, "caption": "five"},
        {"image_id": 7, "id": 2, "caption": "seven"},
        {"image_id": 5, "id": 3, "caption": "five"},
        {"image_id": 8, "id": 4, "caption": "eight"},
        {"image_id": 5, "id": 5, "caption": None},
        {"image_id": 7, "id": 6},
    ],
}


def test_coco(tmp_path):
    """The captions of an image follow one another, and may be the same, as in a published retrieval set."""
    (tmp_path / "val2017").mkdir()
    items = read(tmp_path / "captions_val2017.json", COCO, images=tmp_path / "val2017")
    assert rows(items) == [
        (0, None, "7.jpg", "seven"),
        (1, None, "5.jpg", "five"),
        (2, None, "5.jpg", "five"),
        (3, None, "5.jpg", "missing caption: 'null'"),
        (4, None, "", "an annotation without its image or caption: KeyError(8)"),
        (5, None, "", "an annotation without its image or caption: KeyError('caption')"),
    ]
    assert items[0].file == str(tmp_path / "val2017/7.jpg")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (COCO | {"images": [{"id": 5}]}, "has an image without an id or a file_name"),
        (COCO | {"images": COCO["images"] * 2}, "gives two images one id"),
        (
            COCO | {"annotations": [{"image_id": 5, "bbox": []}]},
            "is not a list of objects .*, nor COCO's captions_.*json",
        ),
        (
            [{"image": "a.jpg", "conversations": []}],
            "dataset_coco.json; its first object has the keys image, conversations",
        ),
        ({"a": 1}, "is not a list of objects with an image and a caption"),
        ([{"image": "a.jpg", "conversations": []}], "with an image and a caption .see --image-key and --caption-key."),
        (
            b'[{"image": "a.jpg",\n "caption": "x" ',
            "is not JSON .Expecting ',' delimiter in line 2, column 17.: mend it",
        ),
        ("[" * 100_000, "is not JSON .nested too deep."),
        (b'[{"image": "caf\xe9", "caption": "x"}]', "is not JSON .not UTF-8 text .invalid continuation byte, byte 15"),
        (b'[{"image": "a", "image": "b", "caption": "x"}]', "is not JSON .an object gives a key twice"),
        ("", "is not JSON"),
        ([], "holds no rows"),
    ],
)
def test_a_file_that_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.json", content)


def test_a_caption_of_karpathys_that_is_no_text(tmp_path):
    sentences = [{"raw": 5}, {"raw": "five"}]
    content = {"images": [{"split": "test", "filename": "a.jpg", "sentences": sentences}]}
    assert rows(read(tmp_path / "a.json", content)) == [
        (0, None, "a.jpg", "caption is not text: 5"),
        (1, None, "a.jpg", "five"),
    ]


def test_repeated_pairs(tmp_path):
    """A row that has a problem does not make a later one a duplicate."""
    records = [{"image": "a.jpg", "caption": 5}, PAIRS[0], PAIRS[0]]
    assert [row[3] for row in rows(read(tmp_path / "a.jsonl", lines(*records)))] == [
        "caption is not text: 5",
        "a dog",
        "duplicate of row 1",
    ]


CAPTIONS = {f"{i}.jpg": f'caption "{i}", {{[of]}} \U0001f600 é many' for i in range(30)}
RECORDS = [{"image": path, "id": i, "caption": caption} for i, (path, caption) in enumerate(CAPTIONS.items())]


def test_damaged_lines_give_right_pairs_rejects_or_a_refusal(tmp_path):
    refused = rejected = 0
    for damaged in mutations(lines(*RECORDS).encode()):
        try:
            items = read(tmp_path / "a.jsonl", damaged)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        texts = damaged.split(b"\n")
        assert {item.line for item in items} == {i for i, text in enumerate(texts, 1) if text.strip()}
        for item in items:
            rejected += bool(item.problem)
            try:
                record = json.loads(texts[item.line - 1].removeprefix(b"\xef\xbb\xbf"))
            except (ValueError, RecursionError):
                assert item.problem
                continue
            if not item.problem:
                assert (item.name, item.caption) == (
                    record.get("path", record.get("image", record.get("file_name"))),
                    record["caption"],
                )
    assert refused > COUNT / 50 and rejected > COUNT / 10


@pytest.mark.parametrize("kind", ["list", "coco", "karpathy"])
def test_a_damaged_file_gives_right_pairs_rejects_or_a_refusal(tmp_path, kind):
    coco = {
        "images": [{"id": i, "file_name": record["image"]} for i, record in enumerate(RECORDS)],
        "annotations": [{"image_id": i, "caption": record["caption"]} for i, record in enumerate(RECORDS)],
    }
    karpathy = {
        "images": [
            {"split": "test", "filename": record["image"], "sentences": [{"raw": record["caption"]}]}
            for record in RECORDS
        ]
    }
    content = {"list": RECORDS, "coco": coco, "karpathy": karpathy}[kind]
    whole = json.dumps(content, indent=1).encode()
    read_whole = 0
    for damaged in mutations(whole):
        try:
            items = read(tmp_path / "a.json", damaged)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        read_whole += 1
        found = json.loads(damaged)
        if kind == "list":
            wanted = [(entry["image"], entry["caption"]) for entry in found if {"image", "caption"} <= entry.keys()]
        elif kind == "coco":
            names = {image["id"]: image["file_name"] for image in found["images"]}
            wanted = [(names.get(entry.get("image_id")), entry.get("caption")) for entry in found["annotations"]]
        else:
            wanted = [
                (entry["filename"], sentence["raw"]) for entry in found["images"] for sentence in entry["sentences"]
            ]
        assert {(item.name, item.caption) for item in items if not item.problem} <= set(wanted)
    assert read_whole > COUNT / 50
