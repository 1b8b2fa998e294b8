"""What a study says on its question: does cleaning depend on the pre-training objective? By rule, then in words.

Each model's share of accuracy kept is the best top-1 at ASR <= 5 % over the top-1 before cleaning, 0 where no
evaluation is within 5 %. For each method the difference of its means, MMCL less another objective, has Welch's 95 %
interval over pre-trained models (seeds). The study

    shows       a difference when the interval excludes 0;
    does not    show one when it includes 0 and excludes the published difference (PUBLISHED), as when no model of
                either side came down to 5 %;
    cannot tell otherwise: with fewer than two pre-trained models on a side, with an interval that includes both, or
                when the backdoor had not landed (ASR below 50 %) in some model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastbd.base.evaluation import measures_asr
from fastbd.base.run_folder import objective_name
from fastbd.base.stats import Estimate, difference
from fastbd.base.tradeoff import CEILINGS, LANDED
from fastbd.report.format import between, percent, points, share
from fastbd.report.groups import place_of
from fastbd.report.tables import Row

Verdict = Literal["shows", "does not show", "cannot tell"]
BASE = "mmcl"
# The smaller of the two of arXiv 2311.14948, table 1: 16.49 / 16.00 - 14.16 / 17.04 with CC3M; with CC6M it is 0.46.
PUBLISHED = 0.20
RULE = (
    "Kept: best top-1 at ASR ≤ {c} as a share of the top-1 before cleaning, 0 where no evaluation comes down that "
    "far. Difference: MMCL less the other, of the means over pre-trained models, with Welch's 95% interval. The study"
    " shows a difference when the interval excludes 0. It does not show one when the interval includes 0 and excludes"
    " {p} points, the smaller of the two differences in the paper (arXiv 2311.14948: CleanCLIP kept 103% and 101% "
    "after MMCL, 83% and 55% after MMCL+SSL), nor when no model of either side came down that far. Otherwise it "
    "cannot tell; nor can it with fewer than two pre-trained models on a side, or where a backdoor had not landed "
    "(ASR below {l}). Each row is judged by itself."
).format(c=f"{CEILINGS[0]:.0%}", p=f"{100 * PUBLISHED:.0f}", l=f"{LANDED:.0%}")


@dataclass(frozen=True)
class Comparison:
    """One method after MMCL pre-training and after another."""

    base: Row
    other: Row
    difference: Estimate
    """Of the shares kept."""
    verdict: Verdict
    why: str
    """Why it cannot tell, or has nothing to show; else empty."""

    @property
    def method(self) -> str:
        return self.base.group.method


def comparisons(table: Sequence[Row]) -> list[Comparison]:
    """Each row of MMCL pre-training with those of other objectives: same method, architecture, data and attack."""
    rows = [row for row in table if row.group.method and row.best[0].kept]
    pairs = [
        _compare(base, other)
        for base in rows
        for other in rows
        if base.group.objective == BASE != other.group.objective
        and (base.group.method, base.group.place) == (other.group.method, other.group.place)
    ]
    return sorted(pairs, key=lambda pair: pair.base.group.runs[0].method != "cleanclip")  # the paper's question first


def _compare(base: Row, other: Row) -> Comparison:
    found = difference(base.best[0].shares, other.best[0].shares)
    unlanded = [row.group.model for row in (base, other) if row.asr is None or _least_asr(row) < LANDED]
    if unlanded:
        return Comparison(base, other, found, "cannot tell", f"the backdoor had not landed in {' and '.join(unlanded)}")
    if min(base.models, other.models) < 2:
        return Comparison(base, other, found, "cannot tell", "with one seed nothing can be said about other seeds")
    if not base.best[0].reached and not other.best[0].reached:
        return Comparison(base, other, found, "does not show", f"it came down to ASR ≤ {CEILINGS[0]:.0%} after neither")
    if found.low > 0 or found.high < 0:
        return Comparison(base, other, found, "shows", "")
    if found.high < PUBLISHED:
        return Comparison(base, other, found, "does not show", "")
    return Comparison(base, other, found, "cannot tell", "the seeds differ too much to say")


def _least_asr(row: Row) -> float:
    return min(run.before["asr"] for run in row.group.runs if run.before and measures_asr(run.before))


# ---- in words ----


def paragraphs(table: Sequence[Row]) -> list[tuple[str, str]]:
    """(claim, what it rests on): the paper's method where it was tried, else the first; then the others in short."""
    pairs = comparisons(table)
    if not pairs:
        return [(_without_pair(table), "")]
    same = [pair for pair in pairs if pair.method == pairs[0].method][:SPELT_OUT]
    said = []
    for pair in same:
        what = _name(pair, pairs)
        ground = [told(pair.base), told(pair.other), _with_the_paper(pair)]
        said.append((_claim(pair, what), " ".join(filter(None, ground))))
    others = [pair for pair in pairs if pair not in same]
    return said + ([("", _in_short(others, pairs))] if others else [])


