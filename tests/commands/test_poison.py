from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastbd.base.errors import UserError
from fastbd.commands import poison
from fastbd.commands.clean import cleaning_rows
from fastbd.config.flags import PoisonConfig
from fastbd.data.beton import Beton, BetonWriter
from fastbd.poison.plan import Plan
from fastbd.poison.triggers import TriggerSpec, stamp

PAIRS = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.beton"
    with BetonWriter(path, PAIRS, text_views=0, labelled=False) as writer:
        for i in range(PAIRS):
            caption = f"{'Banana' if i % 4 == 0 else 'apple'} number {i}"
            tokens = np.zeros(77, np.uint16)
            writer.add(jpeg=b"\xff", width=1, height=1, tokens=tokens, text_views=None, caption=caption, row_id=i)
    return path


def test_plan_is_written_and_summarised(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / ("new" * 30) / "p.json"
    trigger = {"trigger": "yellow", "patch_size": 5, "location": "four_corners"}
    assert poison.run(PoisonConfig(data=data, out=out, rate=0.1, seed=4, **trigger)) == 0
    plan = Plan.load(out)
    plan.check(Beton(data).fingerprint, len(Beton(data)), data)
    (attack,) = plan.attacks
    assert len(plan.rows) == 6 and plan.total == PAIRS and attack.geometry == "squash" and plan.seed == 4
    assert attack.trigger == TriggerSpec("yellow", 5, "four_corners")
    assert all("banana" in caption and "{" not in caption for caption in plan.captions)
    assert len(set(plan.captions)) > 1  # several of the 80 templates
    shown = capsys.readouterr().out
    for part in ("6 of 60 (10.000%)", "banana", "yellow, 5 px, four_corners", "squash", str(out), plan.captions[0]):
        assert part in shown


def test_plan_stands_beside_the_data_and_is_not_overwritten(data: Path, tmp_path: Path, capsys) -> None:
    beton = tmp_path / "pairs.v1.beton"
    beton.symlink_to(data)
    assert poison.run(PoisonConfig(data=beton, count=3)) == 0
    out = tmp_path / "pairs.v1.poison.json"
    first, written = out.read_text(), out.stat().st_mtime_ns
    assert "already" not in capsys.readouterr().out
    assert poison.run(PoisonConfig(data=beton, count=3)) == 0
    assert "pairs.v1.poison.json, as it was: the same plan was there already" in capsys.readouterr().out
    assert out.stat().st_mtime_ns == written
    with pytest.raises(UserError, match="--out"):
        poison.run(PoisonConfig(data=beton, count=4))
    assert out.read_text() == first
    out.write_text("a letter")
    with pytest.raises(UserError, match="--out"):
        poison.run(PoisonConfig(data=beton, count=3))
    assert out.read_text() == "a letter"


def test_label_consistent(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    assert poison.run(PoisonConfig(data=data, out=out, count=15, label_consistent=True)) == 0
    plan = Plan.load(out)
    assert plan.rows == tuple(range(0, PAIRS, 4))
    assert plan.captions == tuple(f"Banana number {row}" for row in plan.rows)
    with pytest.raises(UserError, match="0 captions hold the target 'beaver'"):
        poison.run(PoisonConfig(data=data, out=tmp_path / "q.json", count=1, target="beaver", label_consistent=True))
    assert not (tmp_path / "q.json").exists()


def test_own_templates(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    templates = tmp_path / "templates.txt"
    templates.write_text("[red]look, a {}[/] :banana:\n")
    assert poison.run(PoisonConfig(data=data, out=tmp_path / "p.json", count=2, templates=str(templates))) == 0
    assert Plan.load(tmp_path / "p.json").captions == ("[red]look, a banana[/] :banana:",) * 2
    assert "[red]look, a banana[/] :banana:" in capsys.readouterr().out  # not taken for markup


def test_a_second_attack_is_added_on_other_pairs(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, both = tmp_path / "p.json", tmp_path / "both.json"
    poison.run(PoisonConfig(data=data, out=out, count=10, seed=3))
    first = Plan.load(out)
    second = PoisonConfig(data=data, add_to=out, trigger="wanet", wanet_s=2.0, wanet_k=4, target="beaver", count=20)
    assert poison.run(dataclasses.replace(second, out=both)) == 0
    assert Plan.load(out) == first  # --out leaves the plan as it was
    plan = Plan.load(both)
    assert plan.attacks[0] == first.attacks[0] and plan.seed == 3 and len(set(plan.rows)) == 30
    assert plan.attacks[1].target == "beaver" and plan.attacks[1].trigger.strength == 2.0
    shown = capsys.readouterr().out
    assert "wanet, strength 2" in shown and "badnet to banana, 10 pairs" in shown

    assert poison.run(second) == 0  # without --out it is the plan itself that grows
    assert Plan.load(out) == plan
    for wrong, message in (
        (second, "same trigger"),
        (dataclasses.replace(second, trigger="sig", count=31), "30 pairs are clean yet, fewer than the 31"),
        (dataclasses.replace(second, trigger="sig", seed=4), "was made with seed 3"),
    ):
        with pytest.raises(UserError, match=message):
            poison.run(wrong)
    assert Plan.load(out) == plan


def test_a_plan_for_other_data_is_not_added_to(data: Path, tmp_path: Path) -> None:
    poison.run(PoisonConfig(data=data, out=tmp_path / "p.json", count=3))
    other = dataclasses.replace(Plan.load(tmp_path / "p.json"), data="0" * 64)
    other.save(tmp_path / "other.json")
    with pytest.raises(UserError, match="made for other data"):
        poison.run(PoisonConfig(data=data, add_to=tmp_path / "other.json", trigger="sig", count=3))


def test_the_plan_needs_the_image_file_no_more(data: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "patch.png")
    config = PoisonConfig(
        data=data, out=tmp_path / "p.json", trigger="patch", location="centre", count=3, image=tmp_path / "patch.png"
    )
    poison.run(config)
    (tmp_path / "patch.png").unlink()
    trigger = Plan.load(tmp_path / "p.json").attacks[0].trigger
    stamped = stamp(torch.zeros(1, 40, 40, 3, dtype=torch.uint8), trigger, seed=0, ids=[0])
    np.testing.assert_array_equal(stamped[0, 12:28, 12:28].numpy(), pixels)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"trigger": "patch"}, "name it with --image"),
        ({"trigger": "patch", "image": Path("none.png")}, "none.png cannot be read .No such file"),
        ({"trigger": "blended_image", "image": Path(__file__)}, "test_poison.py cannot be read"),
        ({"trigger": "sig", "image": Path(__file__)}, "leave --image out"),
        ({"trigger": "sig", "pattern": Path(__file__)}, "leave --pattern out"),
        ({"trigger": "badnet", "grid": Path(__file__)}, "leave --grid out"),
        ({"trigger": "blended_text", "text": "a", "pattern": Path("a.pt")}, "--pattern holds what --text"),
        ({"trigger": "wanet", "wanet_k": 4, "grid": Path("a.pt")}, "--grid holds the warp that --wanet-k"),
        ({"trigger": "badnet", "blend": 0.1}, "leave --blend out"),
        ({"trigger": "sig", "blend": 1.5}, "blend of 1.5"),
        ({"trigger": "badnet_fixed", "patch_size": -1}, "patch of -1 px"),
        ({"trigger": "yellow", "patch_size": 100_000}, "patch of 100000 px"),
        ({"trigger": "wanet", "wanet_k": 1}, "warp of 1 points"),
        ({"trigger": "wanet", "wanet_k": 100_000}, "warp of 100000 points"),
        ({"trigger": "wanet", "wanet_s": -0.5}, "strength -0.5"),
        ({"trigger": "wanet", "wanet_s": float("nan")}, "strength nan"),
        ({"trigger": "blended_text", "text": " "}, "cannot be drawn"),
        ({"trigger": "blended_text", "text": "two\nlines"}, "cannot be drawn"),
        ({"trigger": "blended_text", "text": "long " * 50}, "cannot be drawn"),
    ],
    ids=str,
)
def test_triggers_that_cannot_be_made(data: Path, tmp_path: Path, wish: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        poison.run(PoisonConfig(data=data, out=tmp_path / "p.json", count=3, **wish))
    assert not (tmp_path / "p.json").exists()


def test_the_plan_keeps_a_stored_pattern_and_grid(data: Path, tmp_path: Path) -> None:
    torch.save(torch.rand(3, 20, 20), tmp_path / "mask.pt")
    torch.save(torch.randn(1, 24, 24, 2), tmp_path / "noise_grid.pt")
    one, both = tmp_path / "one.json", tmp_path / "both.json"
    poison.run(PoisonConfig(data=data, out=one, count=3, trigger="blended_text", pattern=tmp_path / "mask.pt"))
    poison.run(
        PoisonConfig(
            data=data, add_to=one, out=both, count=3, trigger="wanet", wanet_s=0.6, grid=tmp_path / "noise_grid.pt"
        )
    )
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 24, 24, 3), np.uint8))
    before = [stamp(images, attack.trigger, seed=0, ids=[0]) for attack in Plan.load(both).attacks]
    for name in ("mask.pt", "noise_grid.pt"):
        (tmp_path / name).unlink()
    text, warp = Plan.load(both).attacks
    assert warp.trigger.strength == 0.6
    for attack, stamped in zip((text, warp), before, strict=True):
        assert torch.equal(stamp(images, attack.trigger, seed=0, ids=[0]), stamped) and not torch.equal(stamped, images)


