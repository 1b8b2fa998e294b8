"""What img2dataset and webdataset themselves write; `make writers` installs them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from layouts import read, save, tar_bytes, write

from fastbd.base.errors import UserError

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-writers/bin/python"
pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason="needs img2dataset and webdataset: make writers"),
    pytest.mark.full,
]

TARS = {  # names of members; the samples as webdataset reads them; the pairs that are read
    "fields": (
        ["0.jpg", "0.seg.png", "0.txt", "1.jpg", "1.txt"],
        [["0.jpg", "0.seg.png", "0.txt"], ["1.jpg", "1.txt"]],
        [("0.jpg", "0.txt"), ("1.jpg", "1.txt")],
    ),
    "folders": (
        ["a.b/0.jpg", "a.b/0.txt", "c/0.jpg", "c/0.txt"],
        [["a.b/0.jpg", "a.b/0.txt"], ["c/0.jpg", "c/0.txt"]],
        [("a.b/0.jpg", "a.b/0.txt"), ("c/0.jpg", "c/0.txt")],
    ),
    "dots": (
        ["a.1.jpg", "a.1.txt", "a.2.jpg", "a.2.txt"],
        [["a.1.jpg", "a.1.txt", "a.2.jpg", "a.2.txt"]],
        [("a.1.jpg", "a.1.txt"), ("a.2.jpg", "a.2.txt")],
    ),
    "apart": (
        ["0.jpg", "1.jpg", "0.txt", "1.txt"],
        [["0.jpg"], ["1.jpg"], ["0.txt"], ["1.txt"]],
        [("0.jpg", "0.txt"), ("1.jpg", "1.txt")],
    ),
    "again": (
        ["0.jpg", "0.txt", "1.jpg", "1.txt", "0.jpg", "0.txt"],
        [["0.jpg", "0.txt"], ["1.jpg", "1.txt"], ["0.jpg", "0.txt"]],
        [("0.jpg", "0.txt"), ("1.jpg", "1.txt")],
    ),  # the third repeats the first
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    for i in range(5):
        save(folder / f"images/{i}.png", (50 * i, 0, 0))
    tars = {name: tar_bytes([(member, member.encode()) for member in case[0]]) for name, case in TARS.items()}
    write(folder / "tars", {f"{name}.tar": data for name, data in tars.items()})
    script = Path(__file__).with_name("write_with_writers.py")
    env = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}  # it would ask a server for its newest version
    done = subprocess.run([PYTHON, script, folder], capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def pairs(items) -> list[tuple]:
    """(key, caption) of the items, or (key, problem), sorted: img2dataset writes in the order of arrival."""
    return sorted((Path(item.name).name.split(".")[0], item.problem or item.caption) for item in items)


@pytest.mark.parametrize("output_format", ["files", "webdataset"])
def test_img2dataset(written, output_format):
    wanted = ["number 0", "", "number 2", "number 3", "number 4"]  # the second has no caption: build says so
    items = read(written / output_format)
    assert [caption for _, caption in pairs(items)] == wanted
    assert [key for key, _ in pairs(items)] == ["000000", "000001", "000002", "000003", "000010"]
    blip = pairs(read(written / output_format, caption_key="blip_caption"))
    assert [caption for _, caption in blip] == [f"blip {i}" for i in range(5)]
    assert {problem for _, problem in pairs(read(written / output_format, caption_key="x"))} == {"no 'x' in the .json"}


def test_shard_writer(written):
    assert pairs(read(written / "writer")) == [(str(i), f"number {i}") for i in range(5)]
    assert pairs(read(written / "writer/{00000..00001}.tar")) == [(str(i), f"number {i}") for i in range(5)]
    blip = pairs(read(written / "writer", caption_key="blip_caption"))
    assert [caption for _, caption in blip] == [f"blip {i}" for i in range(5)]


def test_tar_writer(written):
    items = read(written / "writer.tar", image_key="png")
    assert [item.caption for item in items if not item.problem] == [f"number {i}" for i in range(5)]
    assert {Path(item.name).name for item in items if not item.problem} == {f"{i}.png" for i in range(5)}
    assert [item.class_name for item in read(written / "classes.tar")] == list("01234")
    with pytest.raises(UserError, match=r"packed.tar.gz is compressed \(gzip\)"):
        read(written / "packed.tar.gz")


@pytest.mark.parametrize("case", TARS)
def test_samples_are_those_of_webdataset(written, case):
    """But keys may hold dots, and the members of a sample may lie apart."""
    _, samples, found = TARS[case]
    assert json.loads((written / "read.json").read_text())[case] == samples
    items = [item for item in read(written / f"tars/{case}.tar") if not item.problem]
    assert [(item.name.removeprefix(f"{case}.tar/"), item.caption) for item in items] == found


def test_img2dataset_parquet(written):
    pytest.importorskip("pyarrow")
    found = pairs(read(written / "parquet"))
    good = sorted(caption for _, caption in found if caption.startswith("number"))
    assert good == ["number 0", "number 2", "number 3", "number 4"] and len(found) == 6
