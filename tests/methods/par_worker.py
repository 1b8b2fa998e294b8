"""One process of several: its loss and gradients against those of the whole batch."""

from __future__ import annotations

from itertools import product

import torch
import torch.distributed as td
from steps import BATCH
from test_par import embedded_of, method_of, poisoned_model


def leaves(embedded):
    return [*embedded.images, *embedded.texts]


def main() -> None:
    model = poisoned_model()
    share = BATCH // td.get_world_size()
    own = slice(td.get_rank() * share, (td.get_rank() + 1) * share)
    for gate, distance in product(("batch", "sample"), ("plain", "rotation")):
        whole = embedded_of()
        method = method_of(model, gate=gate, distance=distance, tau=1.0 if distance == "rotation" else 2.0)
        loss, parts = method(whole)
        loss.backward()
        mine = [x.detach()[own].requires_grad_() for x in leaves(whole)]
        views = [view[own] for view in whole.views]
        shared, others = method(
            whole._replace(images=mine[:1], texts=mine[1:], rows=whole.rows[own], views=views), td.group.WORLD
        )
        shared.backward()
        torch.testing.assert_close([shared, *others.values()], [loss, *parts.values()], rtol=1e-5, atol=1e-6)
        for found, expected in zip(mine, leaves(whole), strict=True):
            torch.testing.assert_close(found.grad / td.get_world_size(), expected.grad[own], rtol=1e-4, atol=1e-6)
        print(gate, distance, "done", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    td.init_process_group("gloo")
    main()
    td.destroy_process_group()
