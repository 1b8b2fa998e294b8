from __future__ import annotations

import csv
import io
import random
import re
from contextlib import suppress
from pathlib import Path

import pytest
from data.sources.mutations import COUNT, mutations
from PIL import Image

from fastbd.base.errors import UserError
from fastbd.commands.build import run
from fastbd.config.flags import BuildConfig
from fastbd.data.beton import Beton
from fastbd.data.sources import read_items
from fastbd.data.sources.item import CAPTION_LIMIT
from fastbd.data.sources.table import SEPARATORS

CAPTIONS = (
    "a dog",
    'a 5" disc',
    '"a" dog',
    'a "dog"',
    '"a dog"',
    "a dog, sitting",
    "a dog;x|y",
    "two\nlines",
    "two\r\nlines",
    '"',
    '""',
    "a,\nb",
    'a "b",\nc',
    "ünïcode \u2028 dog",
    " spaces ",
    "a\x0bb",
    "'single'",
    "back\\slash",
)


def read(path: Path, content: str | bytes, **options) -> list:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_items(BuildConfig(source=path, out=path.with_suffix(".beton"), **options))


def pairs(items: list) -> list[tuple[str, str]]:
    return [(item.name, item.caption) for item in items if not item.problem]


def problems(items: list) -> list[tuple[int, str]]:
    return [(item.line, item.problem) for item in items if item.problem]


def written(rows: list[tuple], **dialect) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, **dialect).writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("separator", ",;|")
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_what_csv_writer_wrote_is_read_as_it_was(tmp_path, quoting, separator, ends):
    rows = [(f"{i}.jpg", caption) for i, caption in enumerate(CAPTIONS)]
    content = written([("path", "caption"), *rows], quoting=quoting, delimiter=separator, lineterminator=ends)
    items = read(tmp_path / "a.csv", content)
    assert pairs(items) == rows and [item.row_id for item in items] == list(range(len(rows)))
    lines = content.split("\n")
    assert all(item.name in lines[item.line - 1] for item in items)
    assert pairs(read(tmp_path / "a.csv", "\ufeff" + content)) == rows


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_csv_writer_wrote_with_tabs_is_read_as_it_was_or_rejected(tmp_path, quoting):
    rows = [(f"{i}.jpg", caption) for i, caption in enumerate((*CAPTIONS, "a\ttab"))]
    content = written([("path", "caption"), *rows], quoting=quoting, delimiter="\t", lineterminator="\n")
    items = read(tmp_path / "a.tsv", content)
    spread = {("\n" in caption or "\t" in caption) for _, caption in rows}
    assert spread == {True, False}
    if quoting == csv.QUOTE_ALL:
        assert pairs(items) == rows
    else:
        assert pairs(items) == [row for row in rows if not re.search("[\n\t\r]", row[1])]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ('a.jpg,a 5" disc', 'a 5" disc'),
        ('a.jpg,a "dog"', 'a "dog"'),
        ('a.jpg,"a ""big"" dog"', 'a "big" dog'),
        ('a.jpg,"a dog, sitting"', "a dog, sitting"),
        ("a.jpg,a dog\\, sitting", ["wrong number of fields: 3, and 2 in the header"]),
        ('a.jpg,a \\"dog\\"', ["a backslash before a quote or the end of the line"]),
        ("a.jpg,a dog\\", ["a backslash before a quote or the end of the line"]),
        ('a.jpg,"a dog\\"', "a dog\\"),
        ("a.jpg,a \\ dog", "a \\ dog"),
        ("a.jpg,a dog, sitting on mat", ["wrong number of fields: 3, and 2 in the header"]),
        ("a.jpg", ["wrong number of fields: 1, and 2 in the header"]),
        ("a.jpg,", ""),
        ('a.jpg,"a" dog', ["text after a closing quote"]),
        ('a.jpg,"a dog" ', ["text after a closing quote"]),
        ('a.jpg, "a dog"', ["a space before a quote"]),
        ("a.jpg,a\rdog", ["a carriage return within the line"]),
        ('a.jpg,a\r"dog"', ["a carriage return within the line"]),
        ("a.jpg,nan", ["missing caption: 'nan'"]),
        ("a.jpg, NULL ", ["missing caption: 'NULL'"]),
        ("a.jpg,nan bread", "nan bread"),
        ("a.jpg," + "x" * 2_000_000, ["line too long: more than 1,000,000 bytes"]),
        ("a.jpg," + "x" * 20_000, "x" * CAPTION_LIMIT),
    ],
)
def test_a_row_is_read_as_it_was_meant_or_rejected(tmp_path, row, wanted):
    items = read(tmp_path / "a.csv", f"path,caption\nfirst.jpg,before\n{row}\n\nlast.jpg,after\n")
    middle = (3, wanted[0]) if isinstance(wanted, list) else ("a.jpg", wanted)
    found = problems(items)[0] if isinstance(wanted, list) else pairs(items)[1]
    assert found == middle
    assert pairs(items)[0] == ("first.jpg", "before") and pairs(items)[-1] == ("last.jpg", "after")
    assert items[-1].line == 5 and items[-1].row_id == 2


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ('a.jpg\ta 5" disc', 'a 5" disc'),
        ('a.jpg\t"a" dog', '"a" dog'),
        ('a.jpg\t" the president , " says person', '" the president , " says person'),
        ('a.jpg\t"a dog"', '"a dog"'),
        ('a.jpg\t"a ""big"" dog"', 'a "big" dog'),
        ('a.jpg\t"a dog', ["a quote that is not closed"]),
        ('a.jpg\ta "dog\tx"', ["wrong number of fields: 3, and 2 in the header"]),
        ("a.jpg\ta dog\\", ["a backslash before a quote or the end of the line"]),
        ("a.jpg\ta dog, b; c | d", "a dog, b; c | d"),
        ('a.jpg\ta\r"dog"', ["a carriage return within the line"]),
    ],
)
@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.txt"])
def test_a_quote_in_a_tab_separated_file(tmp_path, row, wanted, name):
    items = read(tmp_path / name, f"path\tcaption\n{row}\nlast.jpg\tafter\n")
    if isinstance(wanted, list):
        assert problems(items) == [(2, wanted[0])]
    else:
        assert pairs(items)[0] == ("a.jpg", wanted)
    assert pairs(items)[-1] == ("last.jpg", "after")


