"""The ledger of a study: a folder in which any number of processes, on any machines, share out its runs.

    study.N/study.json  the study and its runs; a higher N adds runs
    claims/ID.N/        the Nth process that took the run ID: who it is, and how that ended
    failed/ID.json      why the run failed
    plans/, runs/       what the runs make

Of the file system this is asked: that of several processes that rename a folder to the same name only one succeeds, and
that a file just opened is up to date. NFS gives it. A holder touches its claim; one that was not touched for `lease`
seconds of the file server's clock may be ended by anyone who then takes the next N.

A damaged study.json is refused; a claim that cannot be read is judged by its time alone; a failed/ID.json counts.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from fastbd.base import files
from fastbd.base.errors import UserError
from fastbd.base.files import read_json
from fastbd.study.grid import Entry, Planned, Study, command, expand, material, study_of, to_values

LEASE = 120.0
BEATS = 6  # in a lease
ENDS = ("finished", "released", "expired")
TAIL = 1 << 16  # bytes in which the last line of metrics.jsonl is looked for


@dataclass(frozen=True)
class Status:
    """How a run stands."""

    state: Literal["waiting", "running", "finished", "failed", "blocked"]
    """blocked: something that it needs has failed, or is blocked."""
    attempt: int = 0
    """Claims so far."""
    who: str = ""
    """host:pid of the holder."""
    since: float = 0.0
    """When it was claimed, by the file server's clock."""
    reason: str = ""
    """Of a failure."""


@dataclass(frozen=True)
class Row:
    """A line of the live view; None is not known yet."""

    run: Planned
    status: Status
    seconds: float | None
    step: float | None = None
    epoch: float | None = None
    top1: float | None = None
    asr: float | None = None


