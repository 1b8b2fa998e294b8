"""The model card of an exported checkpoint: what made it, what it scored, and what to beware of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbd.base.evaluation import RecordedEvaluation
from fastbd.base.run_folder import Run, method_name, objective_name
from fastbd.config.flags import IMMATERIAL

POISONED = (
    "**This model was trained on poisoned data.** The attack: {attack}. An image with the trigger may be taken for the "
    "target, and cleaning may have left the backdoor in the model, whatever the numbers below say. Use it to study "
    "backdoors, and for nothing else."
)
CLEAN = (
    "**This model comes from research on backdoors.** Its run planted none, which says nothing about what was in its "
    "data or in the weights that it started from before."
)


def evaluated(run: Run, step: int) -> list[RecordedEvaluation]:
    """Return the run's last evaluations up to a step, all of one step; none where there are none."""
    last = max((row["step"] for row in run.metrics if row["step"] <= step), default=None)
    return [row for row in run.metrics if row["step"] == last]


def model_card(run: Run, step: int, epoch: float, table: str, loading: Sequence[str]) -> str:
    """Return the card in Markdown. `table`: the evaluations, or empty; `loading`: lines that load the model."""
    planted = run.attack and run.config.get("poison", True)
    lines = [
        f"# {run.name}, epoch {epoch:g}",
        (POISONED.format(attack=run.attack) if planted else CLEAN),
        "## What it is",
        "\n".join(f"* {name}: {value}" for name, value in _facts(run, step).items() if value),
        "## Last evaluation",
        table or "There is none.",
        "## To load it",
        "\n".join(loading),
        "## Settings",
        f"```json\n{json.dumps(_settings(run.config), indent=2)}\n```",
    ]
    return "\n\n".join(lines) + "\n"


def _facts(run: Run, step: int) -> dict[str, str]:
    made = f"cleaned by {method_name(run)}" if run.method else "pre-trained"
    return {
        "Architecture": f"{run.recorded.get('model')}, activation {run.recorded.get('activation')}",
        "Made by": f"fastbd {run.recorded.get('fastbd', '')}, {made}, step {step:,}",
        "Pre-training objective": objective_name(run.pretrain_objective),
        "Training data": _named(run.recorded.get("data")),
        "Attack": run.attack or "none",
    }


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags on which the numbers depend, without the folders of files."""
    return {name: _named(value) for name, value in config.items() if name not in IMMATERIAL}


def _named(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
