"""No writer leaves half a file under the final name."""

from __future__ import annotations

import ast
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import fastbd
from fastbd.data.demo import write_demo_set

OTHER_WAYS = {
    "base/files.py lock": "a lock, which nothing reads but to name its holder, or a file to which a line is added",
    "commands/export.py write_hugging_face": "into a folder that is renamed",
    "models/weight_files.py write_safetensors": "to a path that its callers rename",
    "track/process.py _started": "adds what a tracker says",
    "study/engines.py _logged": "adds what a worker says",
    "data/beton.py": "a temporary of its own, gone on with by the next build",
    "data/resident.py": "a temporary of its own, as the file is mapped while it is written",
    "poison/patterns.py": "into memory",
    "study/ledger.py": "into a folder that is renamed",
}
"""Places that write otherwise than through files.replacing or into a new_folder, and why."""


def writes(node: ast.AST) -> bool:
    """Whether this is a call that writes to a file."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    if name == "open":
        modes = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
        return any(isinstance(mode, str) and set(mode) & set("wax+") and len(mode) < 4 for mode in modes)
    if not isinstance(node.func, ast.Attribute):
        return False  # write_text of base/files replaces the file
    owners = ("np", "torch", "picture", "image", "figure")
    saved = name == "save" and ast.unparse(node.func.value) in owners
    return saved or name in ("write_bytes", "write_text", "tofile")


def unguarded(tree: ast.AST, guarded: bool = False, function: str = "") -> Iterator[str]:
    """The functions of the calls that write, where no `with` around them replaces a file or makes a new folder."""
    for node in ast.iter_child_nodes(tree):
        inside = guarded
        if isinstance(node, ast.With):
            called = [ast.unparse(item.context_expr) for item in node.items]
            inside = guarded or any("replacing(" in text or "new_folder(" in text for text in called)
        name = node.name if isinstance(node, ast.FunctionDef) else function
        if writes(node) and not inside:
            yield name
        yield from unguarded(node, inside, name)


def test_every_writer_goes_through_a_temporary_file_that_is_renamed():
    root = Path(fastbd.__file__).parent
    found = [
        f"{path.relative_to(root)} {name}"
        for path in root.rglob("*.py")
        for name in unguarded(ast.parse(path.read_text()))
    ]
    assert [place for place in found if not place.startswith(tuple(OTHER_WAYS))] == []
    assert any(place.startswith("base/files.py locked") for place in found)  # else nothing is found at all


def test_a_demo_set_that_is_killed_while_it_is_drawn_has_no_table_yet(tmp_path):
    if not (child := os.fork()):
        for number, _ in enumerate(write_demo_set(tmp_path, 6, 6, seed=0), 1):
            if number == 8:  # six pairs are drawn, and of the held-out ones two
                os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len((tmp_path / "train.csv").read_text().splitlines()) == 7 and not (tmp_path / "val.csv").exists()
    list(write_demo_set(tmp_path, 6, 6, seed=0))
    assert len((tmp_path / "val.csv").read_text().splitlines()) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "train.csv", "val", "val.csv"]
