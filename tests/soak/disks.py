"""Verbs on disks that are full at some size; when there is room again they are repeated or resumed, as they say."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soak.forks import Ended, Forks
from soak.kills import CASES, Case, differences, fresh, half_written, make_study, outcome, undisturbed
from soak.tally import SAME, SENTENCE, Tally, main

SUITE_SHARE = 0  # tests of the verbs fill a disk one by one; a study for this one alone takes longer
SIZES = 12  # of the disk, for each verb
BLOCK, ROOM = 4096, 256 << 20  # bytes
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
FILL = "import sys; from soak import disks; disks.fill(float(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])"


def inject(share: float, seed: int, folder: Path) -> Iterator[Tally]:
    """Yield what fill() counts, in a process of its own: one that may mount, where this user has that right."""
    mounts = not subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode
    command = [*(NAMESPACE if mounts else ()), sys.executable, "-c", FILL, str(share), str(seed), str(folder)]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    kind = "tmpfs" if mounts else "limit"
    with subprocess.Popen([*command, kind], env=paths, stdout=subprocess.PIPE, text=True) as filling:
        for line in filling.stdout:
            tally = json.loads(line)
            yield Tally(**tally | {"ends": Counter(tally["ends"])})
    if filling.returncode:
        raise RuntimeError(f"exit code {filling.returncode}: its error is above")


def fill(share: float, seed: int, folder: str, kind: str) -> None:
    """Print the tally of each verb as a line of JSON; where `share` is small, only of the first verbs."""
    injections, draw = round(share * SIZES * len(CASES)), random.Random(seed)
    with Forks(Path(folder) / "forks.log") as forks:
        make_study(Path(folder))
        disk = {"tmpfs": Tmpfs, "limit": Limit}[kind](forks, Path(folder))
        for number, case in enumerate(CASES):
            if times := len(range(number, injections, len(CASES))):
                print(json.dumps(vars(count(case, times, draw, disk))), flush=True)


class Tmpfs:
    """A disk of a given size, mounted where the verbs work."""

    about = "a tmpfs"

    def __init__(self, forks: Forks, folder: Path):
        self.forks, self.folder, self.place = forks, folder, folder / "place"
        self.ballast = self.place / "ballast"

    def most(self, case: Case) -> int:
        """Return a size at which all fits that has just been made: with temporary files beside it."""
        before = used(self.folder / "study" / case.copied) if case.copied else 0
        return int(2.5 * (used(self.place) - before)) + 2 * BLOCK

    def run(self, case: Case, size: int, until: float | None) -> Ended:
        """Run the verb on a disk on which `size` bytes are free, for `until` seconds where given."""
        self._mount(ROOM)
        if case.copied:
            shutil.copytree(self.folder / "study" / case.copied, self.place / case.copied)
            fill_blocks(self.place)
        self.ballast.write_bytes(bytes(BLOCK))  # a disk of no size would have no limit
        self._mount(size + used(self.place), "remount")
        timer = threading.Timer(until or 0, self.free)
        if until is not None:
            timer.start()
        ended = self.forks.run(case.command.split(), self.place)
        timer.cancel()
        return ended

    def free(self) -> None:
        """Make room."""
        self.ballast.unlink(missing_ok=True)
        self._mount(ROOM, "remount")

    def end(self) -> None:
        subprocess.run(["umount", "--lazy", self.place], check=True)

    def _mount(self, size: int, *options: str) -> None:
        given = ",".join([*options, f"size={size}"])
        subprocess.run(["mount", "-t", "tmpfs", "-o", given, "tmpfs", self.place], check=True)


def used(folder: Path) -> int:
    """Return the bytes that the folder's files take on the disk, in whole blocks."""
    sizes = [path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()]
    return sum(-(-size // BLOCK) * BLOCK for size in sizes)


def fill_blocks(folder: Path) -> None:
    """Lengthen the last line of each .jsonl file by spaces, so that another line needs room."""
    for path in folder.rglob("*.jsonl"):
        lines = path.read_bytes()
        path.write_bytes(lines[:-1] + b" " * (-len(lines) % BLOCK) + b"\n")


class Limit:
    """A limit to the size of each file that a verb writes, where this user may not mount."""

    about = "RLIMIT_FSIZE"

    def __init__(self, forks: Forks, folder: Path):
        self.forks, self.folder, self.place = forks, folder, folder / "place"

    def most(self, case: Case) -> int:
        """Return a size at which all fits that has just been made."""
        return int(1.3 * max(path.stat().st_size for path in self.place.rglob("*") if path.is_file())) + BLOCK

    def run(self, case: Case, size: int, until: float | None) -> Ended:
        """Run the verb, of which no file gets larger than `size` bytes, for `until` seconds where given."""
        limit = max(size, BLOCK), until  # with less there would be no room for the sentence
        return self.forks.run(case.command.split(), fresh(case, self.folder), limit=limit)

    def free(self) -> None:
        """The limit has ended with the process."""

    def end(self) -> None:
        """There is nothing to take away."""


def count(case: Case, times: int, draw: random.Random, disk: Tmpfs | Limit) -> Tally:
    """Return how the verb ended on disks of so many sizes, and after it was repeated or resumed."""
    whole, seconds = undisturbed(case, disk.forks, disk.folder, runs=1)
    most, sizes, waits = disk.most(case), [], case.verb == "sweep"
    then = "a sweep waits for room" if waits else "when there is room the same command again"
    then = f"when there is room {case.resume[1]}" if case.resume and not waits else then
    tally = Tally(f"a full disk under {case.verb}; {then}", "")
    for number in range(times):
        step = (number + 0.5) * SIZES / times // 1
        size = int(most * ((step + draw.random() * (step > 0)) / SIZES) ** 2) // BLOCK * BLOCK
        sizes.append(size)
        ended = disk.run(case, size, draw.uniform(0.3, 1.0) * seconds if waits else None)
        end, seen = judge(case, ended, whole, disk)
        tally.count(end, f"{size} of {most} bytes: {seen}")
        disk.end()
    tally.how = f"{disk.about} of {min(sizes) / 1024:,.0f} to {max(sizes) / 1024:,.0f} KiB"
    return tally


def judge(case: Case, ended: Ended, whole: dict[str, Any], disk: Tmpfs | Limit) -> tuple[str, str]:
    """Return (the end, what was seen) of a verb on a full disk, after it was repeated or resumed with room."""
    said = f"exit code {ended.code}: {ended.stderr}"
    if ended.hung or ended.left or not (ended.code == 0 or is_sentence(case, ended)):
        return ("hung" if ended.hung else "workers left" if ended.left else "no sentence"), said
    if half := half_written(case, disk.place, whole):
        return "half-written", f"{', '.join(half)}; {said}"
    disk.free()
    if ended.code:
        command = case.again(disk.place)
        again = disk.forks.run(command.split(), disk.place)
        said += f"; {command}: exit code {again.code}: {again.stderr}"
        if again.code:
            return "not repeated", said
    if different := differences(whole, outcome(case, disk.place)):
        return "other bytes", f"{different}; {said}"
    return SENTENCE if ended.code else SAME, said


def is_sentence(case: Case, ended: Ended) -> bool:
    """Whether the verb said in one sentence what could not be written, by the name of what it makes or of a part."""
    words, said = case.command.split(), ended.stderr
    made = Path(words[words.index("--out" if "--out" in words else "--run") + 1])
    named = made.stem in said or re.match(r"error: the disk is full: \S+\.\w+ could not be written;", said)
    return ended.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and bool(named)


if __name__ == "__main__":
    main("disks", inject)
