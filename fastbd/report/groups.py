"""Which runs belong together: those that clean one kind of pre-trained model in one way."""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbd.base.run_folder import Run, flags_of, method_name, objective_name, read_config
from fastbd.config.cards import OBJECTIVES
from fastbd.config.fields import marked
from fastbd.config.flags import CLEANING, IMMATERIAL, TRAINING
from fastbd.report.format import rate

Settings = tuple[tuple[str, str], ...]  # (flag, it and its value in words)
Kind = tuple[str, tuple[str, str, str], Settings, str, Settings]  # what a Group has beside its runs


@dataclass(frozen=True)
class Group:
    """Runs of one cleaning method on pre-trained models that differ by seed only; of no method: those models' own.

    The group is searched for its best evaluation: over learning rates, and over what a search draws along with them.
    """

    objective: str
    """Of the pre-training."""
    place: tuple[str, str, str]
    """Architecture, training data and attack."""
    varied: Settings
    """Settings of the pre-training that differ among the models of one objective in the study; often empty."""
    cleaning: str
    """The method as papers write it; empty: not cleaned."""
    settings: Settings
    """Those of the cleaning, and of its set, that the study compares."""
    runs: tuple[Run, ...]
    pretraining: tuple[Mapping[str, Any], ...]
    """For each run the settings of its model's pre-training that make another kind of model, and its checkpoint."""

    @property
    def variant(self) -> str:
        """What is varied in the pre-training, in words."""
        return _in_words(self.varied)

    @property
    def method(self) -> str:
        """The cleaning with its settings; empty: not cleaned."""
        return ", ".join(filter(None, (self.cleaning, _in_words(self.settings))))

    @property
    def model(self) -> str:
        return objective_name(self.objective) + (f", {self.variant}" if self.variant else "")


def groups(runs: Sequence[Run]) -> list[Group]:
    """A group for each (pre-trained model, method), and one for each model that no run cleans."""
    sizes = {_asked(run) for run in runs if run.verb == "clean"}
    gone_on = _gone_on(runs)
    compared = {name: _compared(alike) for name, alike in _by_method(runs).items()}
    named: dict[str, list[Run]] = {}
    for run in runs:
        named.setdefault(run.path.resolve().name, []).append(run)
    starts = [_recorded_start(run, named) for run in runs]
    flags = [_flags(run, start) for run, start in zip(runs, starts, strict=True)]
    for run, own in zip(runs, flags, strict=True):
        if run.start in gone_on and run.start_step is not None:
            own["step"] = run.start_step
    used = {run.start.name for run in runs if run.start}  # by name, so that a study may be moved
    kinds: dict[str, list[dict[str, Any]]] = {}
    for run, own in zip(runs, flags, strict=True):
        if own not in kinds.setdefault(run.pretrain_objective, []):
            kinds[run.pretrain_objective].append(own)
    found: dict[Kind, list[tuple[Run, dict[str, Any]]]] = {}
    for run, start, own in zip(runs, starts, flags, strict=True):
        if run.verb == "clean" or run.path.resolve().name not in used:
            varied = _differing(own, kinds[run.pretrain_objective])
            place = (run.architecture, _data(start or run.recorded), run.attack)
            method, settings = "", ()
            if run.verb == "clean":
                method = method_name(run)
                settings = (*_told(run.config, compared[method]), *_cleaned_on(run, start, sizes))
            found.setdefault((run.pretrain_objective, place, varied, method, settings), []).append((run, own))
    ordered = sorted(found.items(), key=lambda item: _order(item[0]))
    return [Group(*kind, *zip(*members, strict=True)) for kind, members in ordered]


def cleaned_groups(runs: Sequence[Run]) -> list[Group]:
    """Those of a cleaning method; `runs` with the pre-training ones, which tell what sets the models apart."""
    return [group for group in groups(runs) if group.method]


def ends(group: Group) -> str:
    """How many of the group's runs diverged, and how many have not ended, in words; empty where none."""
    diverged = [run for run in group.runs if run.result.get("reason") == "diverged"]
    going = [run for run in group.runs if run.unfinished]
    said = []
    if diverged:
        rates = ", ".join(rate(lr) for lr in sorted({run.config.get("lr") or 0 for run in diverged}) if lr)
        said.append(f"{_some(diverged, group)} diverged" + (f" (lr {rates})" if rates else ""))
    if going:
        place = f" has not ended ({going[0].unfinished})" if len(going) == 1 else " have not ended"
        said.append(_some(going, group) + place)
    return " and ".join(said)


def cleaning_of(group: Group) -> str:
    """The group's cleaning, or that there is none, with what ends() says."""
    return "; ".join(filter(None, (group.method or "not cleaned", ends(group))))


def _some(runs: Sequence[Run], group: Group) -> str:
    """Those of the group's runs, "1 of 3 runs"."""
    name = "run" if group.method else "pre-training"
    return f"the {name}" if len(group.runs) == 1 else f"{len(runs)} of {len(group.runs)} {name}s"


def replicates(group: Group) -> list[tuple[Run, ...]]:
    """The group's runs by pre-trained model and seed of the cleaning: what was drawn anew each time."""
    found: dict[tuple, list[Run]] = {}
    for run in group.runs:
        found.setdefault((run.model, run.config.get("seed")), []).append(run)
    return [tuple(runs) for runs in found.values()]


