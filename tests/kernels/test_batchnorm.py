"""Batch norm with what follows it, of the compiled library, against PyTorch's layers in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastbd.kernels import batchnorm, native
from fastbd.kernels.batchnorm import Norm, batch_norm, reference

pytestmark = pytest.mark.skipif(native.library("batchnorm") is None, reason="the library is not built")

SHAPES = [(8, 8, 32, 32), (8, 64, 16, 16), (3, 5, 7, 9), (3, 5, 6, 8), (1, 7, 1, 5), (2, 130, 3, 3), (5, 600, 4, 4)]
FOLLOWED = [(False, False, False), (False, True, False), (True, False, False), (True, True, False)]
FOLLOWED += [(False, False, True), (False, True, True)]  # (shortcut, relu, pool)


def inputs(shape: tuple[int, ...], shortcut: bool) -> list[Tensor | None]:
    """x, far from 0, shortcut, weight and bias; float32, channels last."""
    noise = torch.Generator().manual_seed(0)
    x = 20 + 3 * torch.randn(shape, generator=noise)
    other = torch.randn(shape, generator=noise).contiguous(memory_format=torch.channels_last)
    channels = (torch.randn(shape[1], generator=noise) for _ in range(2))
    return [x.contiguous(memory_format=torch.channels_last), other if shortcut else None, *channels]


def trained(function, given: list[Tensor | None], relu: bool, pool: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, running statistics and gradients, computed in `dtype`."""
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in given]
    x, shortcut, weight, bias = leaves
    assert x is not None and weight is not None and bias is not None
    mean, var = torch.zeros_like(weight).detach(), torch.ones_like(weight).detach()
    norm = Norm(weight, bias, mean, var, 0.1, 1e-5)
    y = function(x, norm, shortcut, relu, nn.AvgPool2d(2) if pool else None)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    gradients = {f"gradient {k}": x.grad for k, x in enumerate(leaves) if x is not None and x.grad is not None}
    return {"y": y.detach(), "mean": mean, "var": var, **gradients}


def error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm().clamp(min=1e-3)).item()


@pytest.mark.parametrize("shortcut, relu, pool", FOLLOWED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_statistics_and_gradients_are_those_of_float64(shape, shortcut: bool, relu: bool, pool: bool) -> None:
    if pool and (shape[2] % 2 or shape[3] % 2):
        pytest.skip("sides that are not even are not pooled by the library")
    given = inputs(shape, shortcut)
    truth = trained(reference, given, relu, pool, torch.float64)
    plain = trained(reference, given, relu, pool, torch.float32)
    ours = trained(batch_norm, given, relu, pool, torch.float32)
    assert ours.keys() == truth.keys()
    for name, want in truth.items():
        # A number at the kink of the ReLU may fall on its other side, in either.
        assert error(ours[name], want) <= max(2e-6, 1.5 * error(plain[name], want)), name


def test_the_library_is_what_ran(monkeypatch) -> None:
    """Against a reference that gives nothing, so that no test above compares PyTorch with itself."""
    monkeypatch.setattr(batchnorm, "reference", None)
    trained(batch_norm, inputs((8, 8, 4, 4), True), True, False, torch.float32)


@pytest.mark.parametrize("shape", [(8, 8, 32, 32), (5, 600, 4, 4)], ids=str)
def test_results_do_not_depend_on_the_threads(shape) -> None:
    given, before = inputs(shape, True), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(trained(batch_norm, given, True, False, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    """A loss that is not finite stops a run, so that nothing on the way may hide it."""
    given = inputs((4, 8, 4, 4), False)
    assert given[0] is not None
    given[0][1, 3, 2, 2] = bad
    y = trained(batch_norm, given, True, False, torch.float32)["y"]
    assert not y[:, 3].isfinite().any()
    assert y[:, [0, 1, 2, 4]].isfinite().all()


def test_other_memory_orders_and_types_take_pytorchs_way() -> None:
    given = inputs((4, 8, 6, 6), True)
    want = trained(reference, given, True, False, torch.float64)
    assert all(torch.equal(x, want[name]) for name, x in trained(batch_norm, given, True, False, torch.float64).items())
    contiguous = [None if x is None else x.contiguous() for x in given]
    found = trained(batch_norm, contiguous, True, False, torch.float32)
    plain = trained(reference, contiguous, True, False, torch.float32)
    assert all(torch.equal(x, plain[name]) for name, x in found.items())


def test_a_gradient_of_another_memory_order_is_accepted() -> None:
    x, shortcut, weight, bias = inputs((2, 8, 4, 4), True)
    assert x is not None and weight is not None and bias is not None
    norm = Norm(weight, bias, torch.zeros(8), torch.ones(8), 0.1, 1e-5)
    gradient = torch.randn(2, 8, 4, 4)
    found = []
    for of_y in (gradient, gradient.contiguous(memory_format=torch.channels_last), gradient[:1].expand(2, 8, 4, 4)):
        leaf = x.detach().requires_grad_()
        batch_norm(leaf, norm, shortcut, True, None).backward(of_y)
        found.append(leaf.grad)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_one_pixel_has_no_statistics() -> None:
    x, _, weight, bias = inputs((1, 8, 1, 1), False)
    assert x is not None and weight is not None and bias is not None
    norm = Norm(weight, bias, torch.zeros(8), torch.ones(8), 0.1, 1e-5)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm(x, norm, None, True, None)
