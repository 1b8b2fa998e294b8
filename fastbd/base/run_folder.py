"""Run folders, read."""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar, cast

from fastbd.base.errors import UserError
from fastbd.base.evaluation import AttackedEvaluation, Evaluation, RecordedEvaluation, measures_asr
from fastbd.base.files import crc_of, read_json, read_jsonl
from fastbd.config.cards import facts, is_outside, remember, short

E = TypeVar("E", bound=Evaluation)
Row = TypeVar("Row", bound=Mapping[str, Any])
LOGGED = frozenset(
    ["step", "steps", "epoch", "pairs_per_s", "of_limit", "data_wait", "scale", "bad_images", "lr", "uncaptured"]
)
"""What a line of log.jsonl has besides the loss and its parts."""


@dataclass(frozen=True, repr=False)
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
    metrics: tuple[RecordedEvaluation, ...]
    log: tuple[dict[str, Any], ...]
    rows: tuple[RecordedEvaluation, ...]
    """All lines of metrics.jsonl as they are, of which `metrics` are the first of each step and set."""
    recorded: dict[str, Any]
    """All of config.json."""
    result: dict[str, Any]
    """result.json, how the run ended; empty where there is none."""
    attack: str
    """The backdoor of plan.json in words; empty without a plan."""

    def __repr__(self) -> str:
        """Return one line: the name, how it was made, how far it is, and what was measured last."""
        at = max((row["step"] for row in (*self.log, *self.metrics)), default=0)
        last = next((row for row in reversed(self.metrics) if "top1" in row), {})
        shares = {"top-1": last.get("top1"), "ASR": last.get("asr")}
        told = [f"{name} {share:.1%}" for name, share in shares.items() if share is not None]
        return f"<Run {self.name}: {', '.join([self.method or self.verb, f'step {at:,}', *told])}>"

    @property
    def attacks(self) -> tuple[AttackedEvaluation, ...]:
        """The evaluations that measured ASR."""
        return tuple(e for e in self.metrics if measures_asr(e))

    @property
    def cleaned(self) -> tuple[AttackedEvaluation, ...]:
        """Those of a cleaning run that came after its start, on all images; none of a pre-training run."""
        return tuple(e for e in self.attacks if self.verb == "clean" and e["step"] > 0 and not e.get("subset"))

    @property
    def between(self) -> tuple[AttackedEvaluation, ...]:
        """Those of a cleaning run that were made on part of the images, between full ones."""
        return tuple(e for e in self.attacks if self.verb == "clean" and e.get("subset"))

    @property
    def before(self) -> RecordedEvaluation | None:
        """A cleaning run's evaluation of the model that it starts from."""
        return next((e for e in self.metrics if self.verb == "clean" and e["step"] == 0), None)

    @property
    def model(self) -> tuple[str, str, str]:
        """(pre-training objective, weights, checkpoint) of the model that is cleaned, or that pre-training made.

        The weights are named by their sha256, so that a study may be moved; by the folder where that is not recorded.
        """
        if self.start is None:
            return self.pretrain_objective, os.path.abspath(self.path), "last"
        weights = self.recorded.get("start_weights") or os.path.abspath(self.start)
        return self.pretrain_objective, weights, str(self.config.get("checkpoint", "last"))

    @property
    def unfinished(self) -> str:
        """How far a run is that has not ended, as "at epoch 3 of 12"; empty where it has."""
        at, epochs = (
            max((row.get("epoch", 0) for row in self.metrics or self.log), default=0),
            self.config.get("epochs"),
        )
        return "" if self.result or epochs is None or at >= epochs else f"at epoch {at:.3g} of {epochs:g}"

    @property
    def start_step(self) -> int | None:
        """The step at which the model that is cleaned was; None in other runs, and where it was not recorded."""
        return self.recorded.get("start_step")

    @property
    def architecture(self) -> str:
        """The model's name, with an activation that is not its usual one."""
        gelu = " (GELU)" if self.recorded.get("activation") == "gelu" else ""
        return f"{self.recorded.get('model') or '?'}{gelu}"

    @property
    def id(self) -> str:
        """The hash by which a sweep knows the run; empty in other runs."""
        return self.recorded.get("id") or ""


