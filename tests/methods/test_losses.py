"""CyCLIP's loss by its definition, masked losses by indexing, in one process and several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from formulas import assert_near, cyclic, embeddings, mmcl_of, ssl_of, with_gradients

from fastbd.methods.losses import cyclic_loss, masked_mmcl, masked_ssl


@pytest.mark.parametrize(
    "apart, dtype, relative", [(1, torch.float32, 1e-5), (1e-3, torch.float32, 1e-4), (1, torch.bfloat16, 3e-3)]
)
def test_cyclic_loss_is_its_definition(apart, dtype, relative):
    """Near pairs, where the definition itself is wrong by 1e-4 in float32, too; of bf16 only gradients are rounded."""
    image, noise = embeddings(33, dim=40)
    inputs = [x.to(dtype) for x in (image, image + apart * noise)]
    true = with_gradients(cyclic, inputs, torch.float64)
    assert_near(with_gradients(cyclic_loss, inputs, dtype), true, relative)
    with torch.autocast("cpu", torch.bfloat16):
        assert_near([cyclic_loss(*inputs)], true[:1], 1e-5)


def test_a_rotation_and_swapped_pairs_by_hand():
    """Rotated texts keep the in-modal cosines, and a quarter turn of the plane makes I T^T antisymmetric: 4 N / N."""
    quarter = torch.tensor([[0.0, 1], [-1, 0]])
    assert cyclic_loss(torch.eye(2), torch.eye(2) @ quarter).item() == pytest.approx(2 * (0 + 2 * 4) / 4)
    assert cyclic_loss(torch.eye(2), torch.eye(2)[[1, 0]]).item() == 0  # both are symmetric


MASKS = {"some": lambda k: k % 3 != 1, "one": lambda k: k == 4, "all": lambda k: k >= 0}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("ours, truth", [(masked_mmcl, mmcl_of), (masked_ssl, ssl_of)])
def test_masked_losses_are_those_of_the_picked_pairs(ours, truth, kind):
    mask = MASKS[kind](torch.arange(20))
    inputs = [*embeddings(20), torch.tensor(2.5)]
    found = with_gradients(lambda *x: ours(*x, mask), inputs, torch.float32)
    true = with_gradients(lambda *x: truth(*x, mask), inputs, torch.float64)
    if kind == "one":  # it has no negative
        assert not any(x.any() for x in found)
    else:
        assert_near(found, true, 1e-5)
        assert not found[1][~mask].any() and not found[2][~mask].any()


def test_no_pair_is_no_loss():
    inputs, none = [*embeddings(6), torch.tensor(2.5)], torch.zeros(6, dtype=torch.bool)
    assert not any(x.any() for x in with_gradients(lambda *x: masked_mmcl(*x, none), inputs, torch.float32))


@pytest.mark.gpu("graphs are CUDA's")
def test_a_graph_serves_any_mask():
    towers = [x.cuda().requires_grad_() for x in embeddings(64)]
    scale, mask = torch.tensor(2.5, device="cuda"), torch.ones(64, dtype=torch.bool, device="cuda")

    def run():
        loss = masked_mmcl(*towers, scale, mask) + cyclic_loss(*towers)
        return loss, *torch.autograd.grad(loss, towers)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    mask[::3] = False
    graph.replay()
    torch.testing.assert_close(captured, run())


@pytest.mark.parametrize("size", [2, 3])
def test_processes_give_what_one_gives(size, together):
    outputs = together(Path(__file__).with_name("loss_worker.py"), size)
    assert all(output == outputs[0] and output.count("loss") == 8 for output in outputs), outputs
