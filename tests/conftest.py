"""What several tests share: a small study of the demo's pictures, the command line, processes that know one another."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest.mock import patch

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # of which there is one a core
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else it starts as many processes, which load torch
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does; read when torch is loaded

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; read when a kernel is defined

import command_line
import ranks
from soak.small import write_data

from fastbd.training import roofline

pytest_plugins = ["fake_runs"]

# A shell's job in the background ignores Ctrl-C, and one under nohup a lost terminal; the tests send both.
for ignored, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, usual)


def pytest_configure() -> None:
    """Stop at once where no interpreted kernel could run: Triton 3.6 is what torch 2.11 comes with."""
    try:
        triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    except PackageNotFoundError:
        return  # the tests of kernels are left out
    if os.environ.get("TRITON_INTERPRET") == "1" and triton < (3, 7) and numpy >= (2, 4):
        raise pytest.UsageError(
            "without a GPU the tests run kernels in Triton's interpreter, and that of Triton 3.6 cannot loop with "
            'NumPy 2.4: pip install "numpy<2.4", or triton>=3.7 where torch allows it.'
        )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each file to one worker, so that it makes its fixtures once, and first all tests of processes to another.

    Those time leases, and wait for signals and for processes that die: they get on with one another one by one.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    items.sort(key=lambda item: item.get_closest_marker("process") is None)
    for item in items:
        group = "process" if item.get_closest_marker("process") else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish() -> None:
    """Leave what has been collected, some three thousand tests, out of every search for garbage from here on."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked gpu("why", count=1) where there are not so many."""
    mark = item.get_closest_marker("gpu")
    if mark and torch.cuda.device_count() < (count := mark.kwargs.get("count", 1)):
        pytest.skip(": ".join((f"needs {count} GPU{'s' * (count > 1)}", *mark.args)))


@pytest.fixture(scope="session", autouse=True)
def _cheap_rates() -> Iterator[None]:
    """Each training measures the machine, for half a second: how fast it is does not matter here."""
    with patch.dict(roofline.SIDES, cpu=(64,)), patch.dict(roofline.COPIED, cpu=1 << 16):
        yield


@pytest.fixture(scope="session")
def fastbd():
    """fastbd(*words, cwd=, code=0) runs a command line within this process; see tests/command_line.py."""
    return command_line.fastbd


@pytest.fixture(scope="session")
def fastbd_process():
    """fastbd_process(*words, cwd=, code=0, launcher=()) runs one in a process of its own."""
    return command_line.fastbd_process


READ_ONLY = """
mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit 77
cd "$PWD"  # else this is still the folder before
shift
exec "$@"
"""


@pytest.fixture
def read_only():
    """read_only(folder, *command) runs a command to which the folder is on a file system that is read-only."""

    def run(folder: Path, *command, **options) -> subprocess.CompletedProcess:
        command = ["unshare", "-rm", "sh", "-c", READ_ONLY, "sh", str(folder), *map(str, command)]
        done = subprocess.run(command, capture_output=True, text=True, **options)
        if done.returncode == 77 or done.stderr.startswith("unshare: "):
            pytest.skip("needs the right to mount")
        return done

    return run


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Path:
    """A folder with train.beton (240 pairs), train.poison.json (24 of them), val.beton (60 labelled images)."""
    folder = tmp_path_factory.mktemp("study")
    write_data(folder)
    return folder


@pytest.fixture(scope="session")
def together():
    """together(script, size, *words, cwd=) runs a script in processes that know one another; see tests/ranks.py."""
    return ranks.together
