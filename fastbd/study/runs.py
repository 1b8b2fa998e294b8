"""Run folders, read."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastbd.errors import UserError

Evaluation = dict[str, Any]  # a line of metrics.jsonl; accuracies, ASR and the ends of their intervals are fractions


@dataclass(frozen=True)
class Run:
    """One run folder. `metrics` and `log` are in order of steps."""

    path: Path
    name: str
    verb: str
    method: str | None
    objective: str
    pretrain_objective: str
    start: Path | None
    config: dict[str, Any]
    env: dict[str, Any]
    metrics: tuple[Evaluation, ...]
    log: tuple[dict[str, Any], ...]

    @property
    def attacks(self) -> tuple[Evaluation, ...]:
        """The evaluations that measured ASR."""
        return tuple(e for e in self.metrics if e.get("asr") is not None)

    @property
    def cleaned(self) -> tuple[Evaluation, ...]:
        """Those of a cleaning run that came after its start; none of a pre-training run."""
        return tuple(e for e in self.attacks if self.verb == "clean" and e["step"] > 0)

    @property
    def model(self) -> tuple[str, str, str]:
        """(pre-training objective, folder, checkpoint) of the model that is cleaned, or that pre-training made."""
        if self.start is None:
            return self.pretrain_objective, os.path.abspath(self.path), "last"
        return self.pretrain_objective, os.path.abspath(self.start), str(self.config.get("checkpoint", "last"))


def read(path: Path) -> Run:
    """The run in folder `path`. UserError where there is none, or where a file is damaged before its last line."""
    recorded = read_config(path)
    try:
        return Run(
            path=path,
            name=recorded.get("name") or path.name,
            verb=recorded["verb"],
            method=recorded["method"],
            objective=recorded["objective"],
            pretrain_objective=recorded["pretrain_objective"],
            start=Path(recorded["start"]) if recorded["start"] else None,
            config=recorded["config"],
            env=_json(path / "env.json") if (path / "env.json").exists() else {},
            metrics=_first(_lines(path / "metrics.jsonl"), ("step", *SET)),
            log=_first(_lines(path / "log.jsonl"), ("step",)),
        )
    except KeyError as error:
        raise UserError(f"{path / 'config.json'} has no {error}, so it is not a run's; name another folder.") from None


def read_config(path: Path) -> dict[str, Any]:
    """config.json of the run folder `path`: how it was made, and under "config" with what flags."""
    return _json(path / "config.json")


def find(paths: Iterable[Path]) -> list[Run]:
    """The runs in `paths`, each a run folder or a folder that contains run folders. UserError where there is none."""
    found: dict[str, Run] = {}
    for path in paths:
        folders = [path] if (path / "config.json").exists() else sorted(c.parent for c in path.rglob("config.json"))
        if not folders:
            raise UserError(f"{path} is no run folder and contains none: no config.json; name the folder of a run.")
        found |= {os.path.realpath(folder): read(folder) for folder in folders}
    return list(found.values())


def on_common_set(runs: Sequence[Run]) -> list[Run]:
    """The runs with only the zero-shot evaluations on the set that most were made on: two sets do not compare."""
    sets = Counter(_set(e) for run in runs for e in run.metrics if "top1" in e)
    if not sets:
        raise UserError(f"none of the {len(runs)} runs has an evaluation yet: give --eval-data when training.")
    common = sets.most_common(1)[0][0]
    return [replace(run, metrics=tuple(e for e in run.metrics if _set(e) == common)) for run in runs]


def _set(evaluation: Evaluation) -> tuple:
    return tuple(evaluation.get(key) for key in SET)


def objective_name(objective: str) -> str:
    """As papers write it."""
    return OBJECTIVES.get(objective, objective)


def method_name(method: str) -> str:
    """As papers write it."""
    return METHODS.get(method, method)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no run folder: it has no {path.name}; name the folder of a run.") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); leave this run out.") from None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a last line cut short by a killed process is left out."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"line {number} of {path} is damaged; remove it, or leave this run out.") from None
    return rows


def _first(rows: list[dict[str, Any]], key: tuple[str, ...]) -> tuple[dict[str, Any], ...]:
    """The first row of each key, in order of steps.

    `fastbd evaluate` adds rows that may be of another subset or trigger; what training itself measured comes first.
    """
    unique = {tuple(row.get(k) for k in key): row for row in reversed(rows)}
    return tuple(sorted(unique.values(), key=lambda row: row["step"]))


SET = ("set", "class_list", "templates")  # what makes the numbers of two evaluations comparable
OBJECTIVES = {"mmcl": "MMCL", "ssl": "SSL", "mmcl_ssl": "MMCL+SSL"}
METHODS = {
    "cleanclip": "CleanCLIP",
    "finetune": "Finetuning",
    "shrink_perturb": "Shrink and perturb",
    "deep_cluster": "Deep clustering",
    "supervised": "Supervised fine-tuning",
}
