"""What is seen in each figure, for those who cannot see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from fastbd.base.evaluation import AttackedEvaluation, measures_asr
from fastbd.base.run_folder import Run
from fastbd.report.format import share
from fastbd.report.groups import Group, groups, place_of
from fastbd.report.plots import LOSSES, courses, panelled

MOST = 8  # groups that are told one by one


def alts(runs: Sequence[Run]) -> dict[str, str]:
    """The alternative text of each figure, by its name."""
    found = groups(runs)
    cleaned = [group for group in found if group.method]
    pretrained = groups([run for run in runs if run.verb != "clean"])
    points = sum(len(run.cleaned) for run in runs)
    scatter = (
        f"{points:,} evaluations of cleaned models as points of top-1 accuracy against attack success rate. "
        f"{_starts(found)} {_each(cleaned, _cloud)}"
    )
    panels = ", ".join(title.replace("\n", " ") for title in panelled(runs))
    going = f"Attack success rate and top-1 accuracy against epochs, in panels: {_titles(runs)}. "
    return {
        "scatter": scatter.strip(),
        "methods": f"The same points in panels: {panels}.",
        "trajectories": (going + _each(cleaned or found, _course)).strip(),
        "curves": f"Training losses against epochs. {_each([*pretrained, *cleaned], _loss)}".strip(),
    }


def _starts(found: Iterable[Group]) -> str:
    """Where the models are before cleaning."""
    found, said = list(found), {}
    for group in found:
        before = [run.before if group.method else next(iter(run.attacks[::-1]), None) for run in group.runs]
        known = [e for e in before if e and measures_asr(e)]
        if known:
            model = _model(group, found)
            said.setdefault(model, f"{model} {_place(known)}")
    return f"Before cleaning: {'; '.join(said.values())}." if said else ""


def _each(some: Sequence[Group], told: Callable[[Group, str], str]) -> str:
    said = [text for group in some if (text := told(group, _model(group, some)))]
    more = f" And {len(said) - MOST} more groups." if len(said) > MOST else ""
    return " ".join(f"{text}." for text in said[:MOST]) + more


def _model(group: Group, among: Sequence[Group]) -> str:
    """The group's pre-training, with the attack and the like where others have another."""
    place = place_of(group, among)
    return f"{group.model} ({place})" if place else group.model


def _cloud(group: Group, model: str) -> str:
    points = [e for run in group.runs for e in run.cleaned]
    return f"{group.method} after {model}: {_place(points)}" if points else ""


def _course(group: Group, model: str) -> str:
    """Where its runs end."""
    courses = [run.cleaned if group.method else run.attacks for run in group.runs]
    ends = [course[-1] for course in courses if course]
    name = f"{group.method} after {model}" if group.method else model
    return f"{name} ends at {_place(ends)}" if ends else ""


def _loss(group: Group, model: str) -> str:
    """The first and the last total loss of a group."""
    logged = [run.log for run in group.runs if len(run.log) > 1 and "loss" in run.log[0] and "loss" in run.log[-1]]
    if not logged:
        return ""
    first, last = ([log[at]["loss"] for log in logged] for at in (0, -1))
    name = f"{group.method} after {model}" if group.method else model
    return f"{name}: {LOSSES['loss'].lower()} from {_range(first)} to {_range(last)}"


def _place(points: Sequence[AttackedEvaluation]) -> str:
    top1, asr = ([e[key] for e in points] for key in ("top1", "asr"))
    return f"top-1 {_shares(top1)}, ASR {_shares(asr)}"


def _shares(values: Sequence[float]) -> str:
    low, high = share(min(values)), share(max(values))
    return low if low == high else f"{low} to {high}"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low}–{high}"


def _titles(runs: Sequence[Run]) -> str:
    return ", ".join(title.replace("\n", " ") for title in courses(runs) if title) or "one each"
