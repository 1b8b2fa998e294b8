from __future__ import annotations

import os
import signal
from contextlib import closing

import pytest

from fastbd.data.workers import WorkerDied, map_in_order


def square(task: int) -> int:
    return task * task


def die_at_five(task: int) -> int:
    if task == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


@pytest.mark.parametrize(("tasks", "workers"), [(0, 2), (1, 4), (7, 1), (7, 3)])
def test_results_come_in_order(tasks, workers):
    assert list(map_in_order(square, range(tasks), workers)) == [i * i for i in range(tasks)]


def test_a_dead_worker_is_told():
    seen = []
    with closing(map_in_order(die_at_five, range(9), 2)) as results, pytest.raises(WorkerDied, match="fewer --workers"):
        for result in results:
            seen.append(result)
    assert seen == [0, 1, 2, 3, 4]
