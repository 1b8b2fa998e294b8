"""python -m bench.imports DEVICE NAME ...: import these modules, and say what this machine has.

Exit code 2 when something is missing, one line on each: a module, the GPU, or what Triton needs to start a kernel.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import packages_distributions, version
from types import ModuleType


def main(device: str, names: list[str]) -> int:
    modules, missing = {}, []
    for name in names:
        try:
            modules[name] = import_module(name)
        except Exception as error:  # a library that does not load is an OSError; an unfit version may raise anything
            missing.append(f"{name} ({type(error).__name__}: {error})")
    packages = packages_distributions()
    found = ", ".join(f"{name} {version_of(name, module, packages)}" for name, module in modules.items())
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {found}", flush=True)
    if device == "cuda" and {"torch", "triton"} <= set(modules):
        missing += missing_on_gpu()
    for what in missing:
        print(f"missing: {what}", flush=True)
    if missing:
        print("PYTHONPATH is kept: it may name a folder with packages that are not installed.", flush=True)
    return 2 if missing else 0


def version_of(name: str, module: ModuleType, packages: Mapping[str, list[str]]) -> str:
    """The version of the package that a module comes from."""
    origins = set(packages.get(name.partition(".")[0], ()))
    return version(origins.pop()) if len(origins) == 1 else getattr(module, "__version__", "of an unknown version")


def missing_on_gpu() -> list[str]:
    """What is missing for a kernel to run, a line each; prints the GPU's name, driver and memory."""
    import torch
    from triton.runtime import driver

    from bench import records

    if not torch.cuda.is_available():
        return ["a GPU (torch sees none on this machine)"]
    torch.ones(1, device="cuda").item()
    free, total = (count / 2**30 for count in torch.cuda.mem_get_info())
    print(f"{torch.cuda.get_device_name()}, driver {records.driver()}, {free:.0f} of {total:.0f} GiB free", flush=True)
    try:
        driver.active.get_current_target()  # builds Triton's own extension
    except Exception as error:
        return [f"what Triton builds with, a C compiler and Python's headers ({type(error).__name__}: {error})"]
    return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
