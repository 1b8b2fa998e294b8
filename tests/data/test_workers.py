from __future__ import annotations

import os
import signal
from contextlib import closing

import pytest

from fastbd.data.workers import WorkerDied, map_in_order
from fastbd.errors import UserError


def square(task: int) -> int:
    return task * task


def die_at_five(task: int) -> int:
    if task == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


@pytest.mark.parametrize(("tasks", "workers"), [(0, 2), (1, 4), (7, 1), (7, 3)])
def test_results_come_in_order(tasks, workers):
    assert list(map_in_order(square, range(tasks), workers)) == [i * i for i in range(tasks)]


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
        list(map_in_order(work, [0], 1))


@pytest.mark.parametrize(
    ("task", "kind", "text"),
    [(0, UserError, "give another"), (1, KeyError, "'lost'"), (2, RuntimeError, "Unsendable: this and that")],
)
def test_what_a_worker_raises_is_raised(task, kind, text):
    with pytest.raises(kind) as raised:
        list(map_in_order(fail, [task], 1))
    assert str(raised.value) == text and "in fail" in raised.value.__notes__[0]