HEAD = "path,caption\n1.jpg,one\n2.jpg,two\n3.jpg,three\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEAD + '4.jpg,"a dog\n6.jpg,a cat\n', "the quote that opens in line 5 of .*a.csv is not closed: close it"),
        (HEAD + '4.jpg,"a dog' + "\n6.jpg,a cat" * 200_000, "opens in line 5 of .* is not closed"),
        (HEAD + '4.jpg,"a dog\n6.jpg,a cat\n7.jpg,"b', "line 5 of .* closes in line 7, and leaves text after"),
        (HEAD + '4.jpg,"a dog\n6.jpg,5" disc', "line 5 of .* closes in line 6, and leaves text after"),
        (HEAD + '4.jpg,"a dog\n6.jpg,"\n', "closes in line 6, and leaves a caption that looks like rows: .*6.jpg"),
        (HEAD + '4.jpg,"a dog\n6.jpg,a 5"\n', "closes in line 6, and leaves a caption that looks like rows: .*6.jpg"),
        (HEAD + '4.jpg,"a dog\n6.png,a 5"\n', "looks like rows: it holds the file 6.png"),
        (HEAD + '"4.jpg,a dog\n6.jpg",a cat\n', "looks like rows"),
        (HEAD + '4.jpg,"a dog\nx",y\n', "closes in line 6, and leaves a row of 3 fields, and 2 are in the header"),
        ('path,caption\na/1,"a dog\na/2,a 5"\n', "line 2 of .* closes in line 3, and leaves a caption that looks like"),
        ('caption,path\n"a dog,1.jpg\na cat",2.jpg\n', "looks like rows: it holds the file 1.jpg"),
        (HEAD.encode() + b"4.jpg,caf\xe9\n", "is not UTF-8 text .line 5: .*byte 0xe9.: save it as UTF-8"),
        ("path,caption\ra.jpg,x\r", "first line of .* does not end: save it with line ends of Unix or Windows"),
        ("path,caption,path\na.jpg,x,y\n", "has two columns 'path': rename one"),
        ("path,caption, caption\na.jpg,x,y\n", "has two columns 'caption'"),
        (
            "a bus station\thttp://x.org/1.jpg\n",
            "no column 'path'; its columns are: a bus station, http.*: name one of "
            "them with --image-key, or add a first line with names if it has none",
        ),
        ("", "its columns are: none"),
        ('path,"caption\na.jpg,x\n', "no column 'path'; its columns are: path,\"caption: name"),
        ("path,caption,x;path;caption\n", "with several separators: give --separator"),
        ("x" * 2_000_000, "first line of .* does not end"),
    ],
)
def test_a_file_whose_rows_are_in_doubt_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.csv", content)


