"""A script in several processes that know one another, as those that torchrun starts."""

from __future__ import annotations

import os
import runpy
import socket
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from forked import end, forked

import fastbd

PROGRAM = Path(fastbd.__file__).with_name("__main__.py")  # the command line, as a script
SECONDS = 300


def together(script: Path, size: int, *words: Any, cwd: Path | None = None) -> list[str]:
    """Return what each of `size` processes that run a script with these words says; all must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    world |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(script), *map(str, words)]
    with TemporaryDirectory() as folder:
        said = [Path(folder) / str(rank) for rank in range(size)]
        processes = [
            forked(_run, command, world | {"RANK": str(rank)}, cwd=cwd or Path.cwd(), said=said[rank])
            for rank in range(size)
        ]
        try:
            for process in processes:
                process.join(SECONDS)
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                end(process)
        outputs = [path.read_text() for path in said]
    assert codes == size * [0], "\n".join(outputs)
    return outputs


def _run(command: list[str], world: dict[str, str]) -> None:
    """Be one of them."""
    os.environ.update(world)
    sys.argv = command
    sys.path.insert(0, os.path.dirname(command[0]))
    runpy.run_path(command[0], run_name="__main__")
