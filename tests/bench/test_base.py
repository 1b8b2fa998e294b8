from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from shutil import which
from types import ModuleType

import pytest

from bench import base, processes, study
from bench.__main__ import main
from bench.base import NoCommit, against, checkout
from bench.limits import Limits
from bench.run import Effort, run

pytestmark = pytest.mark.skipif(not which("git"), reason="git is not installed")
LIMITS = Limits("cpu", {"fp32": 1e9, "bf16": 1e9, "fp64": 1e9}, 1e9)

# Of an older tree: the least that its benches are made of, and a bench that yields the cases themselves.
MEASURE = """
import time

def clock_of(device):
    def clock(call):
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    return clock
"""
CASE = """
from types import SimpleNamespace

class Unavailable(Exception):
    pass

def provider(build, tolerance=0.0, ours=True):
    return SimpleNamespace(build=build, tolerance={"": tolerance}, ours=ours, note="")

def case(name, **providers):
    return SimpleNamespace(name=name, unit="x/s", units=4, sizes={}, providers=providers)
"""
BENCH = """
import time
import torch
from bench.case import Unavailable, case, provider

def work(value, seconds):
    def call():
        print("a library says this")
        time.sleep(seconds)
        return {"x": torch.full((4,), value)}
    return lambda: call

def absent():
    raise Unavailable("needs a GPU")

def broken():
    raise ValueError("no such kernel")

def cases(device, quick):
"""
BEFORE = """
    yield case("old", fast=provider(work(1.0, 0)))
    yield case("sum", slow=provider(work(1.0, 0.02)), wrong=provider(work(1.0, 0), 0.01), absent=provider(absent),
               broken=provider(work(1.0, 0)), peer=provider(work(1.0, 0), ours=False))
"""
AFTER = """
    yield "sum", lambda: case("sum", slow=provider(work(1.0, 0.005)), wrong=provider(work(1.1, 0), 0.01),
                              absent=provider(absent), broken=provider(broken), other=provider(work(1.0, 0)))
    yield "new", lambda: 1 / 0
"""


