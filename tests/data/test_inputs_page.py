"""Builds every example of docs/inputs.md: what the page says is what build does."""

from __future__ import annotations

import io
import json
import re
import shlex
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbd.cli import main
from fastbd.data.beton import Beton
from fastbd.data.decode import read
from fastbd.data.sources import FLAGS, LAYOUTS

PAGE = (Path(__file__).parents[2] / "docs" / "inputs.md").read_text()
EXAMPLE = re.compile(r"```files\n(.*?)```\n+```sh\n(.*?)```\n+```rows\n(.*?)```", re.DOTALL)
IMAGE = re.compile(r".*\.(jpe?g|png|gif|bmp|tiff?|webp)", re.IGNORECASE)


def examples() -> list:
    """(files, command, rows) of each example, under the title of its section."""
    sections = (section.split("\n", 1) for section in PAGE.split("\n## ")[1:])
    return [pytest.param(*found, id=title) for title, text in sections for found in EXAMPLE.findall(text)]


def files_in(text: str) -> dict[str, bytes]:
    """The content of each file by its path: an image of a colour of its own, or the indented lines below the path."""
    lines, path = {}, ""
    for line in text.splitlines():
        if line.startswith("  "):
            lines[path].append(line[2:])
        else:
            path = line
            lines[path] = []
    return {path: image(path) if IMAGE.fullmatch(path) else "\n".join(text).encode() for path, text in lines.items()}


def colour(path: str) -> tuple[int, ...]:
    return tuple(zlib.crc32(path.encode()).to_bytes(4, "big")[:3])


def image(path: str) -> bytes:
    file = io.BytesIO()
    kind = path.rsplit(".", 1)[1].lower().replace("jpg", "jpeg").replace("tif", "tiff").replace("tifff", "tiff")
    Image.new("RGB", (32, 32), colour(path)).save(file, kind)
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Put the files into the folder; those whose path goes through a .tar or a .parquet, into that."""
    for path, content in files.items():
        place = folder / path
        if tar := next((parent for parent in place.parents if parent.suffix == ".tar"), None):
            tar.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(tar, "a") as archive:
                member = tarfile.TarInfo(str(place.relative_to(tar)))
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        elif place.suffix == ".parquet":
            write_parquet(place, content)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)


def write_parquet(place: Path, content: bytes) -> None:
    """A table of the JSON objects in the lines of `content`; what names an image, as the image's bytes."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [json.loads(line) for line in content.splitlines()]
    rows = [{k: image(v) if IMAGE.fullmatch(v) else v for k, v in row.items()} for row in rows]
    place.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), place)


@pytest.mark.parametrize(("files", "command", "rows"), examples())
def test_an_example_comes_out_as_the_page_says(tmp_path, monkeypatch, files, command, rows):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, files_in(files))
    python, _, program, *words = shlex.split(command)
    assert (python, program) == ("python", "fastbd") and main([*words, "--workers", "1"]) == 0
    beton = Beton(words[words.index("--out") + 1])
    wanted = [[cell.strip() for cell in row.split("|")] for row in rows.splitlines()]
    assert len(beton) == len(wanted)
    for k, (path, caption, *class_name) in enumerate(wanted):
        found = read(np.asarray(beton.jpeg(k))).reshape(-1, 3).mean(0)
        assert np.abs(found - colour(path)).max() < 4, path
        assert beton.caption(k) == caption
        assert not class_name or beton.class_names[beton.labels[k]] == class_name[0]


def test_the_table_holds_every_layout_and_its_flags():
    rows = re.findall(r"^\| (.*?) \| (`.*`) \|$", PAGE, re.MULTILINE)
    flags = {name: {flag.strip("-").replace("-", "_") for flag in text.strip(" `").split()} for name, text in rows}
    assert flags == {layout.name: layout.flags for layout in LAYOUTS} and set().union(*flags.values()) == set(FLAGS)
