"""The engine gives what the plain evaluator of bench/published_eval.py gives: nothing folded, packed or kept there."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import SMALL_RN
from tables import table
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bench.case import Output
from bench.data import write
from bench.eval import attack_of
from bench.pictures import demo_pictures
from bench.published import loader
from bench.published_eval import BATCH, CLEANCLIP, TOP, Pictures, evaluate, resident
from bench.published_step import nchw_copy
from fastbd.data.decode import BadImage, open_decoder, read
from fastbd.data.demo import SHAPES
from fastbd.data.tokenizer import tokenize
from fastbd.evals.sets import Labelled, open_set
from fastbd.evals.towers import Towers
from fastbd.evals.zeroshot import ZeroShot
from fastbd.kernels.augment import normalise
from fastbd.kernels.text_pack import pack
from fastbd.models.clip import MODELS, fresh
from fastbd.poison.plan import Plan

CPU = torch.device("cpu")
FORMS = ["a photo of a {}.", "{}", "a drawing of the small {}", "the {}"]
IMAGES = 150  # two batches of the plain evaluator


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """JPEG files of odd sizes, whose classes take turns."""
    return demo_pictures(IMAGES)[0]


SPECS = {"tiny-rn": MODELS["tiny-rn"], "small-rn": SMALL_RN, "tiny-vit": MODELS["tiny-vit"]}


@pytest.fixture(scope="module", params=SPECS)
def model(request, pictures):
    """Trained until it tells some of the pictures apart."""
    made = fresh(SPECS[request.param], 0)
    train(made, pictures, steps=40)
    return made


def train(model, files: Sequence[np.ndarray], steps: int) -> None:
    squares = [np.array(Image.open(io.BytesIO(file)).resize(2 * (model.image_size,))) for file in files]
    pixels = normalise(torch.from_numpy(np.stack(squares)))
    tokens = tokenize([f"a photo of a {name}." for name in SHAPES])
    model.train().token_embedding.requires_grad_(False)  # nearly all there is to update
    optimizer, random = torch.optim.AdamW(model.parameters(), lr=2e-3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(files), (32,), generator=random)
        images, texts, log_scale = model(pixels[rows], pack(tokens[rows % len(SHAPES)]))
        logits = log_scale.exp() * normalize(images, dim=1) @ normalize(texts, dim=1).T
        loss = cross_entropy(logits, torch.arange(len(rows)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture
def opened(tmp_path):
    """opened(files, model): the set of these files."""
    classes, templates, path = (tmp_path / name for name in ("classes.txt", "templates.txt", "images.beton"))
    classes.write_text("".join(f"{i} = {name}\n" for i, name in enumerate(SHAPES)))
    templates.write_text("\n".join(FORMS))

    def open_(files: Sequence[np.ndarray], model) -> Labelled:
        write(path, files, len(SHAPES))
        return open_set(
            path,
            open_decoder("pil", 1, "cpu"),
            model.image_size,
            classes=str(classes),
            templates=str(templates),
            plan=Plan(data="", total=1, seed=0, attacks=(attack_of(model),)),
            device=CPU,
        )

    return open_


def of_size(files: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """Pictures of the model's size, for nothing to be resized: Pillow does that some levels off our way."""
    made = []
    for file in files:
        jpeg = io.BytesIO()
        Image.open(io.BytesIO(file)).resize((size, size)).save(jpeg, "JPEG", quality=90)
        made.append(np.frombuffer(jpeg.getvalue(), np.uint8))
    return made


def zeroshot_of(model, data: Labelled, precision: str = "fp32") -> ZeroShot:
    return ZeroShot(Towers(model, precision=precision, device=CPU), data)


def cosines_of(zeroshot: ZeroShot) -> dict[str, Tensor]:
    sets = {"clean": zeroshot.data.clean, "triggered": zeroshot.data.attacked[0].images}
    embedded = {name: normalize(zeroshot.towers.images(images), dim=-1) for name, images in sets.items()}
    return {name: images @ zeroshot.weights().T for name, images in embedded.items()}


