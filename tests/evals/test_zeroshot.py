"""Evaluation with a model whose answers are known: an image embeds as its mean colour, a prompt as its class's."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastbd.data.beton import Beton, BetonWriter
from fastbd.data.decode import open_decoder
from fastbd.data.tokenizer import tokenize
from fastbd.errors import UserError
from fastbd.evals.zeroshot import evaluate, open_set
from fastbd.kernels.augment import CLIP_MEAN, CLIP_STD
from fastbd.poison.plan import Plan
from fastbd.poison.triggers import TriggerSpec

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "yellow": (255, 255, 0)}
# What each of the eight images shows, and what its label says.
SHOWN = ["red", "red", "green", "green", "green", "yellow", "red", "yellow"]
LABELS = ["red", "red", "green", "green", "red", "yellow", "yellow", "yellow"]
CPU = torch.device("cpu")


class ColourModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = {int(tokenize([name])[0, 1]): colour for name, colour in COLOURS.items()}

    def encode_image(self, pixels):
        mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
        return (pixels * std + mean).mean((2, 3))

    def encode_text(self, tokens):
        found = [next(self.words[int(t)] for t in row if int(t) in self.words) for row in tokens]
        return torch.tensor(found, dtype=torch.float32)


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    path = tmp_path_factory.mktemp("val") / "val.beton"
    names = sorted(COLOURS)
    with BetonWriter(path, 8, 0, True) as writer:
        for i, (shown, label) in enumerate(zip(SHOWN, LABELS, strict=True)):
            file = io.BytesIO()
            Image.new("RGB", (20, 16), COLOURS[shown]).save(file, "JPEG", quality=95, subsampling=0)
            writer.add(
                jpeg=file.getvalue(), width=20, height=16, tokens=tokenize(["x"])[0],
                text_views=np.zeros((0, 77), np.uint16), caption="x", row_id=i, label=names.index(label),
                class_name=label,
            )  # fmt: skip
    return path


@pytest.fixture
def plan(val):
    trigger = TriggerSpec("yellow", 15)
    return Plan(
        data="0" * 64, total=9, rows=(0,), captions=("yellow",), target="yellow", trigger=trigger, geometry="squash",
        label_consistent=False, seed=0,
    )  # fmt: skip


def opened(val, plan=None, **options):
    options = {"classes": None, "templates": "demo", **options}
    return open_set(val, open_decoder("pil", 1, "cpu"), 16, plan=plan, **options)


def test_accuracy_asr_and_recovery_are_what_the_pictures_say(val, plan):
    row = evaluate(ColourModel(), opened(val, plan), precision="fp32", device=CPU, batch=3)
    # Images 4 and 6 carry another label than what they show.
    assert (row["n"], row["top1"], row["set"]) == (8, 6 / 8, "val")
    # The yellow square of 15 of 16 px makes every image yellow; five are not labelled yellow.
    assert (row["n_asr"], row["asr"], row["asr_all"], row["recovery"]) == (5, 1.0, 1.0, 0.0)
    small = dataclasses.replace(plan, trigger=TriggerSpec("yellow", 1))
    row = evaluate(ColourModel(), opened(val, small), precision="fp32", device=CPU)
    # One yellow pixel changes nothing: image 5 and 7 alone are taken for yellow, both labelled so.
    assert (row["asr"], row["asr_all"], row["recovery"]) == (0.0, 2 / 8, 4 / 5)


def test_without_a_plan_there_is_no_asr(val):
    assert "asr" not in evaluate(ColourModel(), opened(val), precision="fp32", device=CPU)


def test_the_model_keeps_its_mode(val):
    model = ColourModel().train()
    evaluate(model, opened(val), precision="fp32", device=CPU)
    assert model.training


def test_geometry_of_the_triggered_images(val, plan):
    squashed = opened(val, plan)
    assert squashed.attacked is not squashed.clean
    cropped = opened(val, dataclasses.replace(plan, geometry="crop"))
    assert cropped.attacked is cropped.clean


def test_a_subset_is_drawn_from_the_seed(val):
    ids = [opened(val, subset=4, seed=s).ids.tolist() for s in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2] and len(set(ids[0])) == 4
    whole, part = opened(val), opened(val, subset=4, seed=0)
    assert torch.equal(part.labels, whole.labels[part.ids]) and torch.equal(part.clean, whole.clean[part.ids])


def test_a_class_list_of_ones_own_orders_the_classes(val, tmp_path):
    (tmp_path / "classes.txt").write_text("yellow\nred\nblue\ngreen\n")
    data = opened(val, classes=str(tmp_path / "classes.txt"))
    assert [data.classes[i] for i in data.labels] == LABELS


def test_mistakes(val, plan, tmp_path):
    with pytest.raises(UserError, match="no class holds the target word 'banana'"):
        opened(val, dataclasses.replace(plan, target="banana"))
    with BetonWriter(tmp_path / "plain.beton", 1, 0, False) as writer:
        writer.add(
            jpeg=bytes(Beton(val).jpeg(0)), width=20, height=16, tokens=tokenize(["x"])[0],
            text_views=np.zeros((0, 77), np.uint16), caption="x", row_id=0,
        )  # fmt: skip
    with pytest.raises(UserError, match="plain.beton has no classes.*--class-key"):
        opened(tmp_path / "plain.beton")
    (tmp_path / "two.txt").write_text("red\ngreen\n")
    with pytest.raises(UserError, match="'yellow' is not in the list of 2"):
        opened(val, classes=str(tmp_path / "two.txt"))
