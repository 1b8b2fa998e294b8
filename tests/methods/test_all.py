"""Every cleaning method goes its first steps, and one of them with every trigger.

They do not meet: triggers are stamped when data are read, and a method sees pixels.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest
from steps import ONE
from tables import table

from fastbd.commands import clean, poison, pretrain
from fastbd.config.cards import METHODS, TRIGGERS
from fastbd.config.flags import CleanConfig, PoisonConfig, PretrainConfig, config_of
from fastbd.poison.plan import Plan
from fastbd.training.reuse import Kept
from fastbd.training.run import Run

OWN = {
    "par": {"views": "par"},
    "unlearn": {"flagged": 6},
    "deep_cluster": {"clusters": 4},
}
SMALL = dict(epochs=1, eval_every="0", log_every=1, device="cpu")
kept = Kept()


def trained(config: PretrainConfig | CleanConfig, verb) -> tuple[list[float], list[dict]]:
    """The losses and the evaluations of a run."""
    run = Run(config, verb.task(config, ONE), ONE, kept, quiet=True)
    assert run.train() == "finished"
    log, metrics = (
        [json.loads(line) for line in (run.folder.path / name).read_text().splitlines()]
        for name in ("log.jsonl", "metrics.jsonl")
    )
    return [row["loss"] for row in log], metrics


@pytest.fixture(scope="module")
def planted(study, tmp_path_factory):
    """planted(*triggers): the folder of a pre-training on pairs with these triggers, and its evaluations."""
    picture = next(Path(study).rglob("*.jpg"))

    @cache
    def made(*triggers: str) -> tuple[Path, list[dict]]:
        folder = tmp_path_factory.mktemp("planted")
        plan = folder / "plan.json"
        for trigger in triggers:
            own = {"image": picture} if trigger in ("patch", "blended_image") else {}
            own |= {"add_to": plan} if plan.exists() else {"out": plan}
            poison.run(
                PoisonConfig(
                    data=study / "train.beton", trigger=trigger, count=8, templates="demo", patch_size=8, **own
                )
            )
        config = PretrainConfig(
            model="tiny-rn",
            data=str(study / "train.beton"),
            plan=plan,
            eval_data=study / "val.beton",
            templates="demo",
            batch_size=80,
            out=folder / "run",
            **SMALL,
        )
        return config.out, trained(config, pretrain)[1]

    return made


@pytest.fixture
def cleaned(study, tmp_path):
    """cleaned(run, method): the losses and the evaluations of three steps."""

    def clean_it(run: Path, method: str) -> tuple[list[float], list[dict]]:
        own = {"rows": 72, "batch_size": 24}
        if method == "supervised":
            own = {"data": study / "val.beton", "rows": 60, "batch_size": 20}
        own |= OWN.get(method, {})
        config = config_of(CleanConfig, method)(
            run=run, method=method, lr=1e-3, force=True, out=tmp_path / "run", **SMALL, **own
        )
        return trained(config, clean)

    return clean_it


ALONE = [*((method, "badnet") for method in METHODS), *(("finetune", name) for name in TRIGGERS if name != "badnet")]


@pytest.mark.parametrize(("method", "trigger"), table(ALONE, *ALONE[: len(METHODS)]))
def test_a_method_goes_its_first_steps(method, trigger, planted, cleaned):
    losses, rows = cleaned(planted(trigger)[0], method)
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert [row["step"] for row in rows] == [0, 3] and all(row["trigger"] == trigger for row in rows)


def test_all_triggers_go_through_a_pretraining_and_a_cleaning(planted, cleaned):
    run, first = planted(*TRIGGERS)
    losses, rows = cleaned(run, "finetune")
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert [row["step"] for row in (*first, *rows)] == [3, 0, 3]
    assert all([attack["trigger"] for attack in row["attacks"]] == list(TRIGGERS) for row in (*first, *rows))
    assert [len(attack.rows) for attack in Plan.load(run / "plan.json").attacks] == len(TRIGGERS) * [8]
