"""What a study shows, by rule: does what cleaning keeps depend on what the study varies?

Rows that differ in one thing alone are compared: in the pre-training objective where a method has cleaned models of two
of them, else in whatever the study varies (axes). Each model's share of accuracy kept is the best top-1 at ASR <= 5 %
over the top-1 before cleaning, 0 where no evaluation is within 5 %. The difference of the means of two rows has Welch's
95 % interval over pre-trained models (seeds). The study

    shows       a difference when the interval excludes 0;
    does not    show one when it includes 0 and excludes a difference of PUBLISHED (of objectives: in the published
                direction), as when no model of either side came down to 5 %;
    cannot tell otherwise: with fewer than two pre-trained models on a side, with an interval that includes both, when
                the backdoor had not landed (ASR below 50 %) in some model, or when a model was near chance.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from fastbd.base.evaluation import RecordedEvaluation, measures_asr
from fastbd.base.run_folder import Run
from fastbd.base.stats import Estimate, difference
from fastbd.base.tradeoff import CEILINGS, LANDED, is_near_chance
from fastbd.report.chance import chance
from fastbd.report.format import share
from fastbd.report.groups import Group, Settings, apart
from fastbd.report.tables import Row

Verdict = Literal["shows", "does not show", "cannot tell"]
BASE = "mmcl"
PAPERS = "CleanCLIP"  # the method that the paper asks about
# The smaller of the two of arXiv 2311.14948, table 1: 16.49 / 16.00 - 14.16 / 17.04 with CC3M; with CC6M it is 0.46.
PUBLISHED = 0.20
RULE = (
    "Kept: best top-1 at ASR ≤ {c} as a share of the top-1 before cleaning, 0 where no evaluation comes down that "
    "far. Difference: the first less the second, of the means over pre-trained models, with Welch's 95% interval. The "
    "study shows a difference when the interval excludes 0. It does not show one when the interval includes 0 and "
    "excludes {p} points, the smaller of the two differences in the paper (arXiv 2311.14948: CleanCLIP kept 103% and "
    "101% after MMCL, 83% and 55% after MMCL+SSL), nor when no model of either side came down that far. Otherwise it "
    "cannot tell; nor can it with fewer than two pre-trained models on a side, where a backdoor had not landed (ASR "
    "below {l}), or where the accuracy before cleaning was near chance (the lower end of its interval below twice the "
    "accuracy of guessing). Each comparison is judged by itself."
).format(c=f"{CEILINGS[0]:.0%}", p=f"{100 * PUBLISHED:.0f}", l=f"{LANDED:.0%}")


class Axis(NamedTuple):
    """One thing in which rows can differ."""

    name: str
    """As a sentence names it, after "depends on the"."""
    level: Callable[[Group], str]
    """What a group has of it."""
    same: Callable[[Group], tuple]
    """What two groups must have in common to be compared in it."""
    method: Callable[[Group], str] = lambda g: g.method
    """The cleaning of two such groups, with the settings that both have; empty where they have two methods."""


OBJECTIVE = Axis("pre-training", lambda g: g.objective, lambda g: (g.place, g.method))
METHOD = Axis("cleaning method", lambda g: g.cleaning, lambda g: (g.objective, g.place, g.variant), lambda g: "")
PLACES = (
    Axis("architecture", lambda g: g.place[0], lambda g: (g.objective, g.place[1:], g.variant, g.method)),
    Axis("training data", lambda g: g.place[1], lambda g: (g.objective, g.place[::2], g.variant, g.method)),
    Axis("attack", lambda g: g.place[2], lambda g: (g.objective, g.place[:2], g.variant, g.method)),
)


def _of_pretraining(flag: str) -> Axis:
    return Axis(
        "settings of the pre-training",
        lambda g: dict(g.varied).get(flag, ""),
        lambda g: (g.objective, g.place, _without(flag, g.varied), g.method),
    )


def _of_cleaning(flag: str) -> Axis:
    return Axis(
        "settings of the cleaning",
        lambda g: dict(g.settings).get(flag, ""),
        lambda g: (g.objective, g.place, g.variant, g.cleaning, _without(flag, g.settings)),
        lambda g: ", ".join([g.cleaning, *(words for _, words in _without(flag, g.settings))]),
    )


def _without(flag: str, settings: Settings) -> Settings:
    return tuple(told for told in settings if told[0] != flag)


def axes(groups: Sequence[Group]) -> list[Axis]:
    """Return what the groups can differ in besides the objective, each setting by itself."""
    varied, settings = ({flag: None for g in groups for flag, _ in of(g)} for of in (VARIED, SETTINGS))
    return [*PLACES, *map(_of_pretraining, varied), *map(_of_cleaning, settings), METHOD]


ACROSS = (OBJECTIVE, METHOD)  # of two objectives, or methods, each has settings of its own
VARIED, SETTINGS = attrgetter("varied"), attrgetter("settings")


@dataclass(frozen=True)
class Comparison:
    """Two rows that differ in one thing."""

    axis: Axis
    base: Row
    other: Row
    difference: Estimate
    """Of the shares kept: the base's less the other's."""
    verdict: Verdict
    why: str
    """Why it cannot tell, or has nothing to show; else empty."""

    @property
    def method(self) -> str:
        """The cleaning of both, with the settings that both have; empty where they have two methods."""
        return self.axis.method(self.base.group)

    @property
    def names(self) -> tuple[str, str]:
        """What sets the two sides apart, in words."""
        groups = self.base.group, self.other.group
        if self.axis is OBJECTIVE:
            base, other = (group.model for group in groups)
        elif self.axis is METHOD:
            base, other = (group.method for group in groups)
        else:
            levels = [self.axis.level(group) for group in groups]
            base, other = (apart(own, levels) or own or group.method for own, group in zip(levels, groups, strict=True))
        return base, other


def comparisons(table: Sequence[Row]) -> list[Comparison]:
    """Return the pairs of rows that differ in one thing alone, in the order of axes().

    Objectives come alone, as they are the question where a study has several. On each axis the first level is compared
    with the others: MMCL among objectives, CleanCLIP among methods, else that which sorts first.
    """
    rows = [row for row in table if row.group.method and row.best[0].kept]
    objectives = _along(OBJECTIVE, rows)
    return objectives or [pair for axis in axes([row.group for row in rows]) for pair in _along(axis, rows)]


def _along(axis: Axis, rows: Sequence[Row]) -> list[Comparison]:
    alike: dict[tuple, list[Row]] = {}
    for row in rows:
        alike.setdefault(axis.same(row.group), []).append(row)
    found = []
    for some in alike.values():
        first, *others = sorted({axis.level(row.group) for row in some}, key=_order)
        levels = {level: [row for row in some if axis.level(row.group) == level] for level in (first, *others)}
        pairs = ((a, b) for level in others for a in levels[first] for b in levels[level])
        found += [_compare(axis, a, b) for a, b in pairs if _told_alike(a.group, b.group) or axis not in ACROSS]
    return sorted(found, key=lambda pair: pair.base.group.cleaning != PAPERS)  # the paper's question first


def _told_alike(one: Group, other: Group) -> bool:
    """Return whether no setting that both tell, of the pre-training or of the cleaning, has two values."""
    told = ((dict(of(one)), dict(of(other))) for of in (VARIED, SETTINGS))
    return all(ours[flag] == theirs[flag] for ours, theirs in told for flag in ours.keys() & theirs.keys())


def _order(level: str) -> tuple:
    """Return what sorts BASE and the paper's method first, and numbers in a text by their size."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", level)
    return level not in (BASE, PAPERS), [float(part) if k % 2 else part for k, part in enumerate(parts)]


