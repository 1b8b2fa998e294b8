from __future__ import annotations

from functools import partial

import pytest
import torch
from small_models import SMALL_RN
from tables import table

from fastbd.data.tokenizer import tokenize
from fastbd.evals import towers as module
from fastbd.evals.towers import Towers
from fastbd.kernels.augment import normalise
from fastbd.kernels.text_pack import pack
from fastbd.models import CLIP
from fastbd.models.clip import MODELS, ModelSpec, fresh
from fastbd.models.precision import has_compiler

CPU = torch.device("cpu")


@pytest.fixture
def model():
    return trained(MODELS["tiny-rn"])


def trained(spec: ModelSpec) -> CLIP:
    """In training, as the loop leaves it."""
    made = fresh(spec, 0)
    made.encode_image(torch.randn(16, 3, 32, 32))
    return made.train()


def pictures(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def plain(model, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        embedded = model.eval().encode_image(normalise(images))
    model.train()
    return embedded


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_images_are_embedded_as_one_by_one(model, batch, monkeypatch):
    monkeypatch.setitem(module.PIXELS, "cpu", batch * 32 * 32)
    towers, told = Towers(model, precision="fp32", device=CPU), []
    towers.advance = told.append
    assert torch.allclose(towers.images(pictures(7)), plain(model, pictures(7)), atol=1e-5)
    assert sum(told) == 7 and model.training
    again = towers.images(lambda places: pictures(7)[places], 7)
    assert torch.equal(again, towers.images(pictures(7)))


def test_bf16_is_near(model):
    wanted, found = plain(model, pictures(32)), Towers(model, precision="bf16", device=CPU).images(pictures(32))
    assert found.dtype == torch.float32 and 0 < (found - wanted).norm() < 0.02 * wanted.norm()


COMPILED = [("eager", MODELS["tiny-rn"]), ("inductor", SMALL_RN)]


@pytest.mark.parametrize(("backend", "spec"), table(COMPILED, COMPILED[0]))
def test_compiled_it_is_one_graph_for_all_batches(backend, spec, monkeypatch):
    if backend == "inductor" and not has_compiler():
        pytest.skip("no C++ compiler")
    model = trained(spec)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setitem(module.PIXELS, "cpu", 4 * 32 * 32)
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]  # of the whole process
    before = graphs["unique_graphs"]
    towers = Towers(model, precision="fp32", device=CPU, compiled=True)
    assert torch.allclose(towers.images(pictures(10)), plain(model, pictures(10)), atol=1e-5)
    with torch.no_grad():
        list(model.visual.parameters())[-1].add_(1)
    towers.refresh()
    assert torch.allclose(towers.images(pictures(10)), plain(model, pictures(10)), atol=1e-5)
    assert graphs["unique_graphs"] == before + 1


SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]


@pytest.mark.parametrize("error", [*SHORT, RuntimeError("CUDA error: an illegal memory access was encountered")])
def test_the_batch_shrinks_where_memory_is_short(error, model, monkeypatch):
    towers, tried = Towers(model, precision="fp32", device=CPU), []
    embed = towers._call

    def short(images: torch.Tensor) -> torch.Tensor:
        tried.append(len(images))
        if len(images) > 20:
            raise error
        return embed(images)

    monkeypatch.setattr(towers, "_call", short)
    monkeypatch.setitem(module.PIXELS, "cpu", 64 * 32 * 32)
    if error not in SHORT:
        with pytest.raises(RuntimeError, match="illegal"):
            towers.images(pictures(40))
        return
    assert torch.allclose(towers.images(pictures(40)), plain(model, pictures(40)), atol=1e-5)
    assert tried == [40, 32, 16, 16, 16]


def test_captions_and_the_version_of_their_tower(model, monkeypatch):
    monkeypatch.setattr(module, "CAPTIONS", 2)
    tokens = tokenize(["a photo", "two words more", "a", "one of five", "!"])
    towers = Towers(model, precision="fp32", device=CPU)
    assert torch.allclose(towers.captions(tokens), model.encode_text(pack(tokens)), atol=1e-5)
    with torch.no_grad():
        model.visual.attnpool.c_proj.bias.add_(1)
        towers.refresh()
        assert towers.text_version == 0
        model.token_embedding.weight[0, 0] += 1
        towers.refresh()
        assert towers.text_version == 1
