"""Where to stop, and which run to take, when nobody knows the trigger: rules that need no ASR, and what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

from fastbd.base.evaluation import AttackedEvaluation
from fastbd.base.run_folder import Run
from fastbd.base.tradeoff import CEILINGS, best
from fastbd.report.groups import Group, cleaned_groups, replicates

Rule = Callable[[Sequence[Run]], AttackedEvaluation | None]


@dataclass(frozen=True)
class Choice:
    """What a rule chose among the evaluations of some runs, and the best that it could have."""

    chosen: AttackedEvaluation
    known: AttackedEvaluation | None
    """The best top-1 at ASR <= 5 %, known only with the trigger; None where there is no such evaluation."""

    @property
    def cost(self) -> float | None:
        """Top-1 that was given away; None where no evaluation had ASR <= 5 %."""
        return self.known["top1"] - self.chosen["top1"] if self.known else None

    @property
    def clean(self) -> bool:
        return self.chosen["asr"] <= CEILINGS[0]


def lowest_loss(runs: Sequence[Run]) -> AttackedEvaluation | None:
    """The lowest contrastive loss on held-out clean pairs."""
    return min(_having(runs, "val_loss"), key=itemgetter("val_loss"), default=None)


def farthest(runs: Sequence[Run]) -> AttackedEvaluation | None:
    """The largest drift of the embeddings from the start's, images and captions together, of those no worse than it."""
    loss, drifts = itemgetter("val_loss"), itemgetter("drift_image", "drift_text")
    start = next((loss(run.before) for run in runs if run.before and "val_loss" in run.before), None)
    drifted = _having(runs, "val_loss", "drift_image", "drift_text") if start is not None else []
    return max((e for e in drifted if loss(e) <= start), key=lambda e: sum(drifts(e)), default=None)


def most_agreement(runs: Sequence[Run]) -> AttackedEvaluation | None:
    """The highest agreement between the plain and the augmented view of an image."""
    return max(_having(runs, "agreement"), key=itemgetter("agreement"), default=None)


def last(runs: Sequence[Run]) -> AttackedEvaluation | None:
    """The end; of several runs, of the one that ends at the highest top-1."""
    return max((run.cleaned[-1] for run in runs if run.cleaned), key=lambda e: e["top1"], default=None)


def choose(rule: Rule, runs: Sequence[Run]) -> Choice | None:
    """The rule's choice over all evaluations of `runs`, which clean one model; None where it has nothing to go by."""
    chosen = rule(runs)
    return Choice(chosen, best((e for run in runs for e in run.cleaned), CEILINGS[0])) if chosen else None


@dataclass(frozen=True)
class Summary:
    """A rule over many choices."""

    choices: int
    clean: int
    """Choices of ASR <= 5 %."""
    possible: int
    """Choices for which some evaluation had it."""
    asr: float
    top1: float
    cost: float | None
    """Mean top-1 given away, of the possible ones."""


def summary(choices: Sequence[Choice]) -> Summary | None:
    if not choices:
        return None
    given = [c.cost for c in choices if c.cost is not None]
    return Summary(
        choices=len(choices),
        clean=sum(c.clean for c in choices),
        possible=len(given),
        asr=statistics.fmean(c.chosen["asr"] for c in choices),
        top1=statistics.fmean(c.chosen["top1"] for c in choices),
        cost=statistics.fmean(given) if given else None,
    )


def by_group(runs: Sequence[Run]) -> list[tuple[Group, str, list[Choice]]]:
    """(group, rule, its choices, one a replicate: over all runs that clean one model with one seed)."""
    found = []
    for group in cleaned_groups(runs):
        for name, rule in RULES.items():
            choices = [choice for drawn in replicates(group) if (choice := choose(rule, drawn))]
            found.append((group, name, choices))
    return found


def by_run(runs: Sequence[Run]) -> list[tuple[Run, str, Choice]]:
    """(run, rule, its choice) for each cleaning run by itself."""
    made = [(run, name, choose(rule, [run])) for run in runs if run.verb == "clean" for name, rule in RULES.items()]
    return [(run, name, choice) for run, name, choice in made if choice]


def _having(runs: Sequence[Run], *keys: str) -> list[AttackedEvaluation]:
    return [e for run in runs for e in run.cleaned if all(e.get(key) is not None for key in keys)]


RULES: dict[str, Rule] = {
    "lowest validation loss": lowest_loss,
    "largest drift, loss no higher than before": farthest,
    "highest agreement of views": most_agreement,
    "last evaluation": last,
}
