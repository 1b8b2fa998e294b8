"""One process of two that keep images: where, and what happens when the first one cannot write."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as td

from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.data import resident
from fastbd.data.beton import Beton
from fastbd.data.decode import open_decoder
from fastbd.data.pairs import Pairs

SIZE = 16


def kept(where: str) -> Pairs:
    beton, world = Beton(os.environ["BETON"]), World(td.get_rank(), td.get_world_size(), torch.device("cpu"))
    pairs = Pairs(beton, open_decoder("pil", 1, "cpu"), SIZE)
    resident.keep(pairs, np.arange(len(beton)), where, base=True, world=world, quiet=True)
    return pairs


def main() -> dict:
    """What came of it."""
    main_rank, folder = td.get_rank() == 0, Path(os.environ["BETON"]).parent
    need, found = 3 * SIZE * SIZE * len(Beton(os.environ["BETON"])), {}
    for name, times in {"both": (8, 9), "one": (3, 9), "other": (9, 3)}.items():
        resident.free_memory = lambda free=times: free[not main_rank] * need
        found[name] = kept("auto").where
    resident.free_memory = lambda: need // (2 - main_rank)
    try:
        kept("ram")
    except UserError as error:
        found["too much"] = str(error)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if main_rank:  # may write no more than 1,000 bytes to a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    began = time.monotonic()
    try:
        kept("disk")
    except UserError as error:
        found["no room"] = str(error)
    found["seconds"] = time.monotonic() - began
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    td.barrier()
    found["left"] = sorted(path.name for path in folder.iterdir())
    td.barrier()
    found["decoded"] = kept("disk").decoder.decoded
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    td.init_process_group("gloo")
    json.dump(main(), sys.stdout)
    td.destroy_process_group()