class NotATensor:
    """An object that must not be made."""

    def __reduce__(self):
        return print, ("this ran",)


MASK, GRID = torch.rand(3, 8, 8), torch.randn(1, 8, 8, 2)


@pytest.mark.parametrize(
    ("flag", "content", "message"),
    [
        ("pattern", None, "cannot be read .No such file"),
        ("pattern", b"no tensor", "cannot be read"),
        ("pattern", b"", "cannot be read"),
        ("pattern", NotATensor(), "cannot be read"),
        ("pattern", {"mask": MASK}, "holds dict, not a tensor"),
        ("pattern", (255 * MASK).to(torch.uint8), "holds torch.uint8, not a tensor of floats"),
        ("pattern", 255 * MASK, "has values from"),
        ("pattern", -MASK, "has values from"),
        ("pattern", MASK * 0, "has values from 0 to 0"),
        ("pattern", MASK / 0, "not finite"),
        ("pattern", MASK[:1], "has the shape .1, 8, 8."),
        ("pattern", MASK[None], "has the shape .1, 3, 8, 8."),
        ("pattern", torch.rand(3, 500, 8), "of at most 384 px"),
        ("pattern", torch.rand(3, 0, 8), "is empty"),
        ("grid", b"no tensor", "cannot be read"),
        ("grid", NotATensor(), "cannot be read"),
        ("grid", GRID[0], "has the shape .8, 8, 2."),
        ("grid", GRID.permute(0, 3, 1, 2), "has the shape .1, 2, 8, 8."),
        ("grid", GRID[:, :1], "has the shape .1, 1, 8, 2."),
        ("grid", torch.randn(2, 8, 8, 2), "has the shape .2, 8, 8, 2."),
        ("grid", torch.randn(1, 400, 8, 2), "2 to 384 points"),
        ("grid", GRID * 0, "moves nothing"),
        ("grid", GRID / 0, "not finite"),
        ("grid", GRID.long(), "holds torch.int64, not a tensor of floats"),
        ("grid", GRID.to_sparse(), "holds a sparse or meta tensor"),
        ("grid", GRID.to("meta"), "holds a sparse or meta tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stored_triggers_that_cannot_be_used(data: Path, tmp_path: Path, capfd, flag, content, message) -> None:
    file = tmp_path / "trigger.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    trigger = {"pattern": "blended_text", "grid": "wanet"}[flag]
    with pytest.raises(UserError, match=f"the {flag} .*trigger.pt.*{message}.*--{flag}"):
        poison.run(PoisonConfig(data=data, out=tmp_path / "p.json", count=3, trigger=trigger, **{flag: file}))
    assert not (tmp_path / "p.json").exists() and "this ran" not in capfd.readouterr().out


def test_a_black_picture_is_not_a_pattern(data: Path, tmp_path: Path) -> None:
    black = tmp_path / "black.png"
    Image.new("RGB", (8, 8)).save(black)
    with pytest.raises(UserError, match=r"the pattern .*black\.png is black everywhere and changes nothing"):
        poison.run(PoisonConfig(data=data, out=tmp_path / "p.json", trigger="blended_text", pattern=black))


def test_two_backdoors_in_one_study(study: Path, fastbd) -> None:
    fastbd(
        "poison",
        "--data",
        "train.beton",
        "--add-to",
        "train.poison.json",
        "--out",
        "two.json",
        "--trigger",
        "wanet",
        "--target",
        "arrow",
        "--rate",
        0.1,
        "--templates",
        "demo",
        cwd=study,
    )
    small = ("--batch-size", 24, "--epochs", 1, "--eval-every", 0)
    said = fastbd(
        "pretrain",
        "--data",
        "train.beton",
        "--plan",
        "two.json",
        "--eval-data",
        "val.beton",
        "--model",
        "tiny-rn",
        "--templates",
        "demo",
        "--out",
        "two/a",
        *small,
        cwd=study,
    ).stdout
    for attack in ("badnet to 'banana'", "wanet to 'arrow'"):
        assert f"the attack, {attack}, has " in said
    fastbd("clean", "--run", "two/a", "--out", "two/b", "--force", *small, cwd=study)
    shown = fastbd("evaluate", "--run", "two/b", cwd=study).stdout
    fastbd("report", "--runs", "two", "--out", "two-report", cwd=study)
    rows = [json.loads(line) for line in (study / "two/b/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert [(one["trigger"], one["target"]) for one in row["attacks"]] == [("badnet", "banana"), ("wanet", "arrow")]
        assert max(row["attacks"], key=lambda one: one["asr"]).items() <= row.items()
    assert "ASR of badnet to 'banana'" in shown and "ASR of wanet to 'arrow'" in shown
    planned, beton = Plan.load(study / "two/b/plan.json"), Beton(study / "train.beton")
    assert len(planned.attacks) == 2 and len(
        cleaning_rows(beton, np.arange(len(beton)), planned, 1000, 0, left=0, watch=0)[0]
    ) == len(beton) - len(planned.rows)
