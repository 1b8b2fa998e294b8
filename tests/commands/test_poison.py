from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastbd.commands import poison
from fastbd.config import PoisonConfig
from fastbd.data.beton import Beton, BetonWriter
from fastbd.errors import UserError
from fastbd.poison.plan import Plan
from fastbd.poison.triggers import TriggerSpec

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
    plan.check(Beton(data).fingerprint, data)
    assert len(plan.rows) == 6 and plan.total == PAIRS and plan.geometry == "squash" and plan.seed == 4
    assert plan.trigger == TriggerSpec("yellow", 5, "four_corners")
    assert all("banana" in caption and "{" not in caption for caption in plan.captions)
    assert len(set(plan.captions)) > 1  # several of the 80 templates
    shown = capsys.readouterr().out
    for part in ("6 of 60 (10.000%)", "banana", "yellow, 5 px, four_corners", "squash", str(out), plan.captions[0]):
        assert part in shown


def test_plan_stands_beside_the_data_and_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    beton = tmp_path / "pairs.v1.beton"
    beton.symlink_to(data)
    assert poison.run(PoisonConfig(data=beton, count=3)) == 0
    out = tmp_path / "pairs.v1.poison.json"
    first = out.read_text()
    assert poison.run(PoisonConfig(data=beton, count=3)) == 0  # the same plan again
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
