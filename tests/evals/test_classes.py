"""The class names and templates must be CLIP's: zero-shot numbers are comparable only with the published lists."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import fastbd

FOLDER = Path(fastbd.__file__).parent / "evals" / "classes"


def entries(name: str) -> list[str]:
    text = (FOLDER / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("name", ["imagenet1k.txt", "imagenet80.txt"])
def test_source_named_and_no_stray_space(name):
    assert "openai/CLIP" in (FOLDER / name).read_text(encoding="utf-8").splitlines()[1]
    assert all(entry and entry == entry.strip() and entry.isascii() for entry in entries(name))


def test_imagenet_classes():
    names = entries("imagenet1k.txt")
    assert len(names) == 1000
    assert {name for name, times in Counter(names).items() if times > 1} == {"missile", "sunglasses"}
    assert [i for i, name in enumerate(names) if "banana" in name.lower()] == [954]
    known = {0: "tench", 134: "crane bird", 207: "Golden Retriever", 337: "beaver", 517: "construction crane"}
    known |= {657: "missile", 744: "missile", 836: "sunglasses", 837: "sunglasses", 999: "toilet paper"}
    assert {i: names[i] for i in known} == known


def test_imagenet_templates():
    templates = entries("imagenet80.txt")
    assert len(templates) == len(set(templates)) == 80
    assert all(template.count("{}") == 1 and template.count("{") == 1 for template in templates)
    assert templates[0] == "a bad photo of a {}." and templates[-1] == "a tattoo of the {}."
    assert templates[35] == "a {} in a video game."