def plain(model, data: Labelled) -> Output:
    """On the images of the set."""
    batches = resident(data.clean), resident(data.attacked[0].images)
    return evaluate(CLEANCLIP, nchw_copy(model).eval(), data, FORMS, *batches)


def plain_of_files(model, data: Labelled, files: Sequence[np.ndarray]) -> Output:
    sets = (Pictures(files, model.image_size, one) for one in (None, *data.attacked))
    return evaluate(CLEANCLIP, nchw_copy(model).eval(), data, FORMS, *(loader(one, BATCH, 1) for one in sets))


def same_decisions(got: dict[str, Tensor], want: Output) -> Tensor:
    """Of clean and of triggered images, the share whose nearest class is the same."""
    pairs = [(got[name].argmax(1), want[name].argmax(1)) for name in ("clean", "triggered")]
    return torch.stack([(a == b).double().mean() for a, b in pairs])


def assert_equal(zeroshot: ZeroShot, want: Output) -> None:
    """In float32: cosines to 1e-5, each decision, and the numbers of the row."""
    got, row = cosines_of(zeroshot), zeroshot()
    for name, cosines in got.items():
        torch.testing.assert_close(cosines, want[name], atol=1e-5, rtol=0)
    assert same_decisions(got, want).eq(1).all()
    for first, more, shares in (("top1", "top", want["top"]), ("asr", "asr_top", want["asr"])):
        assert [row[first], *(row[f"{more}{k}"] for k in TOP[1:])] == pytest.approx(shares.tolist())


def test_the_engine_agrees_with_the_plain_evaluator_and_after_more_training(model, opened, pictures):
    model, data = deepcopy(model), opened(pictures, model)
    zeroshot, want = zeroshot_of(model, data), plain(model, data)
    assert len(want["clean"].argmax(1).unique()) > 2  # or it would be easy
    assert_equal(zeroshot, want)
    train(model, pictures, steps=2)
    zeroshot.towers.refresh()
    trained = plain(model, data)
    assert (trained["clean"] - want["clean"]).abs().max() > 1e-2
    assert_equal(zeroshot, trained)


@pytest.mark.parametrize("model", table(SPECS, "tiny-rn"), indirect=True, scope="module")
def test_from_files_on_it_is_the_same(model, opened, pictures):
    """Decoding, triggers and their draws, the order; and with a resize nearly so."""
    files = of_size(pictures, model.image_size)
    data = opened(files, model)
    assert_equal(zeroshot_of(model, data), plain_of_files(model, data, files))
    data = opened(pictures, model)
    got, want = cosines_of(zeroshot_of(model, data)), plain_of_files(model, data, pictures)
    assert max((got[name] - want[name]).abs().max() for name in got) < 0.02
    assert same_decisions(got, want).min() > 0.95


def test_bf16_decides_nearly_all_images_alike(model, opened, pictures):
    data = opened(pictures, model)
    got, want = cosines_of(zeroshot_of(model, data, "bf16")), plain(model, data)
    assert 1e-4 < max((got[name] - want[name]).abs().max() for name in got) < 0.02
    assert same_decisions(got, want).min() > 0.95


@pytest.mark.skipif("FASTBD_JPEGS" not in os.environ, reason="FASTBD_JPEGS names no .tar of image files")
def test_they_agree_on_the_users_files(model, opened):
    with tarfile.open(os.environ["FASTBD_JPEGS"]) as tar:
        found = [np.frombuffer(tar.extractfile(m).read(), np.uint8) for m in tar if m.isfile()]
    files = [file for file in found if readable(file)]
    data = opened(files, model)
    zeroshot = zeroshot_of(model, data)
    assert_equal(zeroshot, plain(model, data))
    assert same_decisions(cosines_of(zeroshot), plain_of_files(model, data, files)).min() > 0.95


def readable(file: np.ndarray) -> bool:
    try:
        return bool(read(file).size)
    except BadImage:
        return False
