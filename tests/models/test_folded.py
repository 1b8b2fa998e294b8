from __future__ import annotations

import pytest
import torch
from torch import nn

from fastbd.models import create
from fastbd.models.batchnorm import BatchNorm, share_statistics
from fastbd.models.folded import Folded

CPU = torch.device("cpu")


def trained(name: str):
    """A model in float64 whose norms have seen something."""
    model = create(name, 0).double()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize("name", ["demo", "small-rn10", "tiny-rn", "tiny-vit"])
def test_the_copy_gives_what_the_model_gives_in_eval_mode(name):
    model = trained(name)
    pixels = torch.randn(3, 3, model.image_size, model.image_size, dtype=torch.float64)
    folded = Folded(model, CPU)
    weights = [weight.data_ptr() for weight in folded.model.parameters()]
    for _ in range(2):
        folded.refresh()
        assert torch.allclose(folded.model.encode_image(pixels), model.eval().encode_image(pixels), rtol=1e-10)
        for parameter in model.train().parameters():
            parameter.data.mul_(1.1)
        model.encode_image(pixels)  # moves the running statistics
    assert weights == [weight.data_ptr() for weight in folded.model.parameters()]
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, BatchNorm) for module in folded.model.modules())


class PreActivated(nn.Module):
    """A layer from outside: norms before their convolutions, one of which has a bias, and one norm of PyTorch's."""

    def __init__(self):
        super().__init__()
        self.first, self.a = BatchNorm(3), nn.Conv2d(3, 4, 3, bias=True)
        self.second, self.b = BatchNorm(4), nn.Conv2d(4, 5, 1)
        self.third = nn.BatchNorm2d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.b(self.second(self.a(self.first(x)).relu())))


def test_layers_from_outside_are_copied_as_they_are():
    model, images = PreActivated().double(), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    folded = Folded(model, CPU)
    for _ in range(2):
        model.train()(images)  # moves the statistics
        folded.refresh()
        assert torch.allclose(folded.model(images), model.eval()(images), rtol=1e-10)


def test_a_convolution_keeps_its_bias():
    """The last one's, which nothing behind it can take away."""
    model = trained("tiny-rn")
    pixels = torch.randn(2, 3, model.image_size, model.image_size, dtype=torch.float64)
    without = model.eval().encode_image(pixels)
    last = model.visual.layer4[-1].conv3
    last.bias = nn.Parameter(torch.randn(last.out_channels).double())
    folded = Folded(model, CPU)
    folded.refresh()
    assert not torch.allclose(model.encode_image(pixels), without, rtol=0.01)
    assert torch.allclose(folded.model.encode_image(pixels), model.encode_image(pixels), rtol=1e-10)


def test_norms_that_share_their_statistics_can_be_copied():
    model = create("tiny-rn", 0)
    share_statistics(model, 0, torch.distributed)  # stands for a group of processes, which cannot be copied either
    Folded(model, CPU).refresh()


def test_fresh_is_what_has_the_same_values():
    model = create("tiny-rn", 0)
    folded = Folded(model, CPU)
    folded.refresh()
    assert folded.is_fresh(["text_projection", "ln_final.weight"])
    version = model.text_projection._version
    model.text_projection.data[0, 0] += 1
    assert model.text_projection._version == version  # as a captured step leaves it
    assert not folded.is_fresh(["text_projection", "ln_final.weight"]) and folded.is_fresh(["ln_final.weight"])
