"""fastbd doctor: what this machine has, and what that means for each part of the work."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from fastbd.base.console import console
from fastbd.base.errors import UserError
from fastbd.base.files import check_out
from fastbd.config.flags import DoctorConfig

if TYPE_CHECKING:
    import numpy as np

    from fastbd.data.beton import Beton
    from fastbd.data.shards import Shards

SHOWN = 5  # damaged rows that are named
Finding = tuple[str, str]  # what was found; what it means


def run(config: DoctorConfig) -> int:
    """Print what is here and which path each part takes; 0 whatever is missing. With --data verify that instead."""
    if config.data or config.out:
        return _verify(config)
    for title, columns, probes in (
        ("This machine", ("what", "found", "what it means"), MACHINE),
        ("Paths taken", ("part", "path", "why"), PATHS),
    ):
        table = Table(*columns, title=title, title_justify="left", show_lines=False)
        for what, (found, meaning) in findings(probes).items():
            table.add_row(what, found, meaning)
        console.print(table)
    return 0


def _verify(config: DoctorConfig) -> int:
    """Print what the data sets are and whether their rows are whole. UserError where some are not."""
    from fastbd.commands.demo_data import located
    from fastbd.data.shards import open_beton
    from fastbd.data.verify import said_of

    paths = located(config).data or ()
    if config.out and len(paths) != 1:
        raise UserError("--out is a list of the rows of one --data that are whole: give one.")
    if config.out and config.out.exists():
        raise UserError(f"{config.out} exists already: name another file with --out.")
    if config.out:
        check_out(config.out, name="whole.rows")
    problems = []
    for path in paths:
        data = open_beton(path)
        damaged = _look_at(data, config.out)
        if len(damaged):
            problems.append(said_of(data, damaged, len(data), config.out))
    if problems:
        raise UserError("; ".join(problem.removesuffix(".") for problem in problems) + ".")
    return 0


def _look_at(data: Beton | Shards, out: Path | None) -> np.ndarray:
    """Print what there is to say of a data set; return its damaged rows, and write a list of the others to `out`."""
    import numpy as np

    from fastbd.data.rows import write_rows
    from fastbd.data.verify import damaged_rows

    rows = np.arange(len(data))
    damaged = damaged_rows(data, rows) if data.has_checksums else rows[:0]
    first = ", ".join(f"{row} (row_id {data.row_id[row]})" for row in damaged[:SHOWN].tolist())
    more = ", ..." if len(damaged) > SHOWN else ""
    state = "none: its content cannot be verified; build it again to have them" if not data.has_checksums else "yes"
    told = {"file": data.path, "rows": f"{len(data):,}", "fingerprint": data.fingerprint, "checksums": state}
    if data.has_checksums:
        told["damaged"] = f"{len(damaged):,}" + (f": rows {first}{more}" if first else "")
    for name, value in told.items():
        console.print(f"{name:<14}{value}", markup=False)
    if out and data.has_checksums:
        whole = np.setdiff1d(rows, damaged)
        write_rows(out, whole, data.fingerprint, f"without the {len(damaged):,} that are damaged")
        console.print(f"wrote {out}: {len(whole):,} rows, for --rows-file of pretrain and clean", markup=False)
    return damaged


def findings(probes: dict[str, Callable[[], Finding]]) -> dict[str, Finding]:
    """What each probe finds; a probe that fails is a finding too."""
    found = {}
    for what, probe in probes.items():
        try:
            found[what] = probe()
        except Exception as error:  # a broken library may raise anything, and the others are still worth knowing
            found[what] = ("broken", f"{type(error).__name__}: {error}")
    return found


def _python() -> Finding:
    return f"{platform.python_version()} in {sys.prefix}", "3.11 or later is needed"


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} usable of {os.cpu_count()}", "decoding threads"


def _memory() -> Finding:
    from fastbd.data.resident import free_memory

    free = free_memory()
    images = free // 4 // (224 * 224 * 3)
    return f"{free / 2**30:.1f} GiB free", f"a quarter of it keeps {images:,} decoded images of 224 px (--resident)"


def _driver() -> Finding:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return "none", "no nvidia-smi on the path: no NVIDIA driver; everything runs on the CPU"
    if done.returncode:
        return "broken", (done.stdout + done.stderr).strip().splitlines()[0]
    return done.stdout.strip(), "name, memory, driver"


def _torch() -> Finding:
    import torch

    threads = torch.get_num_threads()
    return torch.__version__, f"{threads} thread{'s' * (threads != 1)} on the CPU"


def _cuda() -> Finding:
    import torch

    if torch.version.cuda is None:
        return "none", "this torch is built for the CPU; for a GPU install the build from pytorch.org"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, no GPU", "no driver, one too old, or CUDA_VISIBLE_DEVICES hides the GPU"
    count = torch.cuda.device_count()
    found = f"{torch.version.cuda}, {count} x {torch.cuda.get_device_name()}"
    return found, "used by default" if count == 1 else "the first is used; torchrun uses all"


def _package(module: str, package: str, here: str, missing: str) -> Callable[[], Finding]:
    """A probe that imports `module` and so knows that its libraries load too."""

    def probe() -> Finding:
        try:
            found = version(package)
        except PackageNotFoundError:
            return "none", missing
        importlib.import_module(module)
        return found, here

    return probe


def _wordnet() -> Finding:
    from fastbd.data.eda import synonyms_source

    source = synonyms_source()
    if source == "none":
        return "none", "for synonyms: apt-get install wordnet-base, or pip install nltk and nltk.download('wordnet')"
    return source, "synonyms of the second text views"


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _decode() -> Finding:
    from fastbd.data.decode import open_decoder

    name = open_decoder("auto", 1, _device()).name
    return f"{name} on {_device() if name == 'dali' else 'cpu'}", "dali where it is installed; --decode changes it"


def _augment() -> Finding:
    from fastbd.kernels import augment_native, native

    if _device() == "cuda":
        return "Triton on cuda", "views are made from decoded images while the step before runs"
    if ways := augment_native.ways():
        return f"C++ ({ways[-1]}) on cpu", "views are made from decoded images while the step before runs"
    why = "FASTBD_NATIVE=0 leaves out" if native.is_left_out() else "install again with a C++ compiler for"
    return "PyTorch on cpu", f"{why} the compiled library, which is some four times as fast"


def _losses() -> Finding:
    from fastbd.kernels.contrastive import SMALL, TRITON

    if _device() == "cuda" and TRITON:
        return "Triton on cuda", f"in two launches up to {SMALL} pairs, by tiles above"
    return f"PyTorch on {_device()}", "by blocks of rows where logits are many; the kernels need a GPU and Triton"


def _precision() -> Finding:
    import torch

    from fastbd.models.precision import has_bf16, set_precision

    name = set_precision("auto", torch.device(_device()))
    if _device() == "cpu" and has_bf16():
        return "fp32 or bf16", "a training measures which is faster, and all else is fp32; --precision changes it"
    if name == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return name, "this GPU only emulates it: --precision fp32 is likely faster"
    return name, "bf16 on a GPU, fp32 on a CPU that has no instructions for it; --precision changes it"


def _step() -> Finding:
    import torch

    from fastbd.base.dist import World
    from fastbd.kernels import native
    from fastbd.models.precision import is_captured, is_compiled

    world = World(0, 1, torch.device(_device()))
    if not is_compiled("auto", world):
        built = all(map(native.library, ("batchnorm", "attention")))
        how = "eager, norms and captions' attention in C++" if built else "eager, nothing of it compiled"
        return how, "on a GPU towers are compiled and the step is one CUDA graph; --compile on works here too"
    captured = ", captured in a CUDA graph" if is_captured("auto", world) else ""
    return f"compiled{captured}", "--compile off or fused and --graph off change it; several GPUs run without the graph"


def _text_views() -> Finding:
    if _wordnet()[0] == "none":
        return "EDA without synonyms", "no WordNet: only swaps and deletions change a caption"
    return "EDA, all four operations", f"synonyms from {_wordnet()[0]}"


MACHINE = {
    "Python": _python,
    "CPU cores": _cores,
    "memory": _memory,
    "GPU, driver": _driver,
    "torch": _torch,
    "CUDA": _cuda,
    "Triton": _package("triton", "triton", "compiles GPU kernels", "not needed on a CPU"),
    "DALI": _package(
        "nvidia.dali", "nvidia-dali-cuda130", "decodes JPEG", "pip install nvidia-dali-cuda130 decodes JPEG faster"
    ),
    "simplejpeg": _package(
        "simplejpeg",
        "simplejpeg",
        "decodes JPEG with --decode pil",
        "Pillow alone is slower: pip install simplejpeg",
    ),
    "FFCV": _package("ffcv", "ffcv", "decodes JPEG with --decode ffcv", "not needed; `make ffcv` adds it"),
    "tokenizer": _package("tokenizers", "tokenizers", "tokenises captions", "pip install tokenizers"),
    "WordNet": _wordnet,
}
PATHS = {
    "decode": _decode,
    "augment": _augment,
    "losses": _losses,
    "precision": _precision,
    "step": _step,
    "second text views": _text_views,
}
