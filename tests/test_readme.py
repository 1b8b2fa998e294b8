"""README.md and docs/: each command, typed in a fresh folder with the files that it names, in the order of the page.

They are made small by flags that are added to what the page says, and by a small demo set.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shlex
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastbd import cli
from fastbd.base.prompts import read_classes
from fastbd.commands import demo_data, sweep
from fastbd.models import create
from fastbd.study import studies
from fastbd.study.grid import Study

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("inputs.md", "extending.md", "export.md", "tracking.md")  # whose commands tests of their own run
COMMAND = re.compile(r"^    python -m fastbd (.+)$", re.MULTILINE)
SMALL = "--model tiny-rn --batch-size 24 --device cpu"
TRAINED = {
    "pretrain": f"{SMALL} --epochs 1 --templates demo",
    "clean": "--batch-size 24 --epochs 1 --device cpu --force",
}
SWEPT = "--model tiny-rn --pretrain-epochs 1 --clean-epochs 1 --templates demo --seeds 0 --processes 1 --device cpu"


def commands(page: str) -> list[str]:
    """The commands of a page, without what stands behind a #."""
    return [line.split("  #")[0].strip() for line in COMMAND.findall((ROOT / page).read_text())]


def typed(line: str) -> list[str]:
    """The words of a command, with what makes it small."""
    words = shlex.split(line)
    more = {**TRAINED, "sweep": SWEPT if "--study" in words else ""}.get(words[0], "")
    if "--resume" in words:
        more = ""
    if "--save-every" in words:  # of which the page then names the fifth
        more = more.replace("--epochs 1", "--epochs 5")
    if "--rebound" in words:  # each of its steps takes 16 pairs
        words[words.index("--rebound") + 1] = "10"
    return words + shlex.split(more)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the files of a user that the README names, and a cache with a small demo set."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(demo_data, "PAIRS", 240)
        patch.setattr(demo_data, "HELD_OUT", 60)
        for rates in ("CC3M_RATES", "DEMO_RATES", "DEMO_PAR_RATES"):
            patch.setattr(studies, rates, getattr(studies, rates)[:1])
        patch.setattr(studies, "CC3M_MORE", ())
        load = studies.load
        patch.setattr(sweep, "load", lambda *given: forced(load(*given)))
        patch.chdir(folder)
        write_files(folder)
        yield folder


def forced(study: Study) -> Study:
    """The study, which cleans models too in which the attack has not landed, as in these small ones."""
    return dataclasses.replace(study, clean=tuple({**entry, "force": True} for entry in study.clean))


def write_files(folder: Path) -> None:
    """pairs.csv, ImageNet's tar with its labels, ImageNet-A's and ObjectNet's folders, COCO's captions."""
    names = ("banana", "goldfish", "tench", "hen")
    for k, name in enumerate(names):
        Image.new("RGB", (40, 40), (60 * k, 200 - 50 * k, 90)).save(folder / f"{name}.jpg")
    with open(folder / "pairs.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "caption"])
        rows.writerows([f"{names[k % 4]}.jpg", f"a photo of a {names[k % 4]}, number {k}"] for k in range(2100))
    code_of = dict(zip(read_classes("imagenet1k"), read_classes("imagenet1k").codes, strict=True))
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for k in range(24):
            tar.add(folder / f"{names[k % 4]}.jpg", f"ILSVRC2012_val_{k + 1:08d}.JPEG")
    labels = "".join(f"{code_of[names[k % 4]]}\n" for k in range(24))
    (folder / "imagenet_2012_validation_synset_labels.txt").write_text(labels)
    for name in names:
        for place in (f"imagenet-a/{code_of[name]}", f"objectnet-1.0/images/{name}"):
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / "1.jpg").write_bytes((folder / f"{name}.jpg").read_bytes())
    (folder / "coco").mkdir()
    images = [
        {"filename": f"{name}.jpg", "split": "test", "sentences": [{"raw": f"a {name} {k}"} for k in range(5)]}
        for name in names
    ]
    for name in names:
        (folder / "coco" / f"{name}.jpg").write_bytes((folder / f"{name}.jpg").read_bytes())
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))


def test_the_pages_have_commands_and_each_is_known():
    """Every page of docs/ whose commands no test runs is seen here."""
    found = {path.name: commands(f"docs/{path.name}") for path in (ROOT / "docs").glob("*.md")}
    for name, lines in found.items():
        assert not lines or name in (*ELSEWHERE, "published.md", "real-images.md"), name
    assert len(commands("README.md")) > 25


@pytest.mark.full
def test_every_command_of_the_readme(place):
    """--watch alone is not typed, as it never ends. Files that commands before have made are the next ones' input."""
    for line in commands("README.md"):
        words = typed(line)
        if "--watch" in words:
            assert cli.parse(words[0], words[1:]).watch
            continue
        if "imagenet-train.beton" in line:
            (place / "imagenet-train.beton").write_bytes((place / "val.beton").read_bytes())
        if "RN50.pt" in line:
            torch.save(create("tiny-rn", 0).state_dict(), place / "RN50.pt")
            words = ["0" if words[k - 1 : k] == ["--epochs"] else word for k, word in enumerate(words)]
        assert cli.main(words) == 0, line
    assert (place / "report/index.html").is_file() and (place / "compared/index.html").is_file()
    assert (place / "mmcl_ssl.safetensors.md").is_file() and (place / "preview.png").is_file()


@pytest.mark.full
def test_the_readmes_own_study(place):
    """mine.toml, as it stands there, with one of its seeds and of its learning rates."""
    toml = re.search(r"^    # mine\.toml, for (.*)\n((?:    .*\n)+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert toml and toml[1] == "python -m fastbd sweep --study mine.toml"
    text = re.sub("^    ", "", toml[2], flags=re.MULTILINE)
    (place / "mine.toml").write_text(text.replace("lr = [3e-5, 1e-4, 3e-4]", "lr = [1e-4]"))
    assert cli.main(typed("sweep --study mine.toml")) == 0
    page = (place / "studies/mine/report/index.html").read_text()
    assert "Does a larger patch survive PAR?" in page and "8 px random" in page


@pytest.mark.full
def test_every_command_of_published(place):
    for line in commands("docs/published.md"):
        words = typed(line)
        if words[:2] == ["build", "--source"]:
            words[words.index("pairs.beton")] = "published.beton"
        words = ["published.beton" if word == "pairs.beton" else word for word in words]
        if words[0] in TRAINED:
            words += ["--out", f"runs/published-{words[0]}"]
            words = ["runs/published-pretrain" if word == "runs/mmcl_ssl" else word for word in words]
        if words[0] == "sweep":
            words += ["--out", "studies/published"]
        assert cli.main(words) == 0, line


def test_the_study_of_real_images_is_one():
    """Its data are a user's: docs/real-images.md says how they are made."""
    study = studies.load(ROOT / "docs/real-images.toml")
    assert len(study.seeds) == 3 and "docs/real-images.toml --out studies/real" in commands("docs/real-images.md")[0]