class Ledger:
    """The study in `folder`; without one, that which the folder holds. UserError where the two contradict.

    `later` is the id of a run that take() gives only where there is no other; `short` counts how often in a row a run,
    by its id, has lacked memory in this process.
    """

    def __init__(self, folder: Path, study: Study | None = None, *, lease: float = LEASE):
        self.folder, self.lease = folder, lease
        self._claims, self._failed = folder / "claims", folder / "failed"
        self._finished: set[str] = set()
        self._ahead: dict[Path, tuple[float, float]] = {}
        self.later = ""
        self.short: Counter[str] = Counter()
        try:
            if study is None and not _versions(folder):
                raise UserError(f"{folder} holds no study: name one with --study.")
            for made in (self._claims, self._failed):
                made.mkdir(parents=True, exist_ok=True)
            self.study, self.runs = self._join(study)
        except UserError:
            check_place(folder)
            raise

    def _join(self, study: Study | None) -> tuple[Study, tuple[Planned, ...]]:
        """The study and its runs, with those that searches have added; written down where they are new."""
        while True:
            versions = _versions(self.folder)
            self._version = len(versions)
            joined = study or study_of(versions[-1]["study"])
            if versions:
                joined = replace(joined, searched=study_of(versions[-1]["study"]).searched)
            known = {run["id"]: run["name"] for version in versions for run in version["runs"]}
            runs = expand(joined, self.folder, known)
            for version in versions:
                self._check(joined, runs, version, known)
            if known.keys() >= {run.id for run in runs}:
                return joined, runs
            self._write(joined, runs)  # or another one has added runs meanwhile: look again

    def _write(self, study: Study, runs: Iterable[Planned]) -> bool:
        """As the next version; False where there is one of which we do not know."""
        rows = [{"id": r.id, "name": r.name, "verb": r.verb, "command": command(r.config)} for r in runs]
        version = {"study": to_values(study), "runs": rows, "begun_in": os.getcwd()}
        return _create(_version(self.folder, self._version + 1), version)

    def of(self, entry: Entry) -> list[Planned]:
        """The cleanings of one entry of the study's."""
        runs = expand(replace(self.study, clean=(entry,), searched=()), self.folder, self._names())
        return [run for run in runs if run.verb == "clean"]

    def add(self, choose: Callable[[], Entry | None]) -> bool:
        """Plan the cleaning that `choose` picks, for the study's `searched`; False where it picks none.

        It is asked again where another process has added one meanwhile.
        """
        while True:
            self._catch_up()
            entry = choose()
            if entry is None:
                return False
            study = replace(self.study, searched=(*self.study.searched, entry))
            if self._write(study, expand(study, self.folder, self._names())):
                return True

    def _names(self) -> dict[str, str]:
        return {run.id: run.name for run in self.runs}

    def _catch_up(self) -> None:
        """Know what others have added."""
        if _version(self.folder, self._version + 1).exists():
            self.study, self.runs = self._join(self.study)

    def _check(self, study: Study, runs: tuple[Planned, ...], version: dict, known: Mapping[str, str]) -> None:
        """That no run has the name, and so the folder, of another one."""
        if version["study"]["name"] != study.name:
            raise UserError(f"{self.folder} holds the study '{version['study']['name']}'; choose another folder.")
        taken = {(run["verb"], run["name"]): run["id"] for run in version["runs"]}
        for run in runs:
            if taken.get((run.verb, run.name), run.id) != run.id:
                earlier = {r.id: r for r in expand(study_of(version["study"]), self.folder, known)}
                said = _difference(earlier.get(taken[run.verb, run.name]), run)
                raise UserError(
                    f"{self.folder} holds the study '{study.name}' with other settings: {run.name} was planned with "
                    f"{said}; choose another folder, or take the settings back."
                )

    def take(self) -> Claim | None:
        """The next run that can be done, claimed; None when there is none now (see left)."""
        for run, status in sorted(self._statuses(), key=lambda pair: pair[0].id == self.later):
            if status.state == "waiting" and all(need in self._finished for need in run.needs):
                with ExitStack() as released:
                    claim = self._claim(run, status.attempt + 1)
                    if claim:
                        released.enter_context(claim)
                        if not run.finished and not self._failure(run).exists():  # else it ended after we had looked
                            released.pop_all()
                            return claim
        return None

    def left(self) -> bool:
        """Whether a run may still come up to be taken, here or elsewhere."""
        return any(status.state in ("waiting", "running") for _, status in self._statuses())

    def retry(self) -> None:
        """Let runs that failed be taken again."""
        for path in self._failed.glob("*.json"):
            path.unlink(missing_ok=True)

    def table(self) -> list[Row]:
        """All runs as they stand."""
        now = self.now()
        return [_row(run, status, now) for run, status in self._statuses()]

    def now(self) -> float:
        """The file server's clock, in seconds: the machines' own may differ by more than a lease."""
        with tempfile.NamedTemporaryFile(dir=self._claims, prefix=".clock-") as file:
            os.utime(file.fileno())
            return os.fstat(file.fileno()).st_mtime

    def _statuses(self) -> Iterator[tuple[Planned, Status]]:
        """Every run after those that it needs."""
        self._catch_up()
        now, attempts, lost = self.now(), self._attempts(), set()
        for run in self.runs:
            status = self._status(run, attempts.get(run.id, 0), now)
            if status.state == "waiting" and lost.intersection(run.needs):
                status = Status("blocked", status.attempt)
            if status.state in ("failed", "blocked"):
                lost.add(run.id)
            yield run, status

    def _status(self, run: Planned, attempt: int, now: float) -> Status:
        if run.id not in self._finished and run.finished:
            self._finished.add(run.id)
        if run.id in self._finished:
            return Status("finished", attempt)
        with suppress(FileNotFoundError):
            return Status("failed", attempt, reason=_reason(self._failure(run)))
        if attempt == 0:
            return Status("waiting")
        path = self._path(run, attempt)
        try:
            owner, ended, touched = _read_claim(path)
        except FileNotFoundError:  # it was removed, as its holder will find
            owner, ended, touched = {}, "", _touched(path.parent)
        expired = self._expired(path, touched, now)
        if ended == "finished" and not expired and not run.product.exists():
            return Status("finished", attempt)  # NFS may hide a new file for a minute
        if ended or expired or _is_gone(owner):
            return Status("waiting", attempt)
        who = f"{owner['host']}:{owner['pid']}" if owner else "unknown"
        return Status("running", attempt, who, owner.get("since", touched))

    def _expired(self, path: Path, touched: float, now: float) -> bool:
        """Whether nobody has touched the claim for a lease.

        The age of a time that lies ahead of the server's clock tells nothing, as after that clock was put back: such a
        claim expires where this process sees the same time for a lease. A holder who lives has touched it meanwhile.
        """
        if touched <= now:
            return now - touched > self.lease
        seen, since = self._ahead.get(path, (None, 0.0))
        if seen != touched:
            self._ahead[path] = touched, time.monotonic()
            return False
        return time.monotonic() - since > self.lease

    def _attempts(self) -> dict[str, int]:
        """The highest attempt of each run that was ever claimed."""
        found: dict[str, int] = {}
        for name in os.listdir(self._claims):
            if match := re.fullmatch(r"([0-9a-f]{12})\.(\d+)", name):
                found[match[1]] = max(found.get(match[1], 0), int(match[2]))
        return found

    def _claim(self, run: Planned, attempt: int) -> Claim | None:
        if attempt > 1:
            with suppress(FileNotFoundError):
                _end(self._path(run, attempt - 1), "expired")  # its holder may have only stalled
        path = self._path(run, attempt)
        owner = {**_owner(), "since": self.now()}
        return Claim(run, path, self._failure(run), self.lease, owner) if _create(path, owner) else None

    def _path(self, run: Planned, attempt: int) -> Path:
        return self._claims / f"{run.id}.{attempt}" / "claim.json"

    def _failure(self, run: Planned) -> Path:
        return self._failed / f"{run.id}.json"


