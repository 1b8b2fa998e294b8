"""Every cleaning method goes its first steps, and one of them with every trigger.

They do not meet: triggers are stamped when data are read, and a method sees pixels.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from steps import ONE
from tables import table

from fastbd.commands import clean, poison, pretrain
from fastbd.config.cards import METHODS, TRIGGERS
from fastbd.config.flags import CleanConfig, PoisonConfig, PretrainConfig, config_of
from fastbd.training.reuse import Kept
from fastbd.training.run import Run, execute

OWN = {
    "par": {"views": "par"},
    "unlearn": {"flagged": 6},
    "deep_cluster": {"clusters": 4},
}
SMALL = dict(batch_size=24, eval_every="0", device="cpu")
kept = Kept()


@pytest.fixture(scope="module")
def starts(study, tmp_path_factory):
    """A run folder for each trigger, of a model that has learned nothing."""
    folder = tmp_path_factory.mktemp("starts")
    picture = next(Path(study).rglob("*.jpg"))
    for trigger in TRIGGERS:
        of = {"image": picture} if trigger in ("patch", "blended_image") else {}
        plan = folder / f"{trigger}.json"
        poison.run(
            PoisonConfig(
                data=study / "train.beton", trigger=trigger, rate=0.1, out=plan, templates="demo", patch_size=8, **of
            )
        )
        start = PretrainConfig(
            model="tiny-rn",
            data=str(study / "train.beton"),
            plan=plan,
            eval_data=study / "val.beton",
            epochs=0,
            templates="demo",
            out=folder / trigger,
            **SMALL,
        )
        execute(start, lambda world, start=start: pretrain.task(start, world))
    return folder


CASES = [*((method, "badnet") for method in METHODS), *(("finetune", name) for name in TRIGGERS if name != "badnet")]


def test_each_method_and_each_trigger_is_among_the_cases():
    methods, triggers = map(set, zip(*CASES, strict=True))
    assert methods == set(METHODS) and triggers == set(TRIGGERS)


USUAL = [
    *((method, "badnet") for method in METHODS),
    ("finetune", "blended"),  # a blend, and below a warp; badnet is a patch
    ("finetune", "wanet"),
]


@pytest.mark.parametrize(("method", "trigger"), table(CASES, *USUAL))
def test_a_method_goes_its_first_steps(method, trigger, starts, study, tmp_path):
    own = {"data": study / "val.beton", "rows": 60, "batch_size": 20} if method == "supervised" else {"rows": 72}
    config = config_of(CleanConfig, method)(
        run=starts / trigger,
        method=method,
        epochs=1,
        lr=1e-3,
        force=True,
        log_every=1,
        out=tmp_path / "run",
        **SMALL | own | OWN.get(method, {}),
    )
    run = Run(config, clean.task(config, ONE), ONE, kept, quiet=True)
    assert run.train() == "finished"
    losses = [json.loads(line)["loss"] for line in (run.folder.path / "log.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert [row["step"] for row in rows] == [0, 3] and all(row["trigger"] == trigger for row in rows)
