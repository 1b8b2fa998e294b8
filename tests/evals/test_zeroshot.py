"""A model whose embeddings are known: an image is its mean colour, a text is the colour that it names."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastbd.data.beton import Beton, BetonWriter
from fastbd.data.decode import open_decoder
from fastbd.data.tokenizer import tokenize
from fastbd.errors import UserError
from fastbd.evals.zeroshot import EvalSet, evaluate, open_set
from fastbd.poison.plan import Attack, Plan
from fastbd.poison.triggers import TriggerSpec, stamp

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
CPU = torch.device("cpu")

# A yellow square of 4 x 4 px on 8 x 8 makes the mean 3/4 colour + 1/4 yellow. For full red that is (1, 1/4, 0), still
# nearest to red (cosine 0.97 against 0.86); for red of 76 / 255 it is (0.47, 0.25, 0), nearer to yellow (0.95 against
# 0.89). Full blue stays blue (0.90 against 0.43), dark blue goes (0.54 against 0.84).
IMAGES = [  # (class, paint), what becomes of it clean, and triggered
    ("red", (255, 0, 0)),  # right, right
    ("red", (76, 0, 0)),  # right, yellow
    ("green", (0, 255, 0)),  # right, right
    ("green", (0, 76, 0)),  # right, yellow
    ("green", (0, 0, 255)),  # blue, blue
    ("blue", (0, 0, 76)),  # right, yellow
    ("yellow", (255, 255, 0)),  # right; of the target class
    ("yellow", (0, 0, 255)),  # blue; of the target class
    ("red", (76, 0, 0)),  # right, yellow
]


class ByColour(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen, self.modes = [], []
        self.words = {int(tokenize([name])[0, 1]): torch.tensor(c, dtype=torch.float) for name, c in COLOURS.items()}

    def encode_image(self, pixels):
        mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)  # published with CLIP
        std = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
        self.seen.append((pixels * std + mean).mul(255).round())
        self.modes.append(self.training)
        return self.seen[-1].mean((2, 3))

    def encode_text(self, text):
        rows = text.tokens.split(text.starts.diff().tolist())
        return torch.stack([next(self.words[int(t)] for t in row if int(t) in self.words) for row in rows])


def write(path: Path, images: Sequence, size: tuple[int, int] = (8, 8), labelled: bool = True) -> Path:
    classes = sorted({name for name, _ in images})
    with BetonWriter(path, len(images), 0, labelled) as writer:
        for i, (name, paint) in enumerate(images):
            jpeg = io.BytesIO()
            Image.new("RGB", size, paint).save(jpeg, "JPEG", quality=98, subsampling="4:4:4")
            label = {"label": classes.index(name), "class_name": name} if labelled else {}
            writer.add(jpeg=jpeg.getvalue(), width=size[0], height=size[1], tokens=tokenize([name])[0],
                       text_views=None, caption=name, row_id=i, **label)  # fmt: skip
    return path


def plan_of(target: str = "yellow", trigger: TriggerSpec | None = None, geometry: str = "squash") -> Plan:
    attack = Attack(rows=(0,), captions=("",), target=target, geometry=geometry, label_consistent=False,
                    trigger=trigger or TriggerSpec("yellow", patch_size=4))  # fmt: skip
    return Plan(data="of the training data", total=2, seed=0, attacks=(attack,))


def attacked(data: EvalSet) -> torch.Tensor:
    """All images with the trigger of the only attack."""
    return data.triggered(data.attacks[0], slice(None), CPU)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("zeroshot") / "colours.beton", IMAGES)


@pytest.fixture
def opened(tmp_path):
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n{} paint\n")

    def open_(path: Path, **changed) -> EvalSet:
        settings = dict(classes=None, templates=str(tmp_path / "templates.txt"), plan=plan_of()) | changed
        return open_set(path, open_decoder("pil", 1, "cpu"), 8, **settings)

    return open_


@pytest.mark.parametrize("batch", [512, 4, 1])
def test_accuracy_asr_and_recovery_by_hand(data, opened, batch):
    model = ByColour().train()
    row = evaluate(model, opened(data), precision="fp32", device=CPU, batch=batch)
    assert (row["set"], row["n"], row["target"], row["trigger"]) == ("colours", 9, "yellow", "yellow")
    assert row["top1"] == 7 / 9 and row["top5"] == 1
    assert row["n_asr"] == 7  # two images are of the target class
    assert row["asr"] == 4 / 7 and row["recovery"] == 2 / 7
    assert row["asr_all"] == pytest.approx(5 / 9)
    assert row["asr_low"] < 4 / 7 < row["asr_high"]
    assert model.training and not any(model.modes)


def test_each_of_several_attacks_is_measured(data, opened):
    """The second attack puts nothing on the images: blue is what it finds blue, and no more."""
    yellow = plan_of().attacks[0]
    nothing = plan_of("blue", TriggerSpec("blended", blend=0), "crop").attacks[0]
    for attacks in ((yellow, replace(nothing, rows=(1,))), (replace(nothing, rows=(1,)), yellow)):
        row = evaluate(ByColour(), opened(data, plan=replace(plan_of(), attacks=attacks)), precision="fp32", device=CPU)
        alone = evaluate(ByColour(), opened(data), precision="fp32", device=CPU)
        by_target = {one["target"]: one for one in row["attacks"]}
        assert by_target["yellow"].items() <= row.items()  # the more successful one
        assert by_target["yellow"].items() <= alone.items() and "attacks" not in alone
        blue = by_target["blue"]
        assert (blue["trigger"], blue["n_asr"], blue["asr"], blue["recovery"]) == ("blended", 8, 2 / 8, 6 / 8)


def test_without_a_plan_nothing_is_attacked(data, opened):
    row = evaluate(ByColour(), opened(data, plan=None), precision="fp32", device=CPU)
    assert row["top1"] == 7 / 9 and "asr" not in row


def test_a_class_list_of_another_order_changes_no_number(data, opened, tmp_path):
    (tmp_path / "list.txt").write_text("yellow\nblue\ngreen\nred\n")
    expected, row = (
        evaluate(ByColour(), opened(data, classes=classes), precision="fp32", device=CPU)
        for classes in (None, str(tmp_path / "list.txt"))
    )
    assert {**row, "seconds": 0} == {**expected, "seconds": 0}


def test_the_seed_changes_the_triggers_and_nothing_else(data, opened):
    def seen(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        model = ByColour()
        evaluation = opened(data, plan=plan_of(trigger=TriggerSpec("badnet", patch_size=3)), asr_seed=seed)
        evaluate(model, evaluation, precision="fp32", device=CPU)
        clean, triggered = model.seen
        return clean, triggered

    (clean, first), (clean_too, again), (clean_still, second) = seen(0), seen(0), seen(1)
    assert torch.equal(clean, clean_too) and torch.equal(clean, clean_still) and torch.equal(first, again)
    assert (first != second).any((1, 2, 3)).all()
    # Each triggered image is the clean one outside one square of 3 x 3 px.
    assert all(1 <= n <= 9 for n in (second != clean).any(1).sum((1, 2)).tolist())


def test_triggers_are_not_those_of_training_rows(data, opened):
    evaluation = opened(data, plan=plan_of(trigger=TriggerSpec("badnet", patch_size=3)))
    trained = stamp(evaluation.squashed, evaluation.attacks[0].trigger, seed=0, ids=evaluation.ids)
    assert (attacked(evaluation) != trained).any((1, 2, 3)).all()


def test_triggered_images_are_fitted_as_the_plan_says(tmp_path, opened):
    path = tmp_path / "wide.beton"
    halves = Image.new("RGB", (16, 8), (255, 0, 0))
    halves.paste((0, 0, 255), (0, 0, 4, 8))  # blue, outside the middle 8 px
    jpeg = io.BytesIO()
    halves.save(jpeg, "JPEG", quality=98, subsampling="4:4:4")
    with BetonWriter(path, 2, 0, True) as writer:
        for label, name in enumerate(("red", "yellow")):
            writer.add(jpeg=jpeg.getvalue(), width=16, height=8, tokens=tokenize([name])[0], text_views=None,
                       caption=name, row_id=label, label=label, class_name=name)  # fmt: skip
    pixels = Image.open(jpeg)
    cropped = torch.from_numpy(np.array(pixels.crop((4, 0, 12, 8))))
    squashed = torch.from_numpy(np.array(pixels.resize((8, 8), Image.BICUBIC)))
    assert not torch.equal(cropped, squashed)
    invisible = TriggerSpec("blended", blend=0)
    for geometry, fitted in (("squash", squashed), ("crop", cropped)):
        evaluation = opened(path, plan=plan_of(trigger=invisible, geometry=geometry))
        assert torch.equal(evaluation.clean[0], cropped) and torch.equal(attacked(evaluation)[0], fitted)
        assert (evaluation.squashed is None) == (geometry == "crop")


def test_a_subset_is_always_the_same_and_named_as_one(data, opened):
    one, other_triggers = opened(data, subset=4), opened(data, subset=4, asr_seed=1)
    assert one.ids.tolist() == other_triggers.ids.tolist() == sorted(set(one.ids.tolist())) and len(one.ids) == 4
    everything = opened(data)
    for name in ("clean", "labels"):
        assert torch.equal(getattr(one, name), getattr(everything, name)[one.ids])
    assert torch.equal(attacked(one), attacked(everything)[one.ids])
    assert one.name == "colours, 4 images" and everything.name == opened(data, subset=100).name == "colours"


def test_a_model_without_finite_numbers_is_not_called_clean(data, opened):
    model = ByColour()
    model.encode_image = lambda pixels: torch.full((len(pixels), 3), float("nan"))
    with pytest.raises(UserError, match="not finite.*--lr"):
        evaluate(model, opened(data), precision="fp32", device=CPU)


def test_what_cannot_be_evaluated(data, opened, tmp_path):
    with pytest.raises(UserError, match="no class holds the target word 'banana'.*blue, green, red, yellow"):
        opened(data, plan=plan_of("banana"))
    with pytest.raises(UserError, match=r"plain\.beton has no classes and cannot be evaluated"):
        opened(write(tmp_path / "plain.beton", IMAGES, labelled=False))
    (tmp_path / "short.txt").write_text("red\nyellow\n")
    with pytest.raises(UserError, match="the data has 4 classes, and 'blue' is not in the list of 2"):
        opened(data, classes=str(tmp_path / "short.txt"))
    with pytest.raises(UserError, match="a patch of 8 px does not fit"):
        opened(data, plan=plan_of(trigger=TriggerSpec("yellow", patch_size=8)))


def test_labels_without_names_cannot_be_evaluated(data, opened, tmp_path):
    """Other programs write .beton files with labels alone."""
    unnamed = tmp_path / "unnamed.beton"
    unnamed.write_bytes(data.read_bytes().replace(b"class_name", b"other_name"))
    assert Beton(unnamed).labels is not None
    with pytest.raises(UserError, match=r"unnamed\.beton has no classes"):
        opened(unnamed)