def _compare(axis: Axis, base: Row, other: Row) -> Comparison:
    found = difference(base.best[0].shares, other.best[0].shares)
    verdict, why = _judged(axis, base, other, found)
    return Comparison(axis, base, other, found, verdict, why)


def _judged(axis: Axis, base: Row, other: Row, found: Estimate) -> tuple[Verdict, str]:
    rows = (base, other)
    if failed := [row.group.model + _seeds_without(row) for row in rows if not landed(row)]:
        return "cannot tell", f"the backdoor had not landed in {_joined(failed)}"
    if weak := [row.group.model for row in rows if near_chance(row) is not None]:
        return "cannot tell", f"before cleaning the accuracy was near chance in {_joined(weak)}"
    if min(base.models, other.models) < 2:
        return "cannot tell", "with one pre-trained model on a side nothing can be said about others"
    if not base.best[0].reached and not other.best[0].reached:
        after = "after" if axis is OBJECTIVE else "with"
        return "does not show", f"it came down to ASR ≤ {CEILINGS[0]:.0%} {after} neither"
    if found.low > 0 or found.high < 0:
        return "shows", ""
    if found.high < PUBLISHED and (axis is OBJECTIVE or found.low > -PUBLISHED):
        return "does not show", ""
    return "cannot tell", "the seeds differ too much to say"


def _joined(names: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(names))


def _seeds_without(row: Row) -> str:
    """Return with how many seeds the backdoor had not landed, where it had with others."""
    did, measured = landings(row)
    return f" (with {measured - did} of {measured} seeds)" if did else ""


def landed(row: Row) -> bool:
    """Return whether the backdoor had landed in every model of the row before it was cleaned."""
    did, measured = landings(row)
    return 0 < did == measured


def landings(row: Row) -> tuple[int, int]:
    """Return in how many models of the row the backdoor had landed, and in how many ASR was measured."""
    asr = {run.model: e["asr"] for run, e in _before(row) if measures_asr(e)}
    return sum(value >= LANDED for value in asr.values()), len(asr)


def unfit(row: Row) -> str:
    """Return why nothing can be said of what cleaning does to the row's models; empty where something can."""
    did, measured = landings(row)
    if did < measured:
        return f"the backdoor had not landed{_seeds_without(row)}"
    weak = near_chance(row)
    return f"the accuracy was {weak}" if weak else ""


def guessing(row: Row) -> float | None:
    """Return the top-1 of guessing among the row's classes; None where that is not known."""
    return chance(e for run in row.group.runs for e in run.metrics)


def near_chance(row: Row) -> str | None:
    """Return, in words, that some model of the row was hardly more accurate than guessing; None where none was."""
    return _near_chance((e for _, e in _before(row) if "top1" in e), guessing(row))


def cleaned_near_chance(row: Row) -> str | None:
    """Return the same of the best cleaned models within the first ceiling of ASR."""
    return _near_chance((point[1] for point in row.best[0].points if point), guessing(row))


def _near_chance(evaluations: Iterable[Mapping[str, Any]], guess: float | None) -> str | None:
    least = min((e.get("top1_low", e["top1"]) for e in evaluations), default=1.0)
    return f"near chance, which is {share(guess)}" if guess is not None and is_near_chance(least, guess) else None


def _before(row: Row) -> list[tuple[Run, RecordedEvaluation]]:
    """Return the row's runs with the evaluation of their model before cleaning; of pre-trainings that of the end."""
    runs = row.group.runs
    if row.group.method:
        return [(run, run.before) for run in runs if run.before]
    return [(run, e) for run in runs for e in (run.attacks or run.metrics)[-1:]]
