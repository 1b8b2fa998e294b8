"""The class names and templates must be CLIP's: zero-shot numbers are comparable only with the published lists."""

from __future__ import annotations

from collections import Counter

import pytest

from fastbd.base.prompts import SHIPPED, read_classes, read_templates, set_of

# Classes and templates of each set: CLIP (arXiv 2103.00020) table 9 and openai/CLIP data/prompts.md.
SETS = {
    "imagenet1k": (1000, 0), "imagenet_a": (200, 0), "imagenet_r": (200, 0), "objectnet": (113, 0), "cifar10": (10, 18),
    "cifar100": (100, 18), "caltech101": (102, 34), "food101": (101, 1), "pets": (37, 1), "flowers102": (102, 1),
    "dtd": (47, 8), "aircraft": (100, 2), "cars": (196, 8), "stl10": (10, 2), "svhn": (10, 6), "gtsrb": (43, 3),
    "sst2": (2, 1), "sun397": (397, 2), "eurosat": (10, 3), "resisc45": (45, 18), "country211": (211, 5),
    "fer2013": (7, 6), "pcam": (2, 1), "mnist": (10, 1), "hateful_memes": (2, 1),
}  # fmt: skip
FILES = sorted(path.stem for path in SHIPPED.glob("*.txt"))


def test_every_list_is_a_set_or_templates():
    assert sorted([*SETS, "demo", "imagenet80"]) == FILES


@pytest.mark.parametrize("name", FILES)
def test_source_named_and_no_stray_space(name):
    lines = (SHIPPED / f"{name}.txt").read_text(encoding="ascii").splitlines()
    comments = [line for line in lines if line.startswith("#")]
    assert lines[: len(comments)] == comments and (
        name == "demo" or "openai/CLIP" in "".join(comments) or name in ("svhn", "objectnet")
    )
    assert all(line and line == " ".join(line.split()) for line in lines)


@pytest.mark.parametrize("name", SETS)
def test_sizes(name):
    classes = read_classes(name)
    assert (len(classes), len(classes.templates)) == SETS[name]
    assert len(set(classes.codes)) == len(classes) == len(set(classes)) + 2 * (name == "imagenet1k")
    assert len(set(classes.templates)) == len(classes.templates)
    assert all(form.count("{}") == form.count("{") == form.count("}") == 1 for form in classes.templates)


@pytest.mark.parametrize("name", sorted(SETS.keys() - {"svhn", "mnist", "pcam", "hateful_memes"}))
def test_a_set_is_known_by_its_codes(name):
    assert set_of(read_classes(name).codes[::-1]) == name


def test_digits_could_be_several_sets_and_a_part_is_none():
    assert set_of(read_classes("mnist")) is set_of(["0", "1"]) is set_of(read_classes("cifar100")[1:]) is None
    assert set_of(read_classes("cifar100")) == "cifar100" and set_of(["forest", "n02119022"]) is None


def test_imagenet_classes():
    names = read_classes("imagenet1k")
    assert {name for name, times in Counter(names).items() if times > 1} == {"missile", "sunglasses"}
    assert [i for i, name in enumerate(names) if "banana" in name.lower()] == [954]
    known = {0: "tench", 134: "crane bird", 207: "Golden Retriever", 337: "beaver", 517: "construction crane"}
    known |= {657: "missile", 744: "missile", 836: "sunglasses", 837: "sunglasses", 999: "toilet paper"}
    assert {i: names[i] for i in known} == known
    assert names.codes == sorted(names.codes)
    assert [names.codes[i] for i in (0, 207, 954, 999)] == ["n01440764", "n02099601", "n07753592", "n15075141"]


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_parts_of_imagenet_are_named_alike(name):
    whole, part = read_classes("imagenet1k"), read_classes(name)
    assert part.codes == sorted(part.codes) and "banana" in part
    assert list(part) == [whole[whole.codes.index(code)] for code in part.codes]


def test_names_by_code():
    known = {
        ("caltech101", "BACKGROUND_Google"): "background",
        ("caltech101", "Faces_easy"): "centered face",
        ("caltech101", "yin_yang"): "yin and yang symbol",
        ("cars", "Ram C-V Cargo Van Minivan 2012"): "Ram C/V Cargo Van Minivan 2012",
        ("cifar100", "sweet_pepper"): "sweet pepper",
        ("country211", "CH"): "Switzerland",
        ("country211", "XK"): "Kosovo",
        ("eurosat", "SeaLake"): "lake or sea",
        ("fer2013", "disgust"): "disgusted",
        ("flowers102", "1"): "pink primrose",
        ("flowers102", "102"): "blackberry lily",
        ("food101", "creme_brulee"): "creme brulee",
        ("gtsrb", "00014"): "stop",
        ("objectnet", "t-shirt"): "t-shirt",
        ("objectnet", "full_sized_towel"): "bath towel",
        ("pcam", "0"): "lymph node",
        ("pets", "american_bulldog"): "american bulldog",
        ("pets", "Abyssinian"): "Abyssinian",
        ("resisc45", "sea_ice"): "sea ice",
        ("sst2", "positive"): "positive",
        ("sun397", "/c/church/indoor"): "church indoor",
        ("svhn", "7"): "seven",
    }
    assert {(name, code): (c := read_classes(name))[c.codes.index(code)] for name, code in known} == known


def test_imagenet_templates():
    templates = read_templates("imagenet80")
    assert len(templates) == len(set(templates)) == 80
    assert all(template.count("{}") == 1 and template.count("{") == 1 for template in templates)
    assert templates[0] == "a bad photo of a {}." and templates[-1] == "a tattoo of the {}."
    assert templates[35] == "a {} in a video game."
