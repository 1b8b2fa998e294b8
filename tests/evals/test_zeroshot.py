"""Zero-shot evaluation of a model whose embeddings are known."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from colours import CPU, IMAGES, ByColour, plan_of, write
from PIL import Image
from torch import nn

from fastbd.base.errors import UserError
from fastbd.data.beton import Beton, BetonWriter
from fastbd.data.decode import open_decoder
from fastbd.data.tokenizer import tokenize
from fastbd.evals import sets
from fastbd.evals import towers as towers_of
from fastbd.evals.sets import Captioned, Labelled, open_set
from fastbd.evals.towers import Towers
from fastbd.evals.zeroshot import ZeroShot
from fastbd.models import create
from fastbd.poison.triggers import TriggerSpec, stamp


def attacked(data: Labelled) -> torch.Tensor:
    """All images with the trigger of the only attack."""
    (one,) = data.attacked
    return one.images


def evaluate(data: Labelled, model: nn.Module | None = None, **more) -> tuple[dict, nn.Module]:
    """The row, and the copy of the model that was evaluated."""
    towers = Towers(model or ByColour().train(), precision="fp32", device=CPU)
    return ZeroShot(towers, data)(**more), towers.folded.model


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("zeroshot") / "colours.beton", IMAGES)


@pytest.fixture
def opened(tmp_path):
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n{} paint\n")

    def open_(path: Path, **changed) -> Labelled:
        settings = dict(classes=None, templates=str(tmp_path / "templates.txt"), plan=plan_of(), device=CPU) | changed
        return open_set(path, open_decoder("pil", 1, "cpu"), 8, **settings)

    return open_


@pytest.mark.parametrize("batch", [512, 4, 1])
def test_accuracy_asr_and_recovery_by_hand(data, opened, batch, monkeypatch):
    monkeypatch.setitem(towers_of.PIXELS, "cpu", batch * 64)
    row, model = evaluate(opened(data))
    assert (row["set"], row["n"], row["target"], row["trigger"]) == ("colours", 9, "yellow", "yellow")
    assert row["top1"] == 7 / 9 and row["top5"] == 1 and row["n_classes"] == 4
    assert row["n_asr"] == 7  # two images are of the target class
    assert row["asr"] == 4 / 7 and row["recovery"] == 2 / 7
    assert row["asr_all"] == pytest.approx(5 / 9)
    assert row["asr_low"] < 4 / 7 < row["asr_high"]
    assert row["triggered_top1"] == 3 / 9  # the two that are recovered, and the yellow one
    assert not any(model.modes) and len(model.seen) == 2 * -(-9 // batch)


def test_each_of_several_attacks_is_measured(data, opened):
    """The second attack puts nothing on the images: blue is what it finds blue, and no more."""
    yellow = plan_of().attacks[0]
    nothing = plan_of("blue", TriggerSpec("blended", blend=0), "crop").attacks[0]
    for attacks in ((yellow, replace(nothing, rows=(1,))), (replace(nothing, rows=(1,)), yellow)):
        row, _ = evaluate(opened(data, plan=replace(plan_of(), attacks=attacks)))
        alone, _ = evaluate(opened(data))
        by_target = {one["target"]: one for one in row["attacks"]}
        assert by_target["yellow"].items() <= row.items()  # the more successful one
        assert by_target["yellow"].items() <= alone.items() and "attacks" not in alone
        blue = by_target["blue"]
        assert (blue["trigger"], blue["n_asr"], blue["asr"], blue["recovery"]) == ("blended", 8, 2 / 8, 6 / 8)


def test_without_a_plan_nothing_is_attacked(data, opened):
    row, _ = evaluate(opened(data, plan=None))
    assert row["top1"] == 7 / 9 and "asr" not in row


def test_a_class_list_of_another_order_changes_no_number(data, opened, tmp_path):
    (tmp_path / "list.txt").write_text("yellow\nblue\ngreen\nred\n")
    expected, row = (evaluate(opened(data, classes=classes))[0] for classes in (None, str(tmp_path / "list.txt")))
    for key in ("top1", "asr", "asr_all", "recovery", "triggered_top1"):  # top-3 is a matter of ties here
        assert row[key] == expected[key]


def test_the_seed_changes_the_triggers_and_nothing_else(data, opened):
    def seen(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        opened_set = opened(data, plan=plan_of(trigger=TriggerSpec("badnet", patch_size=3)), seeds=(seed,))
        _, model = evaluate(opened_set)
        clean, triggered = model.seen
        return clean, triggered

    (clean, first), (clean_too, again), (clean_still, second) = seen(0), seen(0), seen(1)
    assert torch.equal(clean, clean_too) and torch.equal(clean, clean_still) and torch.equal(first, again)
    assert (first != second).any((1, 2, 3)).all()
    # Each triggered image is the clean one outside one square of 3 x 3 px.
    assert all(1 <= n <= 9 for n in (second != clean).any(1).sum((1, 2)).tolist())


def test_triggers_are_not_those_of_training_rows(data, opened):
    evaluation = opened(data, plan=plan_of(trigger=TriggerSpec("badnet", patch_size=3)))
    trained = stamp(evaluation.clean, evaluation.attacked[0].attack.trigger, seed=0, ids=evaluation.ids)
    assert (attacked(evaluation) != trained).any((1, 2, 3)).all()


def test_triggered_images_are_fitted_as_the_plan_says(tmp_path, opened):
    path = tmp_path / "wide.beton"
    halves = Image.new("RGB", (16, 8), (255, 0, 0))
    halves.paste((0, 0, 255), (0, 0, 4, 8))  # blue, outside the middle 8 px
    jpeg = io.BytesIO()
    halves.save(jpeg, "JPEG", quality=98, subsampling="4:4:4")
    with BetonWriter(path, 2, 0, True) as writer:
        for label, name in enumerate(("red", "yellow")):
            writer.add(
                jpeg=jpeg.getvalue(),
                width=16,
                height=8,
                tokens=tokenize([name])[0],
                text_views=None,
                caption=name,
                row_id=label,
                label=label,
                class_name=name,
            )
    pixels = Image.open(jpeg)
    cropped = torch.from_numpy(np.array(pixels.crop((4, 0, 12, 8))))
    squashed = torch.from_numpy(np.array(pixels.resize((8, 8), Image.BICUBIC)))
    assert not torch.equal(cropped, squashed)
    invisible = TriggerSpec("blended", blend=0)
    for geometry, fitted in (("squash", squashed), ("crop", cropped)):
        evaluation = opened(path, plan=plan_of(trigger=invisible, geometry=geometry))
        assert torch.equal(evaluation.clean[0], cropped) and torch.equal(attacked(evaluation)[0], fitted)
        other = opened(path, plan=plan_of(trigger=invisible, geometry="squash"), geometry=geometry)
        assert torch.equal(attacked(other)[0], fitted)


def test_a_subset_is_always_the_same_and_named_as_one(data, opened):
    one, other_triggers = opened(data, subset=4), opened(data, subset=4, seeds=(1,))
    assert one.ids.tolist() == other_triggers.ids.tolist() == sorted(set(one.ids.tolist())) and len(one.ids) == 4
    everything = opened(data)
    for name in ("clean", "labels"):
        assert torch.equal(getattr(one, name), getattr(everything, name)[one.ids])
    assert torch.equal(attacked(one), attacked(everything)[one.ids])
    assert one.name == "colours, 4 images" and everything.name == opened(data, subset=100).name == "colours"


@pytest.mark.parametrize("tower", ["encode_image", "encode_text"])
def test_a_model_without_finite_numbers_is_not_called_clean(data, opened, tower):
    model = ByColour()
    embed = getattr(model, tower)
    setattr(model, tower, lambda x: torch.nan * embed(x))
    with pytest.raises(UserError, match="not finite, so there is nothing to evaluate"):
        evaluate(opened(data), model)


def test_what_cannot_be_evaluated(data, opened, tmp_path):
    with pytest.raises(UserError, match="no class holds the target word 'banana'.*blue, green, red, yellow"):
        opened(data, plan=plan_of("banana"))
    (tmp_path / "short.txt").write_text("red\nyellow\n")
    with pytest.raises(UserError, match="the data has 4 classes, and 'blue' is not in the list of 2"):
        opened(data, classes=str(tmp_path / "short.txt"))
    with pytest.raises(UserError, match="a patch of 8 px does not fit"):
        opened(data, plan=plan_of(trigger=TriggerSpec("yellow", patch_size=8)))


def test_a_set_that_memory_does_not_hold(data, opened, monkeypatch):
    """9 images of 8 px, and two triggered copies of each."""
    monkeypatch.setattr(sets, "free_memory", lambda: 3 * 9 * 8 * 8 * 3 - 1)
    assert len(opened(data, seeds=(0,)).clean) == 9
    with pytest.raises(UserError, match="9 images and 2 triggered copies needs .* --eval-subset"):
        opened(data, seeds=(0, 1))


def test_labels_without_names_are_no_classes(data, opened, tmp_path):
    """Other programs write .beton files with labels alone."""
    unnamed = tmp_path / "unnamed.beton"
    unnamed.write_bytes(data.read_bytes().replace(b"class_name", b"other_name"))
    assert Beton(unnamed).labels is not None
    assert isinstance(opened(unnamed), Captioned)


def test_several_seeds_give_their_mean_and_an_interval(data, opened):
    """Triggers of 5 x 5 noise hide some colours: which images are taken for yellow is a matter of the draw."""
    plan = plan_of(trigger=TriggerSpec("badnet", patch_size=5))
    alone = [evaluate(opened(data, plan=plan, seeds=(seed,)))[0] for seed in range(4)]
    row, _ = evaluate(opened(data, plan=plan, seeds=range(4)))
    assert row["asr_by_seed"] == [one["asr"] for one in alone] and len(set(row["asr_by_seed"])) > 1
    assert row["recovery"] == pytest.approx(sum(one["recovery"] for one in alone) / 4) and row["n_asr"] == 7
    assert row["asr"] == pytest.approx(sum(row["asr_by_seed"]) / 4)
    assert row["asr_seeds_low"] < row["asr"] < row["asr_seeds_high"]


def test_details_name_each_class(data, opened):
    row, _ = evaluate(opened(data), details=True)
    by_class = {one["class"]: one for one in row["classes"]}
    assert by_class["green"] == {"class": "green", "n": 3, "top1": 2 / 3, "asr": 1 / 3}
    assert by_class["red"] == {"class": "red", "n": 3, "top1": 1.0, "asr": 2 / 3}
    assert row["modality_gap"] >= 0 and row["uniformity"] <= 0


def test_a_subset_says_how_sure_it_is_of_the_whole(data, opened):
    row, _ = evaluate(opened(data, subset=6))
    assert (row["n"], row["population"]) == (6, 9)
    assert row["top1_low"] < row["top1_full_low"] < row["top1"] < row["top1_full_high"] < row["top1_high"]


def test_the_classifier_is_built_again_only_when_the_text_tower_has_changed(data, opened):
    model = create("tiny-rn", 0)
    towers = Towers(model, precision="fp32", device=CPU)
    zeroshot = ZeroShot(towers, opened(data))
    first = zeroshot.weights()
    with torch.no_grad():
        model.visual.conv1.weight.add_(1)
        towers.refresh()
        assert zeroshot.weights() is first
        model.positional_embedding[0, 0] += 1
    towers.refresh()
    assert not torch.equal(zeroshot.weights(), first)
