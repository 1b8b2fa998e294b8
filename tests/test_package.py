"""The package as others install it: what is in the sdist and in the wheel, and that the wheel works by itself."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = "fastbd/kernels"  # a link to ../kernels in the repository, a folder for those who install it

FILES = (
    "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "LOG.md", "Makefile", "constraints.txt",
    "hashes.txt",
)  # fmt: skip
FOLDERS = ("fastbd", "kernels", "bench", "docs", "findings", "tests")


class Built(NamedTuple):
    sdist: Path
    wheel: Path
    wheel_of_sdist: Path


def _run(*command, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def _build(kind: str, source: Path, out: Path) -> Path:
    """The path of what setuptools, which needs no network for it, makes of a source tree: a "wheel" or an "sdist"."""
    code = f"import sys; from setuptools import build_meta as made; print(made.build_{kind}(sys.argv[1]))"
    return out / _run(sys.executable, "-c", code, out, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """Built from a copy of the sources, as setuptools puts its own files beside them."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    tree.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    sdist = _build("sdist", tree, folder)
    with tarfile.open(sdist) as tar:
        tar.extractall(folder, filter="data")
    (folder / "again").mkdir()
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    return Built(sdist, _build("wheel", tree, folder), _build("wheel", unpacked, folder / "again"))


def _sources() -> set[str]:
    """All files below fastbd/, those of the kernels included."""
    folders = {"fastbd": ROOT / "fastbd", KERNELS: ROOT / "kernels"}
    return {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }


def _files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def test_a_wheel_holds_all_sources_and_nothing_else(built):
    sources = _sources()
    data = {"fastbd/data/clip_merges.txt", "fastbd/evals/classes/demo.txt", "fastbd/report/published.csv"}
    assert {f"{KERNELS}/augment.py", *data} <= sources
    files = _files(built.wheel)
    compiled = {name for name in files if name.endswith(EXTENSION_SUFFIXES[0])}
    assert {name: files[name] for name in files.keys() - compiled} == {
        name: (ROOT / name).read_bytes() for name in sources
    }
    has_compiler = shutil.which(sysconfig.get_config_var("CXX").split()[0])
    libraries = {f"{KERNELS}/_{path.stem}{EXTENSION_SUFFIXES[0]}" for path in (ROOT / KERNELS / "cpp").glob("*.cpp")}
    assert compiled == (libraries if has_compiler else set())


def test_an_sdist_holds_all_sources_and_makes_the_same_wheel(built):
    with tarfile.open(built.sdist) as tar:
        members = {member.name.split("/", 1)[-1]: member for member in tar.getmembers()}
    assert _sources() <= {name for name, member in members.items() if member.isfile()}  # the kernels, too: no link
    assert _files(built.wheel_of_sdist) == _files(built.wheel)


def test_an_sdist_holds_what_its_tests_need(built):
    """All of the repository, but for what only its own services read (.ci/run and .gitignore)."""
    with tarfile.open(built.sdist) as tar:
        members = {member.name.split("/", 1)[-1] for member in tar.getmembers() if member.isfile()}
    there = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    kept = {path for path in there if "__pycache__" not in path.parts and path.suffix != ".so"}
    assert {*FILES, *(path.relative_to(ROOT).as_posix() for path in kept)} <= members


def test_the_metadata_tell_what_the_package_is(built):
    with zipfile.ZipFile(built.wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        told = email.message_from_bytes(archive.read(name))
    assert told["Requires-Python"] == ">=3.11" and told["License-Expression"] == "Apache-2.0"
    assert any("arxiv.org/abs/2311.14948" in url for url in told.get_all("Project-URL"))
    supported = {f"Programming Language :: Python :: 3.{minor}" for minor in range(11, 15)}
    assert supported <= set(told.get_all("Classifier"))
    assert not [line for line in told.get_all("Requires-Dist") if "dali" in line and "extra ==" not in line]


FIRST_STEPS = """
import fastbd
from fastbd import cli
from fastbd.commands import demo_data

demo_data.PAIRS, demo_data.HELD_OUT = 240, 60
assert cli.main("pretrain --model tiny-rn --epochs 1 --batch-size 48 --out runs/start".split()) == 0
assert cli.main("report --runs runs --out report".split()) == 0
print(fastbd.__file__)
"""


@pytest.mark.full
def test_an_installed_wheel_works_without_the_repository(built, tmp_path):
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps")
    _run(*pip, "--target", site, built.wheel, cwd=tmp_path)
    place = tmp_path / "place"
    place.mkdir()
    assert "python -m fastbd demo" in _run(site / "bin/fastbd", "--help", cwd=place, PYTHONPATH=str(site))
    said = _run(sys.executable, "-P", "-c", FIRST_STEPS, cwd=place, PYTHONPATH=str(site))
    assert Path(said.splitlines()[-1]) == site / "fastbd/__init__.py"
    assert (place / "runs/start/result.json").is_file() and "<html" in (place / "report/index.html").read_text()
