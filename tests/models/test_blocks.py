"""Pools: the same means however they are written."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastbd.models import create
from fastbd.models.blocks import AvgPool, fuse_pools


@pytest.mark.parametrize("side", [2, 3])
def test_fused_pools_are_written_as_means_in_compiled_training_alone(side):
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    pool = AvgPool(side)
    compiled = torch.compile(pool, backend=backend, fullgraph=True)
    x = torch.randn(2, 5, 6, 12).to(memory_format=torch.channels_last)
    wanted = F.avg_pool2d(x, side)
    assert torch.equal(pool(x), wanted) and torch.equal(compiled(x), wanted)
    fuse_pools(pool)
    torch.testing.assert_close(compiled(x), wanted)
    assert torch.equal(pool(x), wanted) and torch.equal(compiled.eval()(x), wanted)
    assert ["avg_pool2d" in code for code in graphs] == [True, False, True]


def test_all_pools_of_a_residual_network_are_fused():
    """Behind the stem, and twice where each of three stages begins."""
    model = create("tiny-rn", 0)
    fuse_pools(model)
    assert [module.fused for module in model.modules() if isinstance(module, torch.nn.AvgPool2d)] == 7 * [True]
