"""Rows of results with their circumstances, in .csv files that grow."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.limits import Limits
from fastbd.base.environment import environment

RESULTS = Path(__file__).parent / "results"


def circumstances(limits: Limits) -> dict:
    """Device, driver, versions, commit, date, and the rates measured in the same run."""
    about = environment()
    about["commit"] = about["commit"] or os.environ.get("FASTBD_COMMIT")  # a copy of the tree has no history
    cuda = limits.device == "cuda"
    return {
        "device": about["gpu"] if cuda else processor(),
        "driver": driver() if cuda else None,
        **{f"{name}_tflops": round(rate / 1e12, 3) for name, rate in limits.matmul.items()},
        "copy_gbs": round(limits.bandwidth / 1e9, 1),
        "triton": triton_version(),
        **about,
    }


def processor() -> str:
    """The CPU's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else "cpu"


def driver() -> str | None:
    """Version of the GPU driver."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def triton_version() -> str | None:
    if not find_spec("triton"):
        return None
    import triton

    return triton.__version__


def file_for(device: str) -> str:
    """cpu.csv, or gpu-NAME.csv."""
    if device == "cpu":
        return "cpu.csv"
    return "gpu-" + re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-") + ".csv"


def rounded(row: dict) -> dict:
    """Five digits are more than a time is good for."""
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()}


def append(path: Path, rows: list[dict]) -> None:
    """Add rows to a .csv file. A column that the file lacks goes to its end, empty in the rows before."""
    if not rows:
        return
    old, columns = [], []
    if path.exists():
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            old, columns = list(reader), list(reader.fieldnames or [])
    wider = columns + [name for name in dict.fromkeys(name for row in rows for name in row) if name not in columns]
    if wider == columns:
        with open(path, "a", newline="") as file:
            csv.DictWriter(file, columns, lineterminator="\n").writerows(rows)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, wider, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(old + rows)
    os.replace(temporary, path)
