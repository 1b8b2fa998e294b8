"""Who may import whom: the table of the house."""

from __future__ import annotations

import ast
from pathlib import Path

import fastbd
from fastbd import kernels

PACKAGE = Path(fastbd.__file__).parent
KERNELS = Path(kernels.__file__).parent

LEAVES = {"base", "config"}
ARROWS = {
    "cli": {"commands"},
    "commands": {
        "study",
        "training",
        "report",
        "evals",
        "methods",
        "data",
        "models",
        "poison",
        "kernels",
        "track",
        "cli",
    },
    "study": {"training"},
    "training": {"evals", "methods", "data", "models", "poison", "kernels", "track"},
    "track": set(),
    "evals": {"data", "models", "poison", "kernels"},
    "methods": {"models", "kernels"},
    "data": {"poison", "kernels"},
    "report": set(),
    "models": {"kernels"},
    "poison": {"kernels"},
    "kernels": set(),
    **{leaf: set() for leaf in LEAVES},
}


def modules():
    yield from ((path, path.relative_to(PACKAGE).parts[0].removesuffix(".py")) for path in PACKAGE.rglob("*.py"))
    yield from ((path, "kernels") for path in KERNELS.rglob("*.py"))


def rooms_imported(path: Path) -> set[str]:
    """Rooms of fastbd that a file imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastbd":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fastbd.")}
    return found - {"__version__"}


def test_imports_follow_the_arrows():
    for path, room in modules():
        if room in ("__init__", "__main__"):
            continue
        allowed = ARROWS[room] | LEAVES | {room}
        assert rooms_imported(path) <= allowed, f"{path} imports {rooms_imported(path) - allowed}"


def test_only_the_demo_plays_the_user():
    users = [path.name for path, room in modules() if room == "commands" and "cli" in rooms_imported(path)]
    assert users == ["demo.py"]


def test_leaves_import_only_leaves():
    for path, room in modules():
        if room in LEAVES:
            assert rooms_imported(path) <= LEAVES, path


LIGHT = {"errors", "evaluation", "files", "run_folder", "stats", "tradeoff", "console", "prompts", "text"}  # of base


def test_help_and_reports_stay_light():
    """Imports at the top of these files, so that --help answers at once and reports need no torch."""
    heavy = {"torch", "matplotlib", "jinja2", "triton", "nvidia", "ffcv", "ray"}
    for path, room in modules():
        light = room in ("cli", "config", "report", "__main__", "__init__") or (room == "base" and path.stem in LIGHT)
        if light or (room == "study" and path.stem != "engines"):
            tops = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
            names = {alias.name for n in tops if isinstance(n, ast.Import) for alias in n.names}
            names |= {n.module for n in tops if isinstance(n, ast.ImportFrom)}
            assert not {name.split(".")[0] for name in names} & heavy, path