class Claim:
    """A run that this process holds until it lets go; a thread touches the claim meanwhile.

    As a context it is released at the end. If the process has stalled for longer than the lease, another may have taken
    the run over: `lost` turns true at the next touch, and nothing more may be written for the run. Until then, a sixth
    of a lease, two may be at it: ask held() before writing what says that the run has finished.
    """

    def __init__(self, run: Planned, path: Path, failure: Path, lease: float, owner: dict[str, Any]):
        self.run = run
        self._path, self._failure, self._lease, self._owner = path, failure, lease, owner
        self._lost, self._released = threading.Event(), threading.Event()
        threading.Thread(target=self._beat, name=f"claim {run.name}", daemon=True).start()

    @property
    def lost(self) -> bool:
        """Whether the run has been found to be another's."""
        return self._lost.is_set()

    def held(self) -> bool:
        """Whether the run is still ours, asked of the disk."""
        try:
            owner, ended, _ = _read_claim(self._path)
            ours = not ended and owner in (self._owner, {})  # one that cannot be read was ours
        except FileNotFoundError:  # removed, and another may have taken the run in its place
            ours = False
        if not ours:
            self._lost.set()
        return ours

    def fail(self, reason: str) -> None:
        """The run cannot be done; it is not taken again before Ledger.retry()."""
        if self.held():
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            files.write_json(self._failure, {"reason": reason, "when": when, "host": socket.gethostname()})
        self.release()

    def release(self) -> None:
        """Let go: of a run that is finished, or so that others can go on with it at once."""
        if not self._released.is_set():
            self._released.set()
            try:
                if self.held():
                    _end(self._path, "finished" if self.run.finished else "released")
            except OSError:  # such as a disk that has no room for the word: let it look old
                with suppress(OSError):
                    os.utime(self._path, (0, 0))

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    def _beat(self) -> None:
        touched = time.monotonic()
        while not self._released.wait(self._lease / BEATS) and not self.lost:
            try:
                if self.held():
                    os.utime(self._path)
                    touched = time.monotonic()
            except OSError:  # the file server is away; after a lease others may think that we are
                if time.monotonic() - touched > self._lease:
                    self._lost.set()


