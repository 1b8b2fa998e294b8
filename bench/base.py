"""The working tree against the tree of an earlier commit: the same cases in a process each, which take turns.

Each way of doing the work is built in both processes, and what it returns compared. Then they are timed call by call;
the one that waits is blocked in reading from a pipe.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.case import Call, Case, Cases, Output, Provider, Unavailable
from bench.run import Effort

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("worker.py")


class NoCommit(Exception):
    """Why there is no tree to compare with."""


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Yield a folder named by the commit's short hash, with its tree; it is removed afterwards."""
    name = git("rev-parse", "--short=7", "--verify", "--end-of-options", f"{commit}^{{commit}}")
    with TemporaryDirectory(prefix="fastbd-base-") as folder:
        tree = Path(folder, name)
        git("worktree", "add", "--quiet", "--detach", str(tree), name)
        try:
            complete(tree)
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def complete(tree: Path) -> None:
    """Make what an installation would: the link to the kernels, which older trees lack, and compiled kernels."""
    link = tree / "fastbd" / "kernels"
    if not link.exists():
        link.symlink_to(Path("..", "kernels"))
    if (tree / "kernels" / "cpp").is_dir():
        build = [sys.executable, "-c", "from setuptools import setup; setup()", "build_ext", "--inplace"]
        subprocess.run(build, cwd=tree, check=True, stdout=subprocess.DEVNULL)


def git(*words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, start_new_session=True)
    except FileNotFoundError:
        raise NoCommit("--base needs git") from None
    if done.returncode:
        raise NoCommit(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip()


def environment(tree: Path) -> dict[str, str]:
    """Variables of a process that imports from this tree."""
    paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


class Process:
    """A process of bench/worker.py in one tree."""

    def __init__(self, tree: Path, module: str, device: str, quick: bool):
        self.tree = tree
        self.process = subprocess.Popen(
            [sys.executable, "-P", WORKER, module, device, str(torch.get_num_threads()), str(quick)],
            cwd=tree,
            env=environment(tree),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C is for this process, which ends the other one
        )

    def ask(self, *words: str) -> Any:
        """The answer. Unavailable for what cannot be had there, RuntimeError for what fails."""
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(words), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the process in {self.tree} has ended with code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise (Unavailable if answer["absent"] else RuntimeError)(answer["error"])
        return answer["value"]

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@dataclass
class Way:
    """A provider of a case in one of the two processes, as a call of this one."""

    process: Process
    provider: str
    built: bool = False

    def build(self, other: Way | None = None) -> Call:
        if other and not other.built:
            raise Unavailable("there is nothing to compare it with")
        self.process.ask("build", self.provider)
        self.built = True
        return self

    def __call__(self) -> Output:
        with TemporaryDirectory() as folder:
            path = Path(folder, "outputs.pt")
            self.process.ask("run", str(path))
            return torch.load(path, weights_only=True)

    def seconds(self) -> float:
        return self.process.ask("seconds")


@contextmanager
def against(
    tree: Path, module: str, parts: Sequence[str], effort: Effort, say: Callable[[str], None]
) -> Iterator[Callable[[str, bool], Cases]]:
    """Yield a bench's `cases`: one for each provider of ours that both trees have, of cases with one of the `parts` in
    their names."""
    processes: list[Process] = []

    def cases(device: str, quick: bool) -> Cases:
        processes.extend(Process(where, module, device, quick) for where in (tree, ROOT))
        base, ours = processes
        names = {process: [name for name in process.ask("names") if asked(name, parts)] for process in processes}
        say_alone(say, names[base], names[ours], tree.name)
        for name in names[ours]:
            if name not in names[base]:
                continue
            theirs, about = base.ask("case", name), ours.ask("case", name)
            say_alone(say, theirs["providers"], about["providers"], tree.name, f"{name}: ")
            for way, facts in about["providers"].items():
                wanted = effort.takes(way) and (not facts["slow"] or effort.takes_slow(way))
                if wanted and way in theirs["providers"]:
                    yield name, partial(paired, name, way, about, device, base, ours)

    try:
        yield cases
    finally:
        for process in processes:
            process.end()


def asked(name: str, parts: Sequence[str]) -> bool:
    return not parts or any(part in name for part in parts)


def say_alone(
    say: Callable[[str], None], theirs: Sequence[str], ours: Sequence[str], commit: str, prefix: str = ""
) -> None:
    """Say which names only one of the trees has."""
    for where, found, other in ((f"at {commit}", theirs, ours), ("in the working tree", ours, theirs)):
        if alone := [name for name in found if name not in other]:
            say(f"{prefix}only {where}: {', '.join(alone)}")


def paired(name: str, way: str, about: dict, device: str, base: Process, ours: Process) -> Case:
    """A case of the same provider in both processes, whose truth is the base's output."""
    facts = about["providers"][way]
    first, second = Way(base, way), Way(ours, way)
    common = {"tolerance": facts["tolerance"], "memory": ""}
    return Case(
        name=name,
        unit=about["unit"],
        units=about["units"],
        device=device,
        providers={
            f"{way} at {base.tree.name}": Provider(first.build, timed=False, **common),
            way: Provider(partial(second.build, first), ours=True, note=facts["note"], **common),
        },
        sizes=about["sizes"],
        clock=Way.seconds,
    )
