"""Two studies side by side, paired by their settings."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbd.base.run_folder import Run, method_name, objective_name
from fastbd.base.stats import Estimate
from fastbd.report import export, plots
from fastbd.report.alt import alts
from fastbd.report.format import MINUS, MISSING, Cell, Line, estimate, number, share
from fastbd.report.groups import HARMLESS, SEARCHED, Group, ends
from fastbd.report.head import head
from fastbd.report.page import TABLE_1
from fastbd.report.render import embedded, render
from fastbd.report.tables import Row, table
from fastbd.report.verdict import guessing, unfit
from fastbd.report.write import PAGE, save

Pair = tuple[Row | None, Row | None]
Values = Mapping[str, frozenset[str]]  # name of a setting -> its values in words, several where runs differ in it
Key = frozenset[tuple[str, frozenset[str] | None]]
EVALUATED, ARCHITECTURE, DATA, ATTACK = "evaluated on", "architecture", "training data", "attack"
BUILT = "data built with"


@dataclass(frozen=True)
class Difference:
    """A setting in which the two studies differ as a whole, or over which they have searched other values."""

    setting: str
    first: str
    second: str


@dataclass(frozen=True)
class Sides:
    """Two studies, compared."""

    names: tuple[str, str]
    pairs: tuple[Pair, ...]
    """Rows of the same settings, but for `differences`; None where the other study has no such row."""
    differences: tuple[Difference, ...]
    same: tuple[str, ...]
    """Architecture, data, attack and evaluation where both studies have one and the same."""

    @property
    def measured_alike(self) -> bool:
        """Whether both were evaluated on the same images, classes and templates, so that numbers can be subtracted."""
        return all(each.setting != EVALUATED for each in self.differences)


def write(
    names: tuple[str, str], first: Sequence[Run], second: Sequence[Run], folder: Path, kind: str = "csv"
) -> Sides:
    """Write the page, the scatter of both and the table as `kind` into the folder; returns what the page says."""
    runs = dict(zip(names, (first, second), strict=True))
    figure = plots.laid_out(plots.beside(runs))
    image, compared = plots.png(figure), sides(names, first, second)
    content = {"figures/compare.png": image, "figures/compare.svg": plots.svg(figure)}
    content[f"tables/compared.{kind}"] = export.WRITERS[kind](rows(compared))
    seen = " ".join(f"{name}: {alts(some)['scatter']}" for name, some in runs.items())
    heads = {name: head(some) for name, some in runs.items()}
    save({**content, PAGE: page(compared, image, seen, heads, list(content)).encode()}, folder)
    return compared


def page(
    compared: Sides, image: bytes, seen: str, heads: Mapping[str, Mapping[str, Any]], files: Sequence[str] = ()
) -> str:
    """Return the whole page.

    `image`: the PNG file of the scatter of both; `seen`: what is seen in it. `heads`: the head of each study's own
    report, by name. `files`: what else is in the folder, by its name there.
    """
    return render(
        "compare.html.j2",
        title=" against ".join(compared.names),
        heads=heads,
        files=[name for name in files if name.startswith("tables/")],
        unjudged=unjudged(compared),
        differences=[
            {"Setting": each.setting, compared.names[0]: each.first, compared.names[1]: each.second}
            for each in compared.differences
        ],
        same="; ".join(compared.same),
        measured_alike=compared.measured_alike,
        rows=lines(compared),
        scatter=embedded(image),
        seen=seen,
    )


def sides(names: tuple[str, str], first: Sequence[Run], second: Sequence[Run]) -> Sides:
    """Return the two studies with their rows paired by settings.

    A setting with one value in all of the first study and another in all of the second is what is compared: rows are
    paired across it, and it is named. In every other setting two rows of a pair are equal.
    """
    tables = table(first), table(second)
    known = [[_settings(row.group) for row in rows] for rows in tables]
    every = [_joined(settings) for settings in known]
    shared = every[0].keys() & every[1].keys()  # what an older version did not record tells nothing apart
    apart = {name for name in shared if _is_apart(name, every[0][name], every[1][name])}
    keyed = {name for name in shared - apart if not _is_searched(name)}
    left, right = ([_key(some, keyed) for some in settings] for settings in known)
    pairs = _paired(left, right, *tables)
    differences = [
        Difference(name, _words(every[0][name]), _words(every[1][name])) for name in every[0] if name in apart
    ]
    same = [f"{name} {_words(every[0][name])}" for name in WHOLE if every[0].get(name) == every[1].get(name)]
    return Sides(names, tuple(pairs), tuple(differences), tuple(same))


def _key(settings: Values, keyed: Collection[str]) -> Key:
    return frozenset((name, settings.get(name)) for name in keyed)


def _paired(left: Sequence[Key], right: Sequence[Key], first: Sequence[Row], second: Sequence[Row]) -> Iterator[Pair]:
    """Yield the rows by their keys, those of the first study and then those that only the second has.

    Where a study has several rows of a key, which only the other study's version would tell apart, each stands alone.
    """
    for key in dict.fromkeys((*left, *right)):
        ours, theirs = (
            [row for k, row in zip(*side, strict=True) if k == key] for side in ((left, first), (right, second))
        )
        if len(ours) == len(theirs) == 1:
            yield ours[0], theirs[0]
        else:
            yield from ((row, None) for row in ours)
            yield from ((None, row) for row in theirs)


def told(compared: Sides) -> list[str]:
    """Return what differs between the studies and what is the same, a line each."""
    first, second = compared.names
    differ = [f"{each.setting}: {each.first} in {first}, {each.second} in {second}" for each in compared.differences]
    apart = [] if compared.measured_alike else ["No differences: measured on different images, classes or templates."]
    same = [f"The same in both: {'; '.join(compared.same)}."] if compared.same else []
    return [*differ, *same, *apart, *unjudged(compared)]


def unjudged(compared: Sides) -> list[str]:
    """Return, for each reason, which models were unfit to tell anything of cleaning, so that nothing is subtracted."""
    found: dict[str, dict[str, None]] = {}
    for pair in compared.pairs:
        for name, row in zip(compared.names, pair, strict=True):
            if row and (why := unfit(row)):
                found.setdefault(why, {})[f"{row.group.model} in {name}"] = None
    return [f"No differences where before cleaning {why}: {'; '.join(models)}." for why, models in found.items()]


def lines(compared: Sides) -> list[Line]:
    """Return the lines of the table: one for each study that has the row, and their difference where both have it."""
    return [line for pair in compared.pairs for line in _lines(compared, pair)]


def rows(compared: Sides) -> export.Rows:
    """Return the table as rows of table.csv: those of a pair have its number, and why they are not to be subtracted."""
    return [
        {
            "pair": number,
            "study": name,
            **export.table_row(row),
            "guessing": guessing(row),
            "not_judged": unfit(row) or None,
        }
        for number, pair in enumerate(compared.pairs, 1)
        for name, row in zip(compared.names, pair, strict=True)
        if row
    ]


def _lines(compared: Sides, pair: Pair) -> list[Line]:
    shown = [
        _line(row.group.model, row.group.method or "not cleaned", _study(name, row), _guess(row), _cells(row))
        for name, row in zip(compared.names, pair, strict=True)
        if row
    ]
    first, second = pair
    if first and second and compared.measured_alike and not (unfit(first) or unfit(second)):
        both = zip(_numbers(first), _numbers(second), strict=True)
        shown.append(_line("", "", "difference", "", (difference(*numbers) for numbers in both)))
    return shown


def _study(name: str, row: Row) -> str:
    """Return the study's name, and how many of the row's runs diverged or have not ended."""
    return "; ".join(filter(None, (name, ends(row.group))))


def _cells(row: Row) -> list[Cell]:
    """Return what NUMBERS head, each top-1 with whether it is near chance."""
    heads_and_values = zip(NUMBERS, _numbers(row), strict=True)
    return [estimate(value, guessing(row) if "op-1" in head else None) for head, value in heads_and_values]


def _guess(row: Row) -> str:
    guess = guessing(row)
    return MISSING if guess is None else share(guess)


def _line(model: str, method: str, study: str, guess: str, numbers: Iterable[Cell]) -> Line:
    about = {"Pre-training": model, "Cleaning": method, "Study": study, "Guessing": guess}
    return about | dict(zip(NUMBERS, numbers, strict=True))


def _numbers(row: Row) -> list[Estimate | None]:
    strict, loose = row.best
    return [row.top1, row.asr, strict.top1, strict.kept, loose.top1, row.area]


def difference(first: Estimate | None, second: Estimate | None) -> str:
    """Return second less first in points; without an interval, for the two may share models and images."""
    if first is None or second is None:
        return MISSING
    change = number(100 * (second.mean - first.mean))
    return f"{'' if change.startswith(MINUS) or not float(change) else '+'}{change} points"


# ---- the settings of a row ----


def _settings(group: Group) -> Values:
    """Return the settings of a group; those of a pre-training are told by objective, those of a cleaning by method."""
    found: dict[str, set[str]] = {}
    for run, pretraining in zip(group.runs, group.pretraining, strict=True):
        model, method = objective_name(group.objective), method_name(run) if run.verb == "clean" else "none"
        told = {"objective": model, "cleaning": method, EVALUATED: _evaluated(run)}
        told |= dict(zip(WHOLE, group.place, strict=False))
        told[BUILT] = (
            ", ".join(f"{name} {value}" for name, value in run.recorded.get("built", {}).items()) or "defaults"
        )
        told |= {f"{_plain(flag)} of {model} pre-training": _value(value) for flag, value in pretraining.items()}
        if run.verb == "clean":
            cleaning = {flag: value for flag, value in run.config.items() if flag not in HARMLESS}
            told |= {f"{_plain(flag)} of {method}": _value(value) for flag, value in cleaning.items()}
        for name, value in told.items():
            found.setdefault(name, set()).add(value)
    return {name: frozenset(values) for name, values in found.items()}


def _evaluated(run: Run) -> str:
    """Return the name of the set that the run was evaluated on, with what tells it from others of that name."""
    last = next((e for e in reversed(run.metrics) if "top1" in e), None)
    if last is None:
        return "nothing"
    told = {"hash of the images": "content", "class names": "class_list", "prompt templates": "templates"}
    own = {"the data's": "those in the data set"}
    known = [f"{name}: {own.get(value, value)}" for name, key in told.items() if (value := last.get(key))]
    return f"data set {last['set']}" + (f" ({'; '.join(known)})" if known else "")


def _joined(settings: Iterable[Values]) -> dict[str, frozenset[str]]:
    """Return each setting with all values that it has in any of them."""
    found: dict[str, frozenset[str]] = {}
    for values in settings:
        for name, some in values.items():
            found[name] = found.get(name, frozenset()) | some
    return found


def _is_apart(name: str, first: frozenset[str], second: frozenset[str]) -> bool:
    """Return whether the studies as a whole differ in a setting: one value each, or other values searched."""
    return first != second and (_is_searched(name) or len(first) == len(second) == 1)


def _is_searched(name: str) -> bool:
    return name.partition(" of ")[0] in SEARCHED_NAMES


def _words(values: frozenset[str]) -> str:
    return ", ".join(sorted(values, key=_by_size))


def _by_size(value: str) -> tuple[bool, float, str]:
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value


def _plain(flag: str) -> str:
    return {"lr": "learning rate"}.get(flag, flag.replace("_", " "))


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "not set", False: "no", True: "yes"}[value]
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


WHOLE = (
    ARCHITECTURE,
    DATA,
    ATTACK,
    EVALUATED,
)  # what all rows of a study usually share; the first three a group's place
SEARCHED_NAMES = {_plain(flag) for flag in SEARCHED - {"method", "checkpoint", "rows", "poison_left"}}  # these are told
NUMBERS = (*TABLE_1[3:7], *TABLE_1[8:])  # the heads of what _numbers gives