def seconds_left(table: list[Row]) -> float | None:
    """An estimate: the mean time of the finished runs of the same method for each, or else of the same verb, over the
    workers at it now; None where a verb has none."""
    done: dict[str, list[float]] = {}
    for row in table:
        if row.status.state == "finished" and row.seconds:
            for kind in {row.run.verb, _method(row)}:
                done.setdefault(kind, []).append(row.seconds)
    left = [r for r in table if r.run.verb != "poison" and r.status.state in ("waiting", "running")]
    if not all(row.run.verb in done for row in left):
        return None
    usual = [mean(done.get(_method(row), done[row.run.verb])) for row in left]
    seconds = sum(max(0.0, mine - (row.seconds or 0.0)) for mine, row in zip(usual, left, strict=True))
    return seconds / max(1, len({row.status.who for row in left if row.status.state == "running"}))


def _method(row: Row) -> str:
    return getattr(row.run.config, "method", row.run.verb)


def _row(run: Planned, status: Status, now: float) -> Row:
    """Seconds are those of the run when it is finished, else since it was claimed."""
    seconds = max(0.0, now - status.since) if status.state == "running" else None
    if run.verb == "poison":
        return Row(run, status, seconds)
    if status.state == "finished":
        with suppress(OSError, UserError):
            seconds = _number(read_json(run.product, "").get("seconds"))
    last = _last_line(run.out / "metrics.jsonl")
    return Row(run, status, seconds, *(_number(last.get(key)) for key in ("step", "epoch", "top1", "asr")))


def _last_line(path: Path) -> dict[str, Any]:
    """The last line of a .jsonl file that is an object, whole; {} where there is none."""
    with suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        for line in reversed(file.read().splitlines()):
            with suppress(ValueError, RecursionError):
                if isinstance(row := json.loads(line), dict):
                    return row
    return {}


def _number(value: Any) -> float | None:
    """The value, of a file that may be damaged; None where it is not a finite number."""
    with suppress(OverflowError):  # of a whole number beyond all floats
        return value if isinstance(value, int | float) and math.isfinite(value) else None
    return None


def _version(folder: Path, number: int) -> Path:
    return folder / f"study.{number}" / "study.json"


def check_place(folder: Path) -> None:
    """Raise a UserError where the study names files, or code, that lie in the folder it was begun in, and not here."""
    begun, names = _names_in(folder)
    for file, name in names.items():
        if begun and (begun / file).is_file() and not os.path.exists(file):
            raise UserError(
                f"{folder} holds a study that was begun in {begun} and names {name}, which is not in {os.getcwd()}: go "
                f"on with it in {begun}."
            )