def read(path: Path) -> Run:
    """The run in folder `path`. UserError where there is none, or where a file is damaged before its last line."""
    recorded = read_config(path)
    remember(recorded.get("cards", {}))
    rows = tuple(_evaluations(path))
    try:
        return Run(
            path=path,
            name=recorded.get("name") or path.name,
            verb=recorded["verb"],
            method=recorded["method"],
            objective=recorded["objective"],
            pretrain_objective=recorded["pretrain_objective"],
            start=Path(recorded["start"]) if recorded["start"] else None,
            config=flags_of(recorded),
            env=_checked(path / "env.json"),
            metrics=_first(rows, ("step", "subset", *SET)),
            log=_first(_lines(path / "log.jsonl"), ("step",)),
            rows=rows,
            recorded=recorded,
            result=_checked(path / "result.json"),
            attack=_attack_of(path),
        )
    except KeyError as error:
        raise UserError(f"{path / 'config.json'} has no {error}, so it is not a run's; name another folder.") from None


def run_of(path: Path, flag: str) -> tuple[Path, str | None]:
    """(the run folder that `path` means, which of its checkpoints where `path` is the file of one: last, or a number).

    A folder, or what is not there, is taken as it is, and a link to a checkpoint as that. UserError that names the flag
    for any other file.
    """
    if path.is_dir() or not path.exists():
        return path, None
    if path.is_symlink() and not (path.parent / "config.json").is_file():
        path = path.resolve()
    folder = path.parent
    found = re.fullmatch(r"ckpt_(last|epoch_(?P<epoch>\d+))\.pt", path.name)
    if found and (folder / "config.json").is_file():
        return folder, str(int(found["epoch"])) if found["epoch"] else "last"
    if (folder / "config.json").is_file() and (folder / "env.json").is_file():
        raise UserError(f"{flag} {path} is a file in a run folder: give the folder {folder}.")
    raise UserError(
        f"{flag} {path} is a file: give the folder of a run, which weights of other programs become with "
        f"python -m fastbd pretrain --weights {quote(str(path))} --epochs 0."
    )


def study_folder_of(run: Path) -> Path | None:
    """Return the folder of the study that a run folder is part of; None where it is part of none."""
    runs = run.resolve().parent
    return runs.parent if runs.name == "runs" and any(runs.parent.glob("study.*/study.json")) else None


