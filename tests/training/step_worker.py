"""One process of several: its steps against those of one process with the joined batch."""

from __future__ import annotations

import gc
from copy import deepcopy
from functools import partial

import torch
import torch.distributed as td
from steps import BATCH, BOTH, EVERY, MMCL, ONE, ROOM, SHALLOW_RN, SHALLOW_VIT, batch_of, make_step

from fastbd.base.dist import World
from fastbd.methods.objectives import Objective
from fastbd.models.batchnorm import share_statistics
from fastbd.models.clip import fresh

IMAGES = Objective(mmcl_weight=0.0, ssl_weight=1.0, ssl_text=False)  # no gradient reaches the text tower
# name: model, objective, settings of the step; of batch norm: (images, whether processes share)
CASES = {
    "groups of images": (SHALLOW_RN, BOTH, {}, (4, False)),
    "all processes' images": (SHALLOW_RN, EVERY, {}, (0, True)),
    "in parts": (SHALLOW_RN, EVERY, {"parts": 2}, (4, False)),
    "one tower": (SHALLOW_VIT, IMAGES, {}, (0, False)),
    "one tower compiled": (SHALLOW_VIT, IMAGES, {"compiled": True}, (0, False)),
    "one tower in parts": (SHALLOW_VIT, IMAGES, {"parts": 2}, (0, False)),
    "compiled": (SHALLOW_RN, MMCL, {"compiled": True}, (0, True)),
}


def trained(model, world: World, objective: Objective, norms: tuple[int, bool], parts: int = 1, **settings):
    """Losses of three steps and the state after them; each process takes its share of every batch."""
    model = deepcopy(model)
    images, shared = norms
    if images or (shared and world.size > 1):
        share_statistics(model, images, world.group if shared else None)
    step = make_step(model, objective, world, parts=parts, **settings)
    share = BATCH // world.size
    own = slice(world.rank * share, (world.rank + 1) * share)
    views = 2 if objective.ssl_weight else 1
    losses = [step(batch_of(views, seed, parts, room=ROOM, own=own))["loss"].item() for seed in range(3)]
    return losses, model.state_dict()


def main() -> None:
    world = World(td.get_rank(), td.get_world_size(), torch.device("cpu"))
    for name, (model, objective, settings, norms) in CASES.items():
        start = fresh(model, 0)
        alone = trained(start, ONE, objective, norms)
        together = trained(start, world, objective, norms, **settings)
        for mine, theirs in zip(together[0], alone[0], strict=True):
            assert abs(mine - theirs) < 1e-4 * abs(theirs), (name, together[0], alone[0])
        for key, mine in together[1].items():
            off = (mine - alone[1][key]).abs().max().item()
            if norms[0] and "running" in key:  # a process keeps those of its own images
                continue
            assert off < 2e-4, (name, key, off)
        moved = max((alone[1][key] - value).abs().max().item() for key, value in start.state_dict().items())
        assert moved > 5e-3, name
        print(name, "done", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.compile = partial(torch.compile, backend="aot_eager")  # needs no C++ compiler
    td.init_process_group("gloo")
    main()
    td.destroy_process_group()
    gc.collect()  # DDP's cycles hold the group, whose threads must not outlive Python
