"""Who may import whom: the table of the house."""

from __future__ import annotations

import ast
from pathlib import Path

import fastbd
from fastbd import kernels

PACKAGE = Path(fastbd.__file__).parent
KERNELS = Path(kernels.__file__).parent

LEAVES = {"archive", "errors", "config", "draws", "dist", "files", "formats", "log", "precision", "prompts", "signals"}
ARROWS = {
    "cli": {"commands", "study"},
    "commands": {"run", "task", "engines", "rebound", "kept", "data", "models", "objectives", "cleaning",
                 "evals", "poison", "study", "checkpoint", "resume", "kernels", "cli"},
    "run": {"task", "watch", "cleaning", "loop", "step", "fit", "kept", "limits", "optim", "checkpoint", "data",
            "models", "evals", "poison", "kernels", "rebound", "resume", "study", "divergence", "readback"},
    "resume": {"checkpoint", "task", "data", "poison", "study"},
    "watch": {"task", "data", "evals", "kept", "models"},
    "task": {"cleaning", "data", "models", "poison"},
    "engines": set(),
    "rebound": {"cleaning", "data", "evals", "models", "objectives", "optim", "poison", "step"},
    "loop": {"data", "readback"},
    "fit": {"step", "cleaning", "data", "models", "objectives", "optim", "kernels"},
    "step": {"capture", "cleaning", "data", "models", "objectives", "optim", "kernels"},
    "capture": set(),
    "kept": set(),
    "readback": set(),
    "divergence": {"readback"},
    "evals": {"data", "models", "optim", "poison", "kernels"},
    "cleaning": {"objectives", "losses", "optim", "models", "kernels"},
    "data": {"poison", "kernels"},
    "study": set(),
    "models": {"kernels"},
    "poison": {"kernels"},
    "objectives": {"losses", "kernels"},
    "losses": set(),
    "limits": set(),
    "optim": set(),
    "checkpoint": set(),
    "kernels": set(),
    **{leaf: set() for leaf in LEAVES},
}  # fmt: skip


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


def test_help_and_study_stay_light():
    """Imports at the top of these files, so that --help answers at once and reports need no torch."""
    heavy = {"torch", "matplotlib", "triton", "nvidia", "ffcv", "optuna"}
    for path, room in modules():
        if room in ("cli", "config", "errors", "study", "__main__", "__init__"):
            tops = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
            names = {alias.name for n in tops if isinstance(n, ast.Import) for alias in n.names}
            names |= {n.module for n in tops if isinstance(n, ast.ImportFrom)}
            assert not {name.split(".")[0] for name in names} & heavy, path