def flags_of(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that config.json tells of, with those that runs had before there was a flag to record."""
    of_method = {"lr_start": None} if recorded.get("method") == "par" else {}
    return {"schedule": "exact", "exempt": "vectors", **of_method, **recorded["config"]}


def read_config(path: Path) -> dict[str, Any]:
    """config.json of the run folder `path`: how it was made, and under "config" with what flags.

    UserError where it does not say so.
    """
    found = _json(path / "config.json")
    for name, kind in (("verb", str), ("config", dict)):
        if not isinstance(found.get(name), kind):
            raise UserError(f"{path / 'config.json'} has no '{name}', so it is not a run's; name another folder.")
    _check(path / "config.json", found)
    _check(path / "config.json", found["config"])
    return found


def read_metrics(path: Path) -> tuple[RecordedEvaluation, ...]:
    """The evaluations that the run in folder `path` has made itself, in order of steps; none where there is no run yet.

    Not those that `fastbd evaluate` has added, which name their checkpoint.
    """
    rows = [row for row in _evaluations(path) if "checkpoint" not in row]
    return _first(rows, ("step", *SET))


def on_all_images(rows: Iterable[E]) -> list[E]:
    """Without those that --eval-between made on part of the images."""
    return [row for row in rows if not row.get("subset")]


def find(paths: Iterable[Path]) -> list[Run]:
    """The runs in `paths`, each a run folder or a folder that contains run folders. UserError where there is none."""
    found: dict[str, Run] = {}
    for path in paths:
        folders = [path] if (path / "config.json").exists() else sorted(c.parent for c in path.rglob("config.json"))
        if not path.exists():
            raise UserError(f"there is no folder {path}: give one of runs, or that of a run.")
        folders = [folder for folder in folders if folder.suffix != ".tmp"]  # one that is being made, or was given up
        if not folders:
            raise UserError(f"{path} is no run folder and contains none: no config.json; name the folder of a run.")
        found |= {os.path.realpath(folder): read(folder) for folder in folders}
    return _with_weights(list(found.values()))


def _with_weights(runs: list[Run]) -> list[Run]:
    """Return the runs; a cleaning without `start_weights` has those of its start's others, if they agree."""
    known: dict[tuple, set[str]] = {}
    for run in runs:
        if weights := run.recorded.get("start_weights"):
            known.setdefault((run.start, run.config.get("checkpoint")), set()).add(weights)
    alone = {start: {"start_weights": found.pop()} for start, found in known.items() if len(found) == 1}
    return [
        replace(run, recorded=alone.get((run.start, run.config.get("checkpoint")), {}) | run.recorded) for run in runs
    ]


def on_common_set(runs: Sequence[Run]) -> list[Run]:
    """The runs with only the zero-shot evaluations on the set that most were made on: two sets do not compare.

    Without pre-trainings that have made no model: those that diverged, or have neither ended nor been evaluated.
    """
    given, runs = len(runs), [run for run in runs if run.verb != "pretrain" or _made_a_model(run)]
    runs = _with_content(runs)
    sets = Counter(_set(e) for run in runs for e in run.metrics if "top1" in e)
    if not sets:
        raise UserError(f"none of the {given} runs has an evaluation yet: give --eval-data when training.")
    common = sets.most_common(1)[0][0]
    return [replace(run, metrics=tuple(e for e in run.metrics if _set(e) == common)) for run in runs]


def _with_content(runs: Sequence[Run]) -> list[Run]:
    """Return the runs; an evaluation that does not know its `content` has that of its set's others, if they agree."""
    known: dict[tuple, set[str]] = {}
    for evaluation in (e for run in runs for e in run.metrics if "content" in e):
        known.setdefault(_named(evaluation), set()).add(evaluation["content"])
    alone = {name: {"content": found.pop()} for name, found in known.items() if len(found) == 1}
    return [replace(run, metrics=tuple(alone.get(_named(e), {}) | e for e in run.metrics)) for run in runs]


def _named(evaluation: Evaluation) -> tuple:
    """Return what an older evaluation says of its set."""
    return tuple(evaluation.get(key) for key in SET if key != "content")


def _made_a_model(run: Run) -> bool:
    """Whether a pre-training has one to show: it has ended well, or been evaluated."""
    return run.result.get("reason") != "diverged" and bool(run.result or run.metrics)


def _set(evaluation: Evaluation) -> tuple:
    return tuple(evaluation.get(key) for key in SET)


def objective_name(objective: str) -> str:
    """As papers write it."""
    name, *defence = objective.split("+")
    return " with ".join([facts("objective", name).title, *(facts("robust", each).title for each in defence)])


def method_name(run: Run) -> str:
    """As papers write it; fine-tuning with its loss."""
    name = facts("method", run.method or "").title
    return f"{name} ({objective_name(run.objective)})" if run.method == "finetune" else name


def slug(run: Run) -> str:
    """The cleaning method in one word; fine-tuning with its loss."""
    return f"{run.method}_{run.objective}" if run.method == "finetune" else run.method or ""


def _attack_of(path: Path) -> str:
    try:
        plan = _json_if_there(path / "plan.json")
        if plan.pop("crc32", None) not in (None, crc_of(plan)):
            raise UserError(f"{path / 'plan.json'} is damaged or was changed: {REMEDY}.")
        return _in_words(plan)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path / 'plan.json'} is damaged (it is not a plan): {REMEDY}.") from None


def _in_words(plan: dict[str, Any]) -> str:
    """A plan's attacks without the rows and the seed, which differ from one draw of the same attack to the next."""
    said = []
    for attack in plan.get("attacks", [plan] if plan else []):  # version 1 held one attack
        trigger = attack.get("trigger", {})
        name = trigger.get("name", "?")
        words = [short(name)]
        words += [f"{trigger['patch_size']} px {trigger['location']}"] if _has_place(trigger) else []
        words += [f"blend {trigger['blend']:g}"] if trigger.get("blend") else []
        words += [f"strength {trigger['strength']:g}"] if name == "wanet" else []
        words += [f"picture {zlib.crc32(trigger['pattern'].encode()):08x}"] if trigger.get("pattern") else []
        words += ["label-consistent"] if attack.get("label_consistent") else []
        words += ["cropped"] if attack.get("geometry") == "crop" else []
        words.append(f"{len(attack.get('pairs', ())):,} of {plan.get('total', 0):,} pairs")
        said.append(f"{', '.join(words)}, to \u201c{attack.get('target', '?')}\u201d")
    return "; ".join(said)