def models(group: Group) -> int:
    """How many pre-trained models the group has."""
    return len({run.model for run in group.runs})


def by_seed(measured: Iterable[tuple[tuple[Run, ...], float]]) -> list[float]:
    """The values of (replicate, value) pairs that an interval is taken over.

    One a pre-trained model, the mean over the seeds of its cleaning; with a single model, one a seed of the cleaning.
    """
    found: dict[tuple, list[float]] = {}
    for runs, value in measured:
        found.setdefault(runs[0].model, []).append(value)
    return [statistics.fmean(v) for v in found.values()] if len(found) > 1 else [*next(iter(found.values()), [])]


def common(groups: Sequence[Group], of: Callable[[Group], Any]) -> Any | None:
    """What `of` gives for every group, if that is the same for all."""
    values = {of(group) for group in groups}
    return values.pop() if len(values) == 1 else None


def place_of(group: Group, groups: Sequence[Group]) -> str:
    """What of the group's architecture, data and attack others do not have; empty where nothing sets them apart."""
    return apart(", ".join(group.place), [", ".join(other.place) for other in groups])


def apart(own: str, others: Iterable[str]) -> str:
    """The parts of `own`, which commas separate, that not all of `others` have."""
    parts = [other.split(", ") for other in others]
    return ", ".join(part for part in own.split(", ") if part and not all(part in other for other in parts))


def _recorded_start(run: Run, named: dict[str, list[Run]]) -> dict[str, Any] | None:
    """config.json of the pre-training that made the model: one of `named`, by name where the study was moved."""
    if run.start is None:
        return run.recorded
    made = named.get(run.start.name, [])
    made = [other for other in made if os.path.realpath(other.path) == os.path.realpath(run.start)] or made
    if not made and (run.start / "config.json").exists():
        return read_config(run.start)
    return made[0].recorded if made else None


def _flags(run: Run, start: dict[str, Any] | None) -> dict[str, Any]:
    """What may set the pre-training of a run's model apart; where that is not known, the name of its folder."""
    checkpoint = str(run.config.get("checkpoint", "last")) if run.verb == "clean" else "last"
    known = (
        {k: v for k, v in flags_of(start).items() if k not in HARMLESS}
        if start
        else {"folder": (run.start or run.path).name}
    )
    return {**known, "checkpoint": checkpoint}


def _gone_on(runs: Sequence[Run]) -> set[Path]:
    """Return the runs whose last model was cleaned at several steps: their training had gone on meanwhile."""
    last = [run for run in runs if run.start_step is not None and run.config.get("checkpoint", "last") == "last"]
    steps = Counter(start for start, _ in {(run.start, run.start_step) for run in last if run.start})
    return {start for start, times in steps.items() if times > 1}


def _differing(flags: dict[str, Any], alike: Sequence[dict[str, Any]]) -> Settings:
    """The flags that others have with another value; an unknown model is another one than the known."""
    return _told(
        flags, (k for k, v in flags.items() if any(o.get(k, None if k == "folder" else v) != v for o in alike))
    )


def _by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.verb == "clean":
            found.setdefault(method_name(run), []).append(run)
    return found


def _compared(alike: Sequence[Run]) -> list[str]:
    """The flags that the study compares in a method: of several values, unless a search drew one for each run."""
    flags = {flag for run in alike for flag in run.config} - HARMLESS - SEARCHED
    values = {flag: [json.dumps(run.config[flag]) for run in alike if flag in run.config] for flag in sorted(flags)}
    searching = len({run.config.get("lr") for run in alike}) > 1
    most = {flag: max(FEW, len(found) / 2) if searching else len(found) for flag, found in values.items()}
    return [flag for flag, found in values.items() if 1 < len(set(found)) <= most[flag]]


def _told(flags: Mapping[str, Any], names: Iterable[str]) -> Settings:
    """Those of the flags that have one of the names."""
    known = [(name, flags[name]) for name in names if name in flags]
    shown = [(name, f"{value:g}" if isinstance(value, float) else value) for name, value in known]
    return tuple((name, f"{name.replace('_', ' ')} {value}") for name, value in shown)


def _in_words(settings: Settings) -> str:
    return ", ".join(words for _, words in settings)


def _cleaned_on(run: Run, start: dict[str, Any] | None, sizes: set[int]) -> Settings:
    """What sets a cleaning set apart: its size, by --rows, other data than the pre-training's, poison left in it."""
    left = run.config.get("poison_left")
    words = {
        "rows": f"up to {_asked(run):,} pairs" if len(sizes) > 1 else "",  # there may be fewer
        "data": f"of {_data(run.recorded)}" if start and _data(start) != _data(run.recorded) else "",
        "poison_left": f"{left:,} poisoned pairs left" if left else "",
    }
    return tuple((name, said) for name, said in words.items() if said)


def _asked(run: Run) -> int:
    """Return --rows, by which cleanings of two studies are alike; how many there were depends on the attack."""
    return run.config.get("rows") or 0


def _data(recorded: dict[str, Any]) -> str:
    return Path(recorded.get("data") or "").name


def _order(key: Kind) -> tuple:
    objective, place, *rest = key
    order = list(OBJECTIVES)
    return place, order.index(objective) if objective in order else len(order), objective, *rest


FEW = 3  # values that are told apart even if each is in one run only
HARMLESS = IMMATERIAL | marked("same_kind", *TRAINING)
SEARCHED = marked("searched", *CLEANING)
