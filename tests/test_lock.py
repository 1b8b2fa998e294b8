"""The pinned packages: constraints.txt and hashes.txt, which `make lock` writes."""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pins(name: str) -> dict[str, set[str]]:
    """The versions of each package in a file; several where they differ by Python's version."""
    found: dict[str, set[str]] = {}
    for package, pinned in re.findall(r"^([a-z0-9-]+)==([^\s;\\]+)", (ROOT / name).read_text(), re.MULTILINE):
        found.setdefault(package, set()).add(pinned)
    return found


def needed(package: str, extras: set[str]) -> set[str]:
    """Names of all packages that this one needs here, those of their own included."""
    found, left = set(), [(package, extras)]
    while left:
        name, chosen = left.pop()
        for requirement in map(Requirement, requires(name) or ()):
            if not any(requirement.marker is None or requirement.marker.evaluate({"extra": e}) for e in {"", *chosen}):
                continue
            if (wanted := canonicalize_name(requirement.name)) not in found:
                found.add(wanted)
                left.append((wanted, requirement.extras))
    return found


@pytest.mark.parametrize("name", ["constraints.txt", "hashes.txt"])
def test_all_that_is_needed_is_pinned(name):
    pinned = pins(name)
    packages = needed("fastbd", {"dev", "gpu"})
    assert {"torch", "sympy", "mpmath", "nvidia-dali-cuda130"} <= packages  # those of those, too
    assert packages <= pinned.keys()


def test_both_files_pin_the_same():
    free, hashed = pins("constraints.txt"), pins("hashes.txt")
    assert hashed.items() <= free.items()
    for block in re.split(r"\n(?=\S)", (ROOT / "hashes.txt").read_text()):
        assert block.startswith("#") or "--hash=sha256:" in block