def _has_place(trigger: dict[str, Any]) -> bool:
    """Whether a plan's trigger is a patch; one of outside code, that may not be one, where size or place were given."""
    name = trigger.get("name", "?")
    if is_outside(name):
        return (trigger["patch_size"], trigger["location"]) != (16, "random")
    return facts("trigger", name).patch


def _json_if_there(path: Path) -> dict[str, Any]:
    return _json(path) if path.exists() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path, REMEDY)
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.exists():
            raise UserError(f"there is no folder {path.parent}: give that of a run.") from None
        raise UserError(f"{path.parent} is no run folder: it has no {path.name}; name the folder of a run.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (it is not an object): {REMEDY}.")
    return found


def _evaluations(path: Path) -> list[RecordedEvaluation]:
    """The lines of the run folder's metrics.jsonl."""
    return cast("list[RecordedEvaluation]", _lines(path / "metrics.jsonl"))  # which a run has written


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a last line cut short by a killed process is left out."""
    rows = [row for row in read_jsonl(path, "remove that line, or go on without this run") if "step" in row]
    if wrong := [row["step"] for row in rows if type(row["step"]) is not int]:
        raise UserError(f"{path} is damaged (step {wrong[0]!r} is not a number): mend it, or go on without this run.")
    for row in rows:
        _check(path, {**row, "classes": None})  # those of an evaluation are no text
    return rows


def _checked(path: Path) -> dict[str, Any]:
    """The object of a .json file, empty where there is no file, with what the file must have."""
    found = _json_if_there(path)
    _check(path, found)
    if rebound := found.get("rebound"):  # of result.json
        _check(path, {"rebound_max": None, **(rebound if isinstance(rebound, dict) else {})})
    return found


def _check(path: Path, values: dict[str, Any]) -> None:
    """Raise a UserError where one of KINDS in an object of the file is something else, or a rebound has no course."""
    for kind, what, names in KINDS:
        for name in names.split():
            if name in values and not isinstance(values[name], kind):
                raise UserError(f"{path} is damaged ({name} {values[name]!r:.80} is not {what}): {REMEDY}.")
    if "rebound_max" in values and not _is_course(values.get("rebound")):
        raise UserError(f"{path} is damaged (its rebound is not a course of ASR along steps): {REMEDY}.")


def _is_course(rebound: Any) -> bool:
    """Return whether it has lists of numbers for steps and ASR."""
    lists = [rebound.get(key) for key in ("steps", "asr")] if isinstance(rebound, dict) else [None]
    return all(isinstance(each, list) and each and isinstance(each[0], int | float) for each in lists)


def _first(rows: Sequence[Row], key: tuple[str, ...]) -> tuple[Row, ...]:
    """The first row of each key, in order of steps.

    `fastbd evaluate` adds rows that may be of another subset or trigger; what training itself measured comes first.
    """
    unique = {tuple(row.get(k) for k in key): row for row in reversed(rows)}
    return tuple(sorted(unique.values(), key=lambda row: row["step"]))


REMEDY = "put a copy of it back, or go on without this run"
KINDS: Sequence[tuple[Any, str, str]] = (  # a kind of value, what it is called, names in run folders that have it
    (str, "a text", "objective pretrain_objective fastbd set target trigger device reason"),
    (
        str | None,
        "a text",
        "name id command checkpoint method start start_weights model activation data eval_data classes templates views "
        "class_list content commit date gpu torch",
    ),
    (
        int | float,
        "a number",
        "epoch seconds train_seconds evaluate_seconds devices rebound_max rebound_change rebound_area "
        "top1_low top1_high asr_low asr_high recovery_low recovery_high loss top1 n n_asr n_classes",
    ),
    (
        int | float | None,
        "a number",
        "lr seed epochs rows pairs poison_left start_step cpu_cores threads pairs_per_s data_wait of_limit "
        "asr recovery val_loss drift_image drift_text agreement rebound_lr",
    ),
    (dict, "an object", "built cards"),
)
SET = ("set", "content", "class_list", "templates")  # what makes the numbers of two evaluations comparable
