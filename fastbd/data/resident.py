"""Fill Pixels, so that images are decoded once: the choice of --resident, and the decoding."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import warnings
import weakref
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastbd import __version__
from fastbd.base.console import progress
from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.base.files import discard, sync
from fastbd.data.pairs import Pairs
from fastbd.data.pixels import PixelFile, Pixels, bytes_of

CHUNK = 256  # images decoded at once
CRC = np.dtype("<u4")
HEAD = 64  # bytes at the start of a file of pixels: a digest of all that they depend on


def keep(
    pairs: Pairs,
    rows: np.ndarray,
    where: str,
    *,
    base: bool,
    beside: bool = False,
    world: World,
    folder: Path | None = None,
    quiet: bool = False,
) -> str:
    """Decode the source images of `rows` once, for good, on the host; returns a line of text that says where they are.

    `where` is "gpu", "ram", "disk", "none" or "auto", the same on all ranks; the file of "disk" lies in `folder`, or
    else beside the data. With `base` only their base views are kept, S x S; with `beside` these too, in main memory for
    a run on the CPU, where all fills at most a quarter of it. UserError on all ranks for a place that one of them does
    not have, or where they do not fit.
    """
    sizes = np.full((len(rows), 2), pairs.size) if base else pairs.sizes(rows)
    need = int(bytes_of(sizes).sum())
    where, numbers = _choose(where, need, world)
    pairs.where = where
    if where == "none":
        return f"images are decoded in each epoch by {pairs.decoder.about}: {numbers}"
    pairs.decoder.device = "cpu"  # those that are not kept are decoded as those that are
    if where == "disk":
        path = pairs.beton.path.with_suffix(f".{pairs.size if base else 'whole'}.pixels")
        path = folder / path.name if folder else path
        kept = world.main_first(partial(_on_disk, path, pairs, rows, sizes, base, quiet))
        numbers = f"{need / 1e9:.2f} GB in {path}"
    else:
        squares = None
        if beside and where == "ram" and world.device.type == "cpu":
            more = len(rows) * 3 * pairs.size**2
            if 4 * (need + more) <= _free_memory(world):
                memory = torch.empty(more, dtype=torch.uint8)
                squares = Pixels(rows, len(pairs.beton), np.full((len(rows), 2), pairs.size), memory)
                numbers += f", and {more / 1e9:.2f} GB of base views"
        kept = Pixels(rows, len(pairs.beton), sizes, _memory(where, need, world.device))
        _fill(kept, pairs, base, quiet, squares)
        pairs.resident_squares = squares
    pairs.resident = kept
    return f"images are decoded once by {pairs.decoder.about}, --resident {where}: {numbers}"


def _choose(where: str, need: int, world: World) -> tuple[str, str]:
    """The place, which is there on every rank, and the numbers that led to it; those of the rank with the least."""
    device = world.device
    gpu = world.least(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0)
    ram = _free_memory(world)
    free = f"{ram / 1e9:.2f} GB free in memory" + (f", {gpu / 1e9:.2f} GB on the GPU" if gpu else "")
    if where == "auto":
        where = "gpu" if 2 * need <= gpu else "ram" if 4 * need <= ram else "none"
    elif where == "gpu" and not gpu:
        raise UserError("--resident gpu, but the run is on the CPU: give --resident ram or auto.")
    elif need > {"gpu": gpu, "ram": ram}.get(where, need):
        raise UserError(f"--resident {where} needs {need / 1e9:.2f} GB, of {free}: give --resident disk or none.")
    return where, f"{need / 1e9:.2f} GB decoded, {free}" + (" on each of the ranks" if world.size > 1 else "")


def _free_memory(world: World) -> int:
    """Bytes that each rank can still take, those of the one with the least."""
    return world.least(free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that programs can still take on this machine, and in the container around the process."""
    meminfo, group = root / "proc/meminfo", root / "sys/fs/cgroup"
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = 1024 * next(int(line.split()[1]) for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
    for folder, limit, used, cache in (
        (group, "memory.max", "memory.current", "inactive_file"),
        (group / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        if (folder / limit).exists() and (most := (folder / limit).read_text().strip()).isdigit():
            kinds = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            taken = int((folder / used).read_text()) - int(kinds.get(cache, 0))  # a cache of files makes room
            free = min(free, max(0, int(most) - taken))
    return free


def _memory(where: str, need: int, device: torch.device) -> Tensor:
    if where == "gpu":
        return torch.empty(need, dtype=torch.uint8, device=device)
    pixels = torch.empty(need, dtype=torch.uint8)
    if device.type == "cuda":  # locked in place, for the GPU to read; pin_memory() would round up to a power of two
        runtime: Any = torch.cuda.cudart()
        if (code := runtime.cudaHostRegister(pixels.data_ptr(), need, 0)) != runtime.cudaError.success:
            why = runtime.cudaGetErrorString(runtime.cudaError(code))
            raise UserError(
                f"{need / 1e9:.2f} GB of main memory cannot be locked for the GPU ({why}): give --resident gpu or none."
            )
        # Else what is allocated in its place would count as locked, and be copied from after it is freed.
        weakref.finalize(pixels, runtime.cudaHostUnregister, pixels.data_ptr())
    return pixels


def _fill(kept: Pixels, pairs: Pairs, base: bool, quiet: bool, squares: Pixels | None = None) -> None:
    starts = range(0, len(kept.rows), CHUNK)
    chunks = [kept.rows[start : start + CHUNK] for start in starts]
    with progress("decoding", len(kept.rows), quiet=quiet) as advance:
        for start, sources in zip(starts, pairs.sources(chunks, host=True), strict=True):
            images = [*pairs.squares(sources)] if base else pairs.each(sources)
            for k, image in enumerate(images):
                kept.put(start + k, image)
            if squares:
                for k, square in enumerate(pairs.squares(images)):
                    squares.put(start + k, square)
            advance(len(sources))
    if kept.pixels.is_cuda:
        torch.cuda.synchronize()  # another stream will read them


def _on_disk(path: Path, pairs: Pairs, rows: np.ndarray, sizes: np.ndarray, base: bool, quiet: bool) -> Pixels:
    """From the file if it is of the same images and was made in the same way, else from a new one."""
    if pairs.decoder.name == "ffcv":
        raise UserError(
            "--resident disk keeps images for other runs, and FFCV's are not the same in each: "
            "give --decode dali or pil."
        )
    about = [
        __version__,
        torch.__version__,
        pairs.beton.fingerprint,
        pairs.size,
        base,
        pairs.decoder.name,
        pairs.plan and pairs.plan.to_dict(),
        hashlib.sha256(rows.astype("<i8").data).hexdigest(),
    ]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest().encode()
    end = HEAD + int(bytes_of(sizes).sum())  # of the pixels
    size = end + len(rows) * CRC.itemsize
    if path.is_file() and path.stat().st_size == size and np.fromfile(path, f"S{HEAD}", 1)[0] == digest:
        file = PixelFile(path, np.fromfile(path, CRC, offset=end))
        return Pixels(rows, len(pairs.beton), sizes, _mapped(path, "r", end), file)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows now, not as a crash in the middle
            file.write(digest)
        file = PixelFile(path, np.zeros(len(rows), CRC))
        kept = Pixels(rows, len(pairs.beton), sizes, _mapped(temporary, "r+", end), file)
        _fill(kept, pairs, base, quiet)
        if not pairs.bad:  # else a later run would not hear of the damage
            with temporary.open("r+b") as written:
                written.seek(end)
                written.write(file.checksums.tobytes())
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        return kept
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = f"has no room on its disk for {size / 1e9:.2f} GB"
        else:
            reason = f"cannot be written ({error.strerror})"
        raise UserError(f"{path} {reason}: give another --resident-dir, or --resident ram or none.") from None
    finally:
        discard(temporary)


def _mapped(path: Path, mode: Literal["r", "r+"], end: int) -> Tensor:
    """The pixels in the file, which end there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.memmap(path, np.uint8, mode, HEAD, end - HEAD))
