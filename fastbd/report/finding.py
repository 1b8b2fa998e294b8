"""What a study says, in words. verdict.py has the rule."""

from __future__ import annotations

from collections.abc import Sequence

from fastbd.base.evaluation import AttackedEvaluation
from fastbd.base.stats import Estimate
from fastbd.base.tradeoff import CEILINGS
from fastbd.report.format import between, percent, points, share
from fastbd.report.groups import Group, ends, place_of
from fastbd.report.tables import Row
from fastbd.report.verdict import (
    BASE,
    OBJECTIVE,
    PAPERS,
    PLACES,
    PUBLISHED,
    Comparison,
    cleaned_near_chance,
    comparisons,
    landed,
    landings,
    near_chance,
)


def paragraphs(table: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (claim, what it rests on) for the first comparisons, and a last pair with the others in short."""
    pairs = comparisons(table)
    if not pairs:
        return [(_without_pair(table), "")]
    first = pairs[0]
    spelt = [p for p in pairs if p.axis is first.axis and p.method == first.method][:SPELT_OUT]
    said = []
    for pair in spelt:
        rows = zip((pair.base, pair.other), pair.names, strict=True)
        ground = [told(row, f"{_after(pair)} {name}") for row, name in rows]
        said.append((_claim(pair, pairs), " ".join(filter(None, [*ground, _with_the_paper(pair)]))))
    others = [pair for pair in pairs if pair not in spelt]
    return said + ([("", _in_short(others, pairs))] if others else [])


def told(row: Row, where: str = "") -> str:
    """Return a sentence on what cleaning made of the models of a row, which begins with `where` ("After MMCL")."""
    where, ended = where or f"After {row.group.model}", ends(row.group)
    lowest, kept = row.lowest, row.best[0].kept
    if lowest is None or kept is None:
        return f"{where} {ended}, and no cleaned model was evaluated." if ended else f"{where}: no evaluation yet."
    return _made(row, where, lowest, kept) + (f" {ended[0].upper()}{ended[1:]}." if ended else "")


def _made(row: Row, where: str, lowest: AttackedEvaluation, kept: Estimate) -> str:
    """Return what cleaning came to; `lowest` is the row's evaluation of lowest ASR, `kept` its share of accuracy."""
    best, ceiling, n = row.best[0], f"ASR ≤ {CEILINGS[0]:.0%}", row.replicates
    if not landed(row):
        did, measured = landings(row)
        if did:
            return f"{where} the backdoor had landed with {did} of {measured} seeds, so a mean over them shows nothing."
        return f"{where} the backdoor had not landed, so there was nothing to remove."
    if weak := near_chance(row):
        return f"{where} the accuracy before cleaning was {weak}, so there was nothing to keep."
    if best.top1 is None:
        none = "no evaluation" if n == 1 else f"none of {n} seeds"
        asr = percent(lowest["asr"], lowest, "asr")
        return f"{where} {none} came down to {ceiling}; the lowest ASR is {asr}, at top-1 {share(lowest['top1'])}."
    weak = f", {'with a seed ' * (n > 1)}{weak}" if (weak := cleaned_near_chance(row)) else ""
    if n == 1:
        top1 = f"top-1 {share(best.top1.mean)}{between(best.top1)}"
        return f"{where} it came down to {ceiling} with {top1}, {share(kept.mean)} of that before{weak}."
    some = "" if best.reached == n else f" ({best.reached} of {n} seeds came down to it; the others count as 0)"
    return f"{where} it kept {share(kept.mean)}{between(kept)} of the accuracy at {ceiling}{some}{weak}."


def _after(pair: Comparison) -> str:
    return "After" if pair.axis is OBJECTIVE else "With"


def held(pair: Comparison, among: Sequence[Comparison]) -> str:
    """Return what both sides have in common, and not all of `among`: the method, the pre-training, the place."""
    base = pair.base.group
    place = place_of(base, [p.base.group for p in among]) if pair.axis not in PLACES else ""
    model = f"after {base.model}" if pair.axis is not OBJECTIVE else ""
    return ", ".join(filter(None, (pair.method, model, place)))


def _question(pair: Comparison, among: Sequence[Comparison]) -> str:
    """Return what the comparison asks, "what PAR keeps after MMCL depends on the attack"."""
    method, base = pair.method, pair.base.group
    place = place_of(base, [p.base.group for p in among]) if pair.axis not in PLACES else ""
    models = {(p.base.group.model, p.other.group.model) for p in among}
    if pair.axis is OBJECTIVE:
        versus = f"{base.model} and {pair.other.group.model}" if len(models) > 1 else ""
        more = "; ".join(filter(None, (place, versus)))
        return f"what {method}{f' ({more})' if more else ''} keeps depends on the pre-training"
    kept = f"what {method} keeps" if method else "what is kept"
    return f"{kept} after {base.model}{f' ({place})' if place else ''} depends on the {pair.axis.name}"


def _claim(pair: Comparison, among: Sequence[Comparison]) -> str:
    (base, other), found, question = pair.names, pair.difference, _question(pair, among)
    against = "" if pair.axis is OBJECTIVE else f" ({base} against {other})"
    if pair.verdict == "does not show":
        why = pair.why or f"the difference is {points(found)}"
        return f"This study does not show that {question}{against}: {why}."
    if pair.verdict == "shows":
        more, less, sign = (base, other, 1) if found.low > 0 else (other, base, -1)
        after = _after(pair).lower()
        many = f"{points(found, sign)} more of the accuracy {after} {more} than {after} {less}"
        return f"This study shows that {question}: {many}."
    many = f", the difference being {points(found)}" if min(pair.base.models, pair.other.models) > 1 else ""
    return f"This study cannot tell whether {question}{against}: {pair.why}{many}."


def _with_the_paper(pair: Comparison) -> str:
    """Return whether it agrees with arXiv 2311.14948, which speaks of CleanCLIP after MMCL and MMCL+SSL.

    Empty where the study cannot tell.
    """
    objectives = (pair.base.group.objective, pair.other.group.objective)
    if (pair.axis, pair.method, *objectives) != (OBJECTIVE, PAPERS, BASE, "mmcl_ssl") or (
        pair.verdict == "cannot tell"
    ):
        return ""
    if pair.why:
        return "In the published finding CleanCLIP works after MMCL, and fails or costs much after MMCL+SSL."
    if pair.verdict == "does not show" or pair.difference.high < 0:
        return "That does not agree with the published finding, in which CleanCLIP keeps far more after MMCL."
    if pair.difference.high < PUBLISHED:
        return "That agrees with the published finding in its direction; the difference is smaller than published."
    return "That agrees with the published finding: CleanCLIP works after MMCL, and fails or costs much after MMCL+SSL."


def _in_short(pairs: Sequence[Comparison], among: Sequence[Comparison]) -> str:
    """Return the verdicts on the other pairs."""
    said = []
    for verdict, words in SHORT.items():
        names = [_name(pair, among) for pair in pairs if pair.verdict == verdict]
        said += [f"{words} {'; '.join(names)}."] if names else []
    return f"The other comparisons. {' '.join(said)}"


def _name(pair: Comparison, among: Sequence[Comparison]) -> str:
    """Return a comparison in a few words."""
    if pair.axis is OBJECTIVE:
        return _question(pair, among).removeprefix("what ").removesuffix(" keeps depends on the pre-training")
    after = f" after {pair.base.group.model}" if len({p.base.group.model for p in among}) > 1 else ""
    return f"{' '.join(filter(None, [pair.method, ' against '.join(pair.names)]))}{after}"


def _without_pair(table: Sequence[Row]) -> str:
    """Return what there is to say where no two rows differ in one thing alone."""
    cleaned = [row for row in table if row.group.method]
    if not cleaned:
        return "Nothing was cleaned in these runs, so they say nothing on the question yet."
    known = [row.group for row in cleaned if row.best[0].kept]
    if not known:
        return "No cleaning has been evaluated with ASR yet, so there is nothing to say on the question."
    if len(cleaned) == 1:
        return "These runs clean one kind of model in one way, so there is nothing to compare."
    if len(known) == 1:
        return "Only one of the cleanings here has been evaluated with ASR, so there is nothing to compare."
    *others, last = _differing(known)
    things = f"{', '.join(others)} and {last}"
    return (
        f"No two cleanings here differ in one thing alone: {things} differ, so nothing can be put down to one of them."
    )


def _differing(groups: Sequence[Group]) -> list[str]:
    """Return what the groups differ in, in words: what comparisons go by, and what was searched."""
    found = [
        {"pre-training": group.objective}
        | {axis.name: axis.level(group) for axis in PLACES}
        | {f"{_plain(flag)} of the pre-training": said for flag, said in group.varied}
        | {"method": group.cleaning}
        | {_plain(flag): said for flag, said in group.settings}
        | {_plain(flag): {run.config.get(flag) for run in group.runs} for flag in ("epochs", "lr")}
        for group in groups
    ]
    names = dict.fromkeys(name for each in found for name in each)
    return [name for name in names if any(each.get(name) != found[0].get(name) for each in found)]


def _plain(flag: str) -> str:
    return "pairs" if flag == "rows" else flag.replace("_", " ")


SPELT_OUT = 3  # comparisons of the first method
SHORT = {
    "shows": "A difference is shown for:",
    "does not show": "No difference is shown for:",
    "cannot tell": "The runs cannot tell for:",
}