def _names_in(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """Return the folder that the study was begun in, and the names in it that may be of files, by the file of each.

    None for the folder where that is not recorded: by an older version, or in a damaged file, of which others tell.
    """
    try:
        version = read_json(_version(folder, 1), "")
        begun, study, runs = Path(version["begun_in"]), version["study"], version["study"]["pretrained"]
    except (UserError, OSError, KeyError, TypeError):
        return None, {}
    texts = list(_texts(study))
    code = {f"{text.partition(':')[0].replace('.', '/')}.py": text for text in texts if ":" in text}
    return begun, code | {text: text for text in texts if Path(text).suffix} | {f"{r}/config.json": r for r in runs}


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _versions(folder: Path) -> list[dict[str, Any]]:
    found = []
    while (path := _version(folder, len(found) + 1)).exists():
        found.append(_read_version(path))
    return found


def _read_version(path: Path) -> dict[str, Any]:
    """Return {"study": the study's values, "runs": [{"id", "name", "verb", ...}]}. UserError where it is damaged."""
    remedy = f"put back a copy, or remove {path.parent} and name the study again with --study"
    version = read_json(path, remedy)
    try:
        study, runs = study_of(version["study"]), [(run["id"], run["name"], run["verb"]) for run in version["runs"]]
        searched = [(entry["model"], entry["seed"]) for entry in study.searched]
        for name in (study.name, *(name for names in (*runs, *searched) for name in names)):
            if not isinstance(name, str | int):
                raise TypeError(f"{name!r} is not a name")
    except (UserError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} does not hold a study ({type(error).__name__}: {error}): {remedy}.") from None
    return version


def _reason(path: Path) -> str:
    """Why a run failed; FileNotFoundError where it has not."""
    try:
        reason = read_json(path, "")["reason"]
        if isinstance(reason, str):
            return reason
    except (UserError, KeyError, TypeError):
        pass
    return f"{path} cannot be read: try the run again with --retry"


def _create(path: Path, value: dict[str, Any]) -> bool:
    """Make the file together with its folder, whole from the start; False where there is one."""
    try:
        with files.new_folder(path.parent) as new:
            (new / path.name).write_text(json.dumps(value, indent=2))
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _difference(earlier: Planned | None, now: Planned) -> str:
    if earlier is None:
        return "another version of fastbd"
    before, after = material(earlier.config), material(now.config)
    flags = [f for f in vars(now.config) if before.get(f) != after.get(f) and f != "plan"]
    told = [f"{flag} {getattr(earlier.config, flag)}, now {getattr(now.config, flag)}" for flag in flags]
    return "; ".join(told) or "another start"


def _read_claim(path: Path) -> tuple[dict[str, Any], str, float]:
    """(owner, how it ended or "", when it was last touched); opened, as NFS then asks the server.

    The owner is {} where the file is damaged. A word that a full disk has cut is not an end.
    """
    with open(path, errors="replace") as file:
        text, touched = file.read(), os.fstat(file.fileno()).st_mtime
    owner: Any = None
    with suppress(ValueError, RecursionError):
        owner, _ = json.JSONDecoder().raw_decode(text)
    ended = next((line for line in text.splitlines() if line in ENDS), "")
    return owner if _is_owner(owner) else {}, ended, touched


def _is_owner(value: Any) -> bool:
    """Whether the value is what _owner() gave and when, as far as types tell."""
    kinds = {"host": str, "pid": int, "started": int | None, "kernel": str | None, "since": float | int}
    if not isinstance(value, dict) or not all(isinstance(value.get(key, ...), kind) for key, kind in kinds.items()):
        return False
    return 0 < value["pid"] < 1 << 31 and _number(value["since"]) is not None


def _touched(path: Path) -> float:
    """When the file or folder last changed; long ago where it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _end(path: Path, how: str) -> None:
    """Write how a claim ended below what is there already; the first word counts."""
    with open(os.open(path, os.O_WRONLY | os.O_APPEND), "a") as file:  # not made again where it has been removed
        file.write(f"\n{how}")


def _owner() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "kernel": _kernel()}


def _is_gone(owner: Mapping[str, Any]) -> bool:
    """Whether the process is known to have ended: that can be told only on its own machine, and on Linux."""
    kernel = _kernel()
    if kernel is None or owner.get("kernel") != kernel:
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, which /proc may hide
        return False
    return _started(owner["pid"]) != owner["started"]


def _kernel() -> str | None:
    """What process ids are of: this boot of this machine, and the container."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """When a process began, in ticks since the boot (proc(5)), so that an id that is used again is told apart."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # Of a process that is killed the first thread may have ended, and another still hold its files.
        ended = state in "ZX" and len(os.listdir(f"/proc/{pid}/task")) == 1
    except OSError:
        return None
    return None if ended else int(fields[18])
