"""One process of several: losses and gradients against those of the whole batch in float64."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as td
import torch.nn.functional as F
from formulas import assert_near, cyclic, embeddings, mmcl_of, siglip, with_gradients
from planted import training

from fastbd.config.flags import CleanConfig, config_of
from fastbd.methods.losses import masked_mmcl
from fastbd.methods.method import Embedded
from fastbd.methods.objectives import Objective
from fastbd.methods.unlearn import Unlearn

ROWS = 7


def main(rank: int, size: int) -> None:
    """The mean of the processes' gradients is what data-parallel training uses."""
    mask = torch.arange(ROWS * size) % 4 < 2
    own, group = slice(rank * ROWS, (rank + 1) * ROWS), td.group.WORLD
    numbers = torch.arange(ROWS * size)

    def unlearn(gather: str) -> Unlearn:
        method = Unlearn(config_of(CleanConfig, "unlearn")(method="unlearn", gather=gather))
        method.attach(training(*embeddings(ROWS * size), flagged=numbers[~mask]))
        return method

    cases = {  # name: (ours, the formula)
        "cyclic": (
            lambda gather: (
                lambda i, t, s: Objective(0.0, cyclic_weight=0.7, gather=gather)([i], [t], s, group)[0] + 0 * s
            ),
            lambda i, t, s: 0.7 * cyclic(i, t) + 0 * s,
        ),
        "siglip": (
            lambda gather: lambda i, t, s: Objective(0.0, siglip_weight=0.7, gather=gather)([i], [t], s, group)[0],
            lambda i, t, s: 0.7 * siglip(i, t, s),
        ),
        "masked": (
            lambda gather: lambda i, t, s: masked_mmcl(i, t, s, mask[own], gather=gather, group=group),
            lambda i, t, s: mmcl_of(i, t, s, mask),
        ),
        "unlearn": (
            lambda gather: lambda i, t, s: unlearn(gather)(Embedded([i], [t], s, numbers[own], []), group)[0],
            lambda i, t, s: mmcl_of(i, t, s, mask) + (F.cosine_similarity(i, t)[~mask] + 1).square().mean(),
        ),
    }
    *whole, log_scale = *embeddings(ROWS * size), torch.tensor(2.3)
    for name, (ours, formula) in cases.items():
        truth = with_gradients(formula, [*whole, log_scale], torch.float64)
        for gather, factor in (("exact", size), ("local-grad", 1)):
            loss, *rows, scale = with_gradients(ours(gather), [*(x[own] for x in whole), log_scale], torch.float32)
            td.all_reduce(scale)
            wanted = [truth[0], *(factor * x[own] for x in truth[1:3]), truth[3]]
            assert_near([loss, *rows, scale / size], wanted, 1e-5)
            print(name, gather, "loss", loss.item().hex())


if __name__ == "__main__":
    torch.set_num_threads(1)
    td.init_process_group("gloo")
    main(td.get_rank(), td.get_world_size())
    td.destroy_process_group()
    left = [(thread / "comm").read_text() for thread in Path("/proc/self/task").glob("*")]  # none anywhere but on Linux
    assert not [name for name in left if "gloo" in name], "something still holds the group"