@pytest.mark.parametrize("separator", ["\t", ";", "|", ","])
def test_the_separator_is_that_of_the_columns(tmp_path, separator):
    """As pandas writes an index without a name, and with separators of other kinds in captions and other columns."""
    header = separator.join(("", "image", "title, x; y" if separator == "\t" else "title", "caption"))
    row = separator.join(("0", "a.jpg", "t", "a dog"))
    assert pairs(read(tmp_path / "a.csv", f"{header}\n{row}\n")) == [("a.jpg", "a dog")]


def test_a_separator_that_is_given(tmp_path):
    content = "path,caption,x;path;caption\na,b,x;c.jpg;d\n"
    assert pairs(read(tmp_path / "a.csv", content, separator=";")) == [("c.jpg", "d")]
    assert pairs(read(tmp_path / "a.csv", "path~caption\nc.jpg~d\n", separator="~")) == [("c.jpg", "d")]
    assert pairs(read(tmp_path / "a.csv", "path\tcaption\nc.jpg\td\n", separator="tab")) == [("c.jpg", "d")]
    with pytest.raises(UserError, match="--separator ab is not one character, nor the word tab"):
        read(tmp_path / "a.csv", content, separator="ab")
    with pytest.raises(UserError, match="no column 'path'; its columns are: path,caption,x;path;caption: name one"):
        read(tmp_path / "a.csv", content, separator="|")


def test_names_of_columns(tmp_path):
    assert pairs(read(tmp_path / "a.csv", "file_name,caption\na.jpg,x\n")) == [("a.jpg", "x")]
    assert pairs(read(tmp_path / "a.csv", "image,path,caption\nb.jpg,a.jpg,x\n")) == [("a.jpg", "x")]
    assert pairs(read(tmp_path / "a.csv", "image,title\na.jpg,x\n", caption_key="title")) == [("a.jpg", "x")]
    with pytest.raises(UserError, match="no column 'title'"):
        read(tmp_path / "a.csv", "path,class\na.jpg,x\n", class_key="class", caption_key="title")


def test_a_missing_caption_of_a_labelled_image_is_empty(tmp_path):
    items = read(tmp_path / "a.csv", "path,class,caption\na.jpg,dog,nan\nb.jpg,dog,a dog\n", class_key="class")
    assert [(item.caption, item.class_name) for item in items] == [("", "dog"), ("a dog", "dog")]
    assert not problems(items)


def test_a_rejected_row_does_not_make_another_a_duplicate(tmp_path):
    items = read(tmp_path / "a.csv", 'path,caption\na.jpg,"" x\na.jpg,x\na.jpg,x\n')
    assert problems(items) == [(2, "text after a closing quote"), (4, "duplicate of row 1")]


