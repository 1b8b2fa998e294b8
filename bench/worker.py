"""python -P bench/worker.py MODULE DEVICE THREADS QUICK: make and run the cases of a bench as it is told to.

For each JSON line [WHAT, ARGUMENT ...] of the standard input one JSON line of the standard output answers; what
libraries print goes to the error output. Another tree's modules, older ones too, are used when it stands first on
PYTHONPATH: so nothing of this tree is imported.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench.case import Unavailable
from bench.measure import clock_of


class Worker:
    """Holds one case, and the call of one of its providers."""

    def __init__(self, module: str, device: str, quick: bool):
        self.module, self.device, self.quick = module, device, quick
        self.clock, self.items = clock_of(device), self.listed()
        self.made: Any = None
        self.call: Any = None

    def listed(self) -> Iterator[tuple]:
        """Names of cases, and what makes each. Older trees yield the cases, and make data on the way to the next."""
        for item in import_module(self.module).cases(self.device, self.quick):
            yield item if isinstance(item, tuple) else (item.name, lambda case=item: case)

    def names(self) -> list[str]:
        return [name for name, _ in self.listed()]

    def case(self, name: str) -> dict:
        """Make a case, and say what it is; of its providers those of the project's own."""
        self.made = self.call = None
        gc.collect()
        self.made = case = self.found(name)()
        if strangers := modules_from_elsewhere():
            raise RuntimeError(f"{', '.join(strangers)} of another tree would be measured")
        providers = {
            key: {"tolerance": provider.tolerance, "slow": getattr(provider, "slow", ""), "note": provider.note}
            for key, provider in case.providers.items()
            if provider.ours
        }
        return {"unit": case.unit, "units": case.units, "sizes": case.sizes, "providers": providers}

    def found(self, name: str):
        for _ in range(2):  # from where the last one was, then from the start
            for found, make in self.items:
                if found == name:
                    return make
            self.items = self.listed()
        raise KeyError(name)

    def build(self, provider: str) -> None:
        self.call = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        self.call = self.made.providers[provider].build()

    def run(self, path: str) -> None:
        """Save the outputs of a call, as it returns them."""
        torch.save({name: value.clone().cpu() for name, value in self.call().items()}, path)

    def seconds(self) -> float:
        return self.clock(self.call)


def modules_from_elsewhere() -> list[str]:
    """What an editable installation of another tree has given, as this one lacks it."""
    tree = Path.cwd().resolve()
    files = {
        name: getattr(module, "__file__", None)
        for name, module in sys.modules.items()
        if name.partition(".")[0] in ("bench", "fastbd")
    }
    return [name for name, file in files.items() if file and not Path(file).resolve().is_relative_to(tree)]


def main(module: str, device: str, threads: str, quick: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(threads))
    worker = Worker(module, device, quick == "True")
    for line in sys.stdin:
        what, *about = json.loads(line)
        try:
            answer = {"value": getattr(worker, what)(*about)}
        except Exception as error:
            absent = isinstance(error, (Unavailable, ImportError, torch.OutOfMemoryError))
            answer = {"error": str(error) if absent else f"{type(error).__name__}: {error}", "absent": absent}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
