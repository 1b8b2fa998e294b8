"""python -m bench codegen: count launches and memory traffic in the code that torch.compile makes of a step's towers.

The code is that for an H200 in bf16 with channels_last, as the trainer compiles it, forward and backward; no GPU is
needed, g++ is. Time and registers are not known from code; a library's call is one launch here, whatever it runs, and
attention is one. Patterns that Inductor tries out on the device, such as padding of matrices, are left out.
Rows go to bench/results/codegen.csv, in place of those of the same step and torch; RN50 takes minutes a row.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from bench.captions import lengths
from bench.inductor.count import SMALL, Launch, launches
from bench.inductor.device import WORKS_WITH, build_guard
from bench.records import RESULTS, triton_version
from fastbd.kernels.text_pack import room_for
from fastbd.models import create
from fastbd.training.roofline import image_ops, text_ops

PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Towers:
    """What is compiled. A batch is `views` images and captions of each pair; batch norm takes groups of `group` images
    (0: all together); `fused` as for --compile fused."""

    model: str
    pairs: int
    views: int = 1
    group: int = 0
    fused: bool = False

    def __str__(self) -> str:
        group = f", groups of {self.group}" if self.group else ""
        return f"{self.model} {self.pairs} x {self.views}{group}{', fused' if self.fused else ''}"


CASES = (
    Towers("tiny-rn", 8),
    Towers("demo", 64),
    Towers("demo", 64, views=2, fused=True),
    Towers("rn50", 128),
    Towers("rn50", 128, fused=True),
    Towers("rn50", 128, views=2),
    Towers("rn50", 128, views=2, fused=True),
    Towers("rn50", 128, group=32),
    Towers("vit-b-32", 128),
)


class Unable(Exception):
    """Why no code can be generated here."""


def main(words: list[str]) -> int:
    """Exit code 0; 2 where no code can be generated."""
    models = list(dict.fromkeys(case.model for case in CASES))
    parser = argparse.ArgumentParser(prog="python -m bench codegen", description="Count the compiled step's code.")
    parser.add_argument("--models", nargs="+", choices=models, default=models, help="of these only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of codegen.csv")
    parser.add_argument("--code", type=Path, help="keep the generated code in this folder")
    options = parser.parse_args(words)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    with TemporaryDirectory() as scratch:
        try:
            guard = prepare(Path(scratch))
            for case in CASES:
                if case.model in options.models:
                    folder = (options.code or Path(scratch)) / re.sub(r"\W+", "-", str(case))
                    generate(case, guard, folder)
                    rows = [count(case, name, (folder / f"{name}.py").read_text()) for name in PASSES]
                    keep(options.out / "codegen.csv", rows)
                    console.print(table(case, rows))
        except Unable as why:
            print(f"error: {why}", file=sys.stderr)
            return 2
    return 0


def prepare(folder: Path) -> Path:
    """The guard library, built into `folder`. Unable where this machine or this torch is not fit for it."""
    version = torch.__version__.split("+")[0]
    if version not in WORKS_WITH or torch.version.cuda or not triton_version():
        has = f"torch {torch.__version__} and {'no Triton' if not triton_version() else f'triton {triton_version()}'}"
        raise Unable(
            f"this bench is made for torch {', '.join(WORKS_WITH)} without CUDA, with Triton; here is {has}: "
            "see bench/inductor/device.py for what it relies on."
        )
    if not shutil.which("g++"):
        raise Unable("this bench compiles a small library with g++, and there is none: install it.")
    try:
        return build_guard(folder)
    except subprocess.CalledProcessError as error:
        raise Unable("g++ cannot compile bench/inductor/guard.cpp, for the reasons above.") from error


def generate(case: Towers, guard: Path, folder: Path) -> None:
    """Write forward.py and backward.py to `folder`, by a process that takes `guard` for a GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    words = (str(int(word) if isinstance(word, bool) else word) for word in asdict(case).values())
    command = [sys.executable, "-W", "ignore", "-m", "bench.inductor.generate", folder, *words]
    done = subprocess.run(command, env=os.environ | {"LD_PRELOAD": str(guard)}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no code for {case}:\n{done.stderr}")


def count(case: Towers, name: str, code: str) -> dict:
    """A row of the results: one pass of one case. Bytes are of one step."""
    found = launches(code)
    triton, library = ([launch for launch in found if launch.triton == which] for which in (True, False))

    def total(what: str, of: list[Launch]) -> int:
        return sum(getattr(launch, what) for launch in of)

    return asdict(case) | {
        "pass": name,
        "triton_launches": len(triton),
        "small_launches": sum(launch.bytes < SMALL for launch in triton),
        "library_launches": len(library),
        "convolutions": total("products", library),
        "layout_copies": total("layouts", library),
        "triton_bytes": total("bytes", triton),
        "fp32_bytes": total("fp32", triton),
        "library_bytes": total("bytes", library),
        "torch": torch.__version__.split("+")[0],
        "triton": triton_version(),
    }


def roofline_bytes(case: Towers) -> float:
    """Bytes of a step by the roofline, with the room that compiled captions take."""
    with torch.device("meta"):
        model = create(case.model, None)
    texts = case.views * case.pairs
    ops = [*image_ops(model.visual, model.image_size), *text_ops(model, room_for(lengths(), texts) / texts)]
    return 2 * texts * sum(op.elements for op in ops)


def keep(path: Path, rows: list[dict]) -> None:
    """Write rows to a table, in place of those of the same case and torch."""
    key = [*asdict(CASES[0]), "pass", "torch"]

    old = csv.DictReader(path.read_text().splitlines()) if path.exists() else ()
    found = {tuple(str(row[name]) for name in key): row for row in [*old, *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found.values())


def table(case: Towers, rows: list[dict]) -> Table:
    found = Table("", *PASSES, "both", title=str(case))
    for name in rows[0]:
        if not name.endswith(("launches", "convolutions", "copies", "bytes")):
            continue
        values = [*(row[name] for row in rows), sum(row[name] for row in rows)]
        if name.endswith("bytes"):
            name, values = name.replace("bytes", "MB"), [f"{value / 1e6:,.1f}" for value in values]
        found.add_row(name.replace("_", " "), *map(str, values))
    counted = sum(row["triton_bytes"] + row["library_bytes"] for row in rows)
    found.caption = f"{counted / roofline_bytes(case):.2f} times the bytes of the roofline"
    return found