def test_the_list_and_the_summary_of_rejects(tmp_path, capsys):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.jpg")
    content = 'path,caption\na.jpg,"two\nlines"\nx,a,b\na.jpg,nan\nx\na.jpg,None\na.jpg,"x" y\n'
    (tmp_path / "a.csv").write_text(content)
    assert run(BuildConfig(source=tmp_path / "a.csv", out=tmp_path / "a.beton", workers=1)) == 0
    assert Beton(tmp_path / "a.beton").caption(0) == "two lines"
    assert (tmp_path / "a.rejects.csv").read_text().splitlines() == [
        "row_id,line,path,reason",
        '1,4,x,"wrong number of fields: 3, and 2 in the header"',
        "2,5,a.jpg,missing caption: 'nan'",
        '3,6,x,"wrong number of fields: 1, and 2 in the header"',
        "4,7,a.jpg,missing caption: 'None'",
        "5,8,,text after a closing quote",
    ]
    said = capsys.readouterr().out
    assert [line.split(None, 2)[1:] for line in said.splitlines() if line.startswith("rejected")] == [
        ["2", "wrong number of fields"],
        ["2", "missing caption"],
        ["1", "text after a closing quote"],
    ]


def test_images_in_another_folder(tmp_path):
    (tmp_path / "Images").mkdir()
    (item,) = read(tmp_path / "captions.txt", b"image,caption\n1.jpg,A dog\n", images=tmp_path / "Images")
    assert (item.name, item.file) == ("1.jpg", str(tmp_path / "Images/1.jpg"))


def original(separator: str) -> tuple[bytes, dict[str, str]]:
    """A table of 40 rows with captions that need quotes, and caption by path."""
    rng = random.Random(0)
    plain = [caption for caption in CAPTIONS if separator == "," or not re.search("[\r\n]", caption)]
    rows = {f"{i}.jpg": f"{rng.choice(plain)} number {i}" for i in range(40)}
    return written([("path", "caption"), *rows.items()], delimiter=separator, lineterminator="\n").encode(), rows


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_damaged_table_gives_right_pairs_rejects_or_a_refusal(tmp_path, separator):
    whole, rows = original(separator)
    good = set(pairs(read(tmp_path / "a.csv", whole)))
    assert good == set(rows.items())
    refused = changed = 0
    for damaged in mutations(whole, COUNT):
        try:
            items = read(tmp_path / "a.csv", damaged)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        lines = damaged.decode("utf-8-sig").split("\n")
        # A damaged header may have another separator, or columns in another place.
        named = {other: [name.strip() for name in next(csv.reader(lines[:1], delimiter=other))] for other in SEPARATORS}
        found = next(other for other, names in named.items() if {"path", "caption"} <= {*names})
        path_at, caption_at = map(named[found].index, ("path", "caption"))
        for item in items:
            if item.problem or (item.name, item.caption) in good:
                continue
            # The damage is in this row: it is read as csv.reader does it, or by letters where that cannot.
            changed += 1
            text = "\n".join(lines[item.line - 1 :])
            readings = [lines[item.line - 1].rstrip("\r").split(found)]
            with suppress(csv.Error):
                readings += [next(csv.reader(io.StringIO(text, newline=""), delimiter=found, strict=True))]
            assert [item.name, item.caption] in [[cells[path_at].strip(), cells[caption_at]] for cells in readings]
            assert item.caption.count(".jpg" + found) == 0, "rows within a caption"
        # No row is lost without a word: each that is still a line of its own is kept or rejected.
        kept, known = set(pairs(items)), {item.line for item in items}
        for number, line in enumerate(lines[1:], 2):
            path, _, caption = line.partition(separator)
            if rows.get(path) == caption and '"' not in caption:
                assert number in known
                assert (path, caption) in kept or named[separator] != ["path", "caption"]
    assert refused > COUNT / 20 and changed > COUNT / 20


def test_a_class_that_an_export_left_out_is_a_reject(tmp_path):
    rows = "path,class\na.jpg,dog\nb.jpg,nan\nc.jpg,-1\nd.jpg,\ne.jpg,none\n"
    items = read(tmp_path / "a.csv", rows, class_key="class")
    assert [item.problem for item in items] == [
        None,
        "missing class: 'nan'",
        "missing class: '-1'",
        "empty class",
        None,
    ]