def committed(root: Path, files: dict[str, str]) -> Path:
    """Make a repository of these files, committed; it has the kernels beside the package."""
    for name, text in (files | {"kernels/__init__.py": ""}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git = ["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "before"]):
        subprocess.run([*git, *words], check=True)
    return root


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A repository whose working tree is four times as fast as its last commit."""
    files = {"bench/__init__.py": "", "bench/measure.py": MEASURE, "bench/case.py": CASE, "fastbd/__init__.py": ""}
    root = committed(tmp_path / "repository", files | {"bench/tiny.py": BENCH + BEFORE})
    (root / "bench" / "tiny.py").write_text(BENCH + AFTER)
    monkeypatch.setattr(base, "ROOT", root)
    return root


def trees(repository: Path) -> int:
    words = ["git", "-C", repository, "worktree", "list"]
    return len(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines())


def test_the_working_tree_is_timed_in_turns_with_a_commits(repository, monkeypatch, capfd, tmp_path):
    module = ModuleType("bench.tiny")
    module.cases = lambda device, quick: iter([("sum", None), ("new", None)])
    monkeypatch.setitem(sys.modules, "bench.tiny", module)
    monkeypatch.setattr("bench.__main__.BENCHES", {"tiny": "bench.tiny"})
    monkeypatch.setattr("bench.__main__.circumstances", lambda device: (LIMITS, {"device": "a CPU"}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["tiny", "--quick", "--rounds", "9", "--base", "HEAD", "--out", str(tmp_path)]) == 1
    said = capfd.readouterr().out.splitlines()
    report, name = json.loads(said[-1]), base.git("rev-parse", "--short=7", "HEAD")
    (row,) = report["rows"]
    assert (row["name"], row["provider"], row["baseline"]) == ("sum", "slow", f"slow at {name}")
    assert 2 < row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"] < 5 and row["error"] == 0
    assert report["refused"] == {
        "sum: wrong": "x is off by 1.0e-01; 1e-02 is allowed",
        "sum: broken": "RuntimeError: ValueError: no such kernel",
    }
    assert report["skipped"] == {
        f"sum: absent at {name}": "needs a GPU",
        "sum: absent": "there is nothing to compare it with",
    }
    assert [line for line in said if "only" in line] == [
        f"only at {name}: old",
        "only in the working tree: new",
        "sum: only in the working tree: other",
    ]
    assert trees(repository) == 1 and (tmp_path / "cpu.csv").read_text().count("\n") == 2


def test_a_tree_is_removed_after_an_interrupt(repository):
    with pytest.raises(KeyboardInterrupt), checkout("HEAD") as tree:
        assert trees(repository) == 2 and (tree / "fastbd" / "kernels" / "__init__.py").exists()
        raise KeyboardInterrupt
    assert trees(repository) == 1 and not tree.exists()


def test_without_such_a_commit_there_is_nothing_to_compare_with(repository, monkeypatch, tmp_path):
    with pytest.raises(NoCommit), checkout("nothing"):
        pass
    monkeypatch.setattr(base, "ROOT", tmp_path)
    with pytest.raises(NoCommit, match="not a git repository"), checkout("HEAD"):
        pass


@pytest.mark.full
def test_a_tree_does_the_same_as_itself():
    """The real benches; a process's rate is that of the other."""
    said, effort = [], Effort(rounds=5, only=["fastbd reference"])
    with against(base.ROOT, "bench.loss", ["D=1024 mmcl fp32"], effort, said.append) as cases:
        (found,) = cases("cpu", True)
        (result,) = run(found[1](), LIMITS, effort)
    assert result.row["error"] == 0 and 0.3 < result.row["ratio"] < 3 and not said


# ---- whole commands ----

FASTBD = """
import json, os, sys, time
from pathlib import Path

verb, out = sys.argv[1], Path(sys.argv[-1])
if verb == "pretrain":
    time.sleep(SECONDS)
    out.mkdir()
    (out / "log.jsonl").write_text("a step")
    time.sleep(60)
best = {"mmcl/finetune": {"top1": 0.5, "asr": 0.01}, "mmcl/NAME": None}
print("a table")
print(json.dumps({"finished": 3, "best": best}))
sys.exit(CODE)
"""


def program(seconds: float, name: str, code: int = 0) -> str:
    return FASTBD.replace("SECONDS", str(seconds)).replace("NAME", name).replace("CODE", str(code))


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A repository whose `python -m fastbd` was slower in its last commit."""
    root = committed(tmp_path / "repository", {"fastbd/__init__.py": "", "fastbd/__main__.py": program(0.5, "old")})
    (root / "fastbd" / "__main__.py").write_text(program(0.1, "new"))
    monkeypatch.setattr(base, "ROOT", root)
    monkeypatch.setattr(study, "ROOT", root)
    monkeypatch.setattr(study, "measure_limits", lambda device: LIMITS)
    return root


def test_whole_commands_take_turns(programs, capfd, tmp_path):
    assert main(["study", "--base", "HEAD", "--rounds", "1", "--out", str(tmp_path)]) == 0
    said, name = capfd.readouterr().out.splitlines(), base.git("rev-parse", "--short=7", "HEAD")
    rows = {(row["name"], row["provider"]): row for row in json.loads(said[-1])["rows"]}
    old, new = f"fastbd at {name}", "fastbd"
    openings = [("opening", provider) for provider in (old, new, "import torch")]
    assert list(rows) == [("study demo", old), ("study demo", new), *openings]
    assert rows["opening", new]["ratio"] > 1.3 and rows["opening", old]["seconds"] > 0.5
    assert rows["study demo", new]["rate"] == pytest.approx(3 / rows["study demo", new]["seconds"])
    assert {row["baseline"] for row in rows.values()} == {old} and rows["study demo", new]["cpu_seconds"] > 0
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said if line.startswith("| mmcl")]
    best = "50.0%, ASR 1.0%"
    assert cells == [["mmcl/finetune", best, best], ["mmcl/old", "none", ""], ["mmcl/new", "", "none"]]
    assert trees(programs) == 1 and (tmp_path / "cpu.csv").read_text().count("\n") == 6


def test_every_other_round_goes_backwards():
    calls = []
    taken = study.in_turns({name: partial(calls.append, name) for name in "abc"}, 3)
    assert "".join(calls) == "abccbaabc" and [len(values) for values in taken.values()] == [3, 3, 3]


def test_a_command_that_fails_is_told_with_what_it_said(programs, capfd):
    (programs / "fastbd" / "__main__.py").write_text(program(0, "new", code=1))
    assert main(["study", "study"]) == 1
    assert "a command ended with 1:\na table\n" in capfd.readouterr().err


def test_what_a_process_and_its_children_take(tmp_path):
    """Each holds 40 MB; the one that waits is killed with its child."""
    hold = "import subprocess, sys, time; held = b'1' * 40_000_000"
    child = f"{hold}; print('ready', flush=True); time.sleep(60)"
    parent = f"{hold}; subprocess.run([sys.executable, '-c', {child!r}])"
    ready = partial(ready_for, tmp_path / "output", 0.6)
    taken = processes.run([sys.executable, "-c", parent], tmp_path, os.environ, ready)
    assert taken.code is None and 0.6 < taken.seconds < 30 and 90e6 < taken.peak_bytes < 200e6
    ended = processes.run([sys.executable, "-c", "sum(range(10**7)); 1 / 0"], tmp_path, os.environ)
    assert ended.code == 1 and 0.05 < ended.cpu_seconds < 5 and ended.peak_bytes > 0


@pytest.mark.parametrize("wait", ["", "child.wait()"])
def test_cpu_seconds_of_what_a_process_starts_count_once(wait, tmp_path):
    """Whether it waits for that or somebody else does, as a server for what it has forked."""
    busy = "import time\nwhile time.process_time() < 0.5: pass\nopen('ended', 'w')"
    parent = f"import os, subprocess, sys, time; child = subprocess.Popen([sys.executable, '-S', '-c', {busy!r}])\n"
    waits = wait or "while not os.path.exists('ended'): time.sleep(0.02)"
    taken = processes.run([sys.executable, "-S", "-c", parent + waits], tmp_path, os.environ)
    assert 0.5 <= taken.cpu_seconds < 0.8


def ready_for(output: Path, seconds: float) -> bool:
    """Whether a process has said so long ago that it is ready."""
    return "ready" in output.read_text() and time.time() - output.stat().st_mtime > seconds