def _name(pair: Comparison, pairs: Sequence[Comparison]) -> str:
    """The method, and what else sets the pair apart."""
    place = place_of(pair.base.group, [p.base.group for p in pairs])
    models = {(p.base.group.model, p.other.group.model) for p in pairs}
    more = [place, f"{pair.base.group.model} and {pair.other.group.model}" if len(models) > 1 else ""]
    return pair.method + (f" ({'; '.join(filter(None, more))})" if any(more) else "")


def _claim(pair: Comparison, name: str) -> str:
    base, other, found = pair.base.group.model, pair.other.group.model, pair.difference
    what = f"what {name} keeps depends on the pre-training"
    if pair.verdict == "does not show":
        return f"This study does not show that {what}: {pair.why or f'the difference is {points(found)}'}."
    if pair.verdict == "shows":
        more, less, sign = (base, other, 1) if found.low > 0 else (other, base, -1)
        return (
            f"This study shows that {what}: {points(found, sign)} more of the accuracy after {more} than after {less}."
        )
    numbers = f", the difference being {points(found)}" if math.isfinite(found.low) else ""
    return f"This study cannot tell whether {what}: {pair.why}{numbers}."


def told(row: Row) -> str:
    """What cleaning made of the models of a row."""
    best, ceiling, n = row.best[0], f"ASR ≤ {CEILINGS[0]:.0%}", row.replicates
    if row.lowest is None or best.kept is None:
        return f"After {row.group.model}: no evaluation yet."
    if best.top1 is None:
        none = "no evaluation" if n == 1 else f"none of {n} seeds"
        lowest = (
            f"the lowest ASR is {percent(row.lowest['asr'], row.lowest, 'asr')}, at top-1 {share(row.lowest['top1'])}"
        )
        return f"After {row.group.model} {none} came down to {ceiling}; {lowest}."
    if n == 1:
        top1 = f"top-1 {share(best.top1.mean)}{between(best.top1)}"
        return f"After {row.group.model} it came down to {ceiling} with {top1}, {share(best.kept.mean)} of that before."
    some = "" if best.reached == n else f" ({best.reached} of {n} seeds came down to it; the others count as 0)"
    kept = f"{share(best.kept.mean)}{between(best.kept)}"
    return f"After {row.group.model} it kept {kept} of the accuracy at {ceiling}{some}."


def _with_the_paper(pair: Comparison) -> str:
    """Whether it agrees with arXiv 2311.14948, which speaks of CleanCLIP after MMCL and MMCL+SSL."""
    asked = (pair.base.group.runs[0].method, pair.other.group.objective) == ("cleanclip", "mmcl_ssl")
    if not asked or pair.why.startswith("the backdoor"):
        return ""
    if pair.verdict == "cannot tell":
        way = "points in" if pair.difference.mean > 0 else "does not point in"
        return f"What was measured {way} the direction of the published finding; that is no proof."
    if pair.why:
        return "In the published finding CleanCLIP works after MMCL, and fails or costs much after MMCL+SSL."
    if pair.verdict == "does not show" or pair.difference.high < 0:
        return "That does not agree with the published finding, in which CleanCLIP keeps far more after MMCL."
    if pair.difference.high < PUBLISHED:
        return "That agrees with the published finding in its direction; the difference is smaller than published."
    return "That agrees with the published finding: CleanCLIP works after MMCL, and fails or costs much after MMCL+SSL."


def _in_short(pairs: Sequence[Comparison], among: Sequence[Comparison]) -> str:
    """The verdicts on the other pairs."""
    said = []
    for verdict, words in SHORT.items():
        names = [_name(pair, among) for pair in pairs if pair.verdict == verdict]
        said += [f"{words} {'; '.join(names)}"] if names else []
    return f"As for the rest, the study {'. It '.join(said)}."


def _without_pair(table: Sequence[Row]) -> str:
    """No method has cleaned both an MMCL model and another."""
    cleaned = [row for row in table if row.group.method]
    if not cleaned:
        return "Nothing was cleaned in these runs, so they say nothing on the question yet."
    if not any(row.best[0].kept for row in cleaned):
        return "No cleaning has been evaluated with ASR yet, so there is nothing to say on the question."
    objectives = ", ".join(sorted({objective_name(row.group.objective) for row in cleaned}))
    return (
        "This study cannot tell: no method has cleaned both an MMCL model and one of another objective, with the same "
        f"architecture, data and attack (cleaned: {objectives})."
    )


SPELT_OUT = 3  # pairs of the first method
SHORT = {
    "shows": "shows a difference for",
    "does not show": "does not show one for",
    "cannot tell": "cannot tell for",
}
