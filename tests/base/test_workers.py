from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from forked import forked

from fastbd.base.errors import UserError
from fastbd.base.workers import WorkerDied, map_in_order

pytestmark = pytest.mark.process


def square(task: int) -> int:
    return task * task


def die_at_five(task: int) -> int:
    if task == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


@pytest.mark.parametrize(("tasks", "workers"), [(0, 2), (7, 2), (7, 3), (2, 9)])
def test_results_come_in_order(tasks, workers):
    assert list(map_in_order(square, range(tasks), workers)) == [i * i for i in range(tasks)]


def test_the_server_imports_what_this_process_would_and_not_what_lies_in_the_working_folder(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "of_both.py").write_text(f"open({str(tmp_path / 'from')!r}, 'w').write({place!r})")
    (tmp_path / "program.py").write_text(
        "from fastbd.base.workers import forking, preload\n"
        "if __name__ == '__main__':\n"
        "    preload('of_both')\n"
        "    process = forking().Process(target=int)\n"
        "    process.start(), process.join()\n"
    )
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "there"), *sys.path])}
    program = [sys.executable, tmp_path / "program.py"]
    subprocess.run(program, cwd=tmp_path / "here", env=os.environ | path, check=True)
    assert (tmp_path / "from").read_text() == "there"


def crash(task: int) -> int:
    os.kill(os.getpid(), signal.SIGSEGV)
    return task


def leave(task: int) -> int:
    os._exit(3)


class Unsendable(Exception):
    def __init__(self, one: str, two: str):
        super().__init__(f"{one} and {two}")


def fail(task: int) -> int:
    raise {0: UserError("give another"), 1: KeyError("lost"), 2: Unsendable("this", "that")}[task]


def test_a_dead_worker_is_told():
    seen = []
    message = "died of SIGKILL, most likely for want of memory: run with fewer --workers"
    with closing(map_in_order(die_at_five, range(9), 2)) as results, pytest.raises(WorkerDied, match=message):
        for result in results:
            seen.append(result)
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("work", "how"), [(crash, "of SIGSEGV"), (leave, "with exit code 3")])
def test_memory_is_blamed_for_nothing_else(work, how):
    with pytest.raises(WorkerDied, match=f"^a worker process died {how}: run the same command again$"):
        list(map_in_order(work, [0, 1], 2))


@pytest.mark.parametrize(
    ("task", "kind", "text"),
    [(0, UserError, "give another"), (1, KeyError, "'lost'"), (2, RuntimeError, "Unsendable: this and that")],
)
def test_what_a_worker_raises_is_raised(task, kind, text):
    with pytest.raises(kind) as raised:
        list(map_in_order(fail, [task, task], 2))
    assert str(raised.value) == text and "in fail" in raised.value.__notes__[0]


@pytest.mark.parametrize(("tasks", "workers"), [([3, 1, 2], 1), ([7], 4), ([], 0)])
def test_where_one_worker_is_enough_this_process_is_it(tasks, workers):
    done = []

    def work(task: int) -> int:  # which no other process could be sent
        done.append(task)
        return os.getpid()

    for count, pid in enumerate(map_in_order(work, tasks, workers), 1):
        assert pid == os.getpid() and done == tasks[:count]  # each when it is asked for
    assert done == tasks


def test_what_this_process_raises_is_as_it_was():
    with pytest.raises(Unsendable, match="this and that"):
        list(map_in_order(fail, [2], 1))


def test_ctrl_c_while_the_server_of_the_workers_starts_shows_no_traceback(study):
    """A terminal sends it to all of a group, also to what is still importing."""
    command = [sys.executable, "-m", "fastbd", "build", "--source", "train.csv", "--out", "stopped.beton"]
    build = subprocess.Popen(command, cwd=study, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = Path(f"/proc/{build.pid}/task/{build.pid}/children")
    while build.poll() is None and len(children.read_text().split()) < 2:  # Python's resource tracker is the first
        time.sleep(0.005)
    os.killpg(build.pid, signal.SIGINT)
    assert build.communicate(timeout=60)[1] == "stopped.\n"
    assert build.returncode == 128 + signal.SIGINT and not (study / "stopped.beton").exists()


def wait(folder: Path, task: int) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def waiting(folder: Path) -> None:
    list(map_in_order(partial(wait, folder), range(4), 2))


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """Also in the middle of a long task."""
    parent = forked(waiting, tmp_path, cwd=tmp_path)
    until = time.monotonic() + 60
    while len(pids := [path.name for path in tmp_path.iterdir()]) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    parent.kill()
    parent.join()
    while any(map(lives, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(lives, pids))


def lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
