"""docs/export.md: its commands, and its Python in the programs that it is for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from exported import made
from PIL import Image

import fastbd
from fastbd import cli
from fastbd.models.targets import OPENAI

PAGE = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
COMMANDS = re.findall(r"^    python -m fastbd (export .*)$", PAGE, re.MULTILINE)
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def folder(study, tmp_path_factory):
    """A folder in which the page's commands have run; CleanCLIP's form has no model so small."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(study)
        run, _ = made(study, "small_models:openai_vit")
        shutil.copytree(run, folder / "runs/mmcl")
        patch.chdir(folder)
        Image.new("RGB", (60, 40), "yellow").save("photo.jpg")
        for command in COMMANDS:
            assert cli.main(command.split()) == (2 if "cleanclip" in command else 0)
    return folder


def test_the_commands_write_what_the_page_says(folder):
    assert len(COMMANDS) == 4
    assert {path.name for path in (folder / "exported").iterdir()} == {
        "mmcl.safetensors",
        "mmcl.json",
        "mmcl.safetensors.md",
        "mmcl.pt.md",
        "mmcl.pt",
        "mmcl",
    }
    there = {path.name for path in (folder / "exported/mmcl").iterdir()}
    listed = set(re.findall(r"`([\w.]+\.(?:json|txt|safetensors))`", PAGE.partition("## transformers")[2]))
    assert there == {name for name in listed if not name.startswith("mmcl")} | {"README.md", "LICENSE-tokenizer"}
    assert "Copyright (c) 2021 OpenAI" in (folder / "exported/mmcl/LICENSE-tokenizer").read_text()


@pytest.mark.parametrize("package", ["open_clip", "clip", "transformers"])
def test_the_python_of_the_page(package, folder, monkeypatch):
    pytest.importorskip(package)
    (code,) = [block for block in BLOCKS if re.search(rf"^(import|from) {package}\b", block, re.MULTILINE)]
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(compile(code, f"docs/export.md, {package}", "exec"), names)
    loaded = fastbd.load("runs/mmcl", device="cpu")
    with torch.no_grad():
        images = loaded.model.encode_image(loaded.transform(Image.open("photo.jpg"))[None])
        texts = loaded.model.encode_text(loaded.tokenizer(["a photo of a banana", "a photo of a cat"]))
    for kind, ours in (("image", images), ("text", texts)):
        similarity = torch.cosine_similarity(names[f"{kind}_features"], ours)
        torch.testing.assert_close(similarity, torch.ones(len(ours)), rtol=0, atol=1e-6)


def test_names_of_the_page_are_there():
    root = Path(__file__).parents[1]
    assert all((root / path).is_file() for path in re.findall(r"findings/\w+\.sh", PAGE))
    assert "RN50" in OPENAI.values() and "`RN50-quickgelu`" in PAGE
