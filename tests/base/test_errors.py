"""What lies with the machine, and what with the work."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch

from fastbd.base.errors import UserError, lacks_memory, machine_fault
from fastbd.base.workers import WorkerDied, map_in_order


def chained(error: Exception, *causes: BaseException) -> Exception:
    """The error with its causes, each that of the one before; every other one is only its context."""
    at = error
    for k, cause in enumerate(causes):
        setattr(at, ("__cause__", "__context__")[k % 2], cause)
        at = cause
    return error


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "ESTALE", "ENOMEM"])
def test_disks_and_memory_are_the_machines(name):
    fault = OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "/data/x")
    assert machine_fault(fault) is fault
    assert machine_fault(chained(UserError("x"), fault)) is fault
    assert machine_fault(chained(UserError("x"), RuntimeError("y"), KeyError("z"), fault)) is fault


def test_the_rest_is_the_works():
    for error in (
        OSError(errno.ENOENT, "no such file"),
        OSError(errno.EACCES, "permission denied"),
        OSError("timed out"),
        UserError("the disk: no space left on device"),
        KeyError("model"),
        RuntimeError("CUDA error: out of memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        ZeroDivisionError(),
    ):
        assert machine_fault(error) is None
        assert machine_fault(chained(UserError("x"), error)) is None
    round_about = chained(UserError("x"), KeyError("y"))
    round_about.__cause__.__context__ = round_about
    assert machine_fault(round_about) is None


def test_memory_as_pytorch_and_numpy_tell_of_it():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert machine_fault(raised.value) is raised.value and lacks_memory(raised.value)
    with pytest.raises(MemoryError) as raised:
        bytearray(1 << 60)
    assert machine_fault(raised.value) is raised.value and lacks_memory(raised.value)
    assert lacks_memory(OSError(errno.ENOMEM, "x")) and not lacks_memory(OSError(errno.ENOSPC, "no space left"))


def die(task: int) -> None:
    os.kill(os.getpid(), task)


@pytest.mark.parametrize(("signum", "found"), [(9, MemoryError), (11, type(None))])
def test_a_worker_that_is_killed_wanted_memory(signum, found):
    with pytest.raises(WorkerDied) as raised:
        list(map_in_order(die, [signum, signum], 2))
    assert type(machine_fault(raised.value)) is found


def test_a_checkpoint_for_which_there_is_no_room(tmp_path):
    """By a limit of the size of files, in a process of its own."""
    code = f"""
import resource, torch
from pathlib import Path
from fastbd.training import checkpoint
from fastbd.base.errors import UserError, machine_fault
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    checkpoint.save(Path({str(tmp_path / "ckpt.pt")!r}), {{"x": torch.zeros(1 << 20)}})
except UserError as error:
    print(type(machine_fault(error)).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "OSError\n", done.stderr


def test_a_folder_on_a_disk_that_is_read_only(tmp_path, read_only):
    code = f"""
from pathlib import Path
from fastbd.base.files import check_out
from fastbd.base.errors import UserError, machine_fault
try:
    check_out(Path({str(tmp_path / "x")!r}))
except UserError as error:
    print(machine_fault(error).strerror)
"""
    assert read_only(tmp_path, sys.executable, "-c", code).stdout == "Read-only file system\n"
