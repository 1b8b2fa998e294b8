"""The report's page: the values of page.html.j2, which says the rest."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fastbd.base.console import duration
from fastbd.base.evaluation import Evaluation
from fastbd.base.run_folder import Run, objective_name
from fastbd.base.tradeoff import CEILINGS
from fastbd.config.cards import facts, is_outside, short
from fastbd.config.fields import marked
from fastbd.config.flags import TRAINING
from fastbd.report import finding, published, stopping, tables, verdict
from fastbd.report.alt import alts
from fastbd.report.chance import chance
from fastbd.report.format import (
    MISSING,
    Cell,
    Line,
    between,
    estimate,
    number,
    percent,
    points,
    rate,
    share,
    split,
)
from fastbd.report.groups import Group, cleaned_groups, cleaning_of, common, ends, groups, place_of
from fastbd.report.head import head
from fastbd.report.plots import VERBS
from fastbd.report.render import embedded, render
from fastbd.report.tables import Row


def page(
    runs: Sequence[Run],
    figures: Mapping[str, bytes],
    files: Sequence[str] = (),
    interactive: str = "",
    refresh: int = 0,
) -> str:
    """The whole page. A browser loads it again after `refresh` seconds, if any.

    `figures`: the PNG files of those of scatter, methods, trajectories and curves that the page is to show. `files`:
    what else is in the folder, by its name there. `interactive`: one of them, or where it is missing the reason.
    """
    table = tables.table(runs)
    pretrained = groups([run for run in runs if run.verb != "clean"])
    return render(
        "page.html.j2",
        refresh=refresh,
        head=head(runs),
        figures={name: embedded(png) for name, png in figures.items()},
        alts=alts(runs),
        files=[name for name in files if name.startswith("tables/")],
        drawn={name for name in files if name.endswith(".svg")},
        interactive=interactive,
        answer=answer(table),
        comparisons=_comparisons(table),
        of_objectives=any(pair.axis is verdict.OBJECTIVE for pair in verdict.comparisons(table)),
        rule=verdict.RULE,
        table_1=_table_1(table),
        measured=_measured(runs),
        best_points=_best_points(table),
        stability=_stability(runs),
        stopping=_stopping(runs),
        rebound=_rebound(runs),
        costs=_costs(runs),
        published=_published(),
        without_curve=_without_curve(runs),
        samples=_samples(runs),
        repeat=[_circumstances(group) for group in (*pretrained, *cleaned_groups(runs))],
    )


# ---- the answer ----


def answer(table: Sequence[Row]) -> list[tuple[str, str]]:
    """(claim, what it rests on), and with no claim what is to be said of each row that is compared with no other."""
    compared = {id(row) for pair in verdict.comparisons(table) for row in (pair.base, pair.other)}
    alone = [("", told(row, table)) for row in table if id(row) not in compared]
    return finding.paragraphs(table) + alone


def told(row: Row, table: Sequence[Row]) -> str:
    """What is to be said of a row by itself."""
    place = place_of(row.group, [r.group for r in table])
    name = row.group.model + (f" ({place})" if place else "")
    if row.top1 is None or row.asr is None:
        return f"{name}: no ASR was measured before cleaning, so there is nothing to say about a backdoor."
    state = f"top-1 {share(row.top1.mean)}, ASR {share(row.asr.mean)}"
    if not row.group.method and (ended := ends(row.group)):
        return f"{name}: {ended}; so far {state}."
    if not verdict.landed(row):
        did, measured = verdict.landings(row)
        if did:
            some = f"landed with {did} of {measured} seeds of the pre-training"
            return f"{name}: the attack {some} (means before cleaning: {state}), so a mean over them shows nothing."
        return f"{name}: the attack never landed ({state} before cleaning), so cleaning this model shows nothing."
    if not row.group.method:
        return f"{name}: backdoored ({state}), and not cleaned in these runs."
    return f"{row.group.method}. {finding.told(row)} Before cleaning: {state}."


def _comparisons(table: Sequence[Row]) -> list[Line]:
    """A line for each two rows that differ in one thing alone, which the first head names."""
    pairs = verdict.comparisons(table)
    return [
        {
            "Depends on the": (pair.axis.name, finding.held(pair, pairs)),
            "First against second": " against ".join(pair.names),
            "Kept by the first": _kept(pair.base),
            "Kept by the second": _kept(pair.other),
            "Difference": split(points(pair.difference)),
            "Models": f"{pair.base.models} and {pair.other.models}",
            "This study": (VERDICTS[pair.verdict], pair.why),
        }
        for pair in pairs
    ]


def _kept(row: Row) -> Cell:
    best = row.best[0]
    if best.kept is None:
        return MISSING
    if not best.reached:
        return share(best.kept.mean), f"lowest ASR {share(row.lowest['asr'])}" if row.lowest else ""
    reached = "" if best.reached == row.replicates else f"{best.reached} of {row.replicates} came to ASR ≤ 5%"
    return share(best.kept.mean), "; ".join(filter(None, (between(best.kept).strip(" ()"), reached)))


# ---- table 1 ----


def _table_1(table: Sequence[Row]) -> list[Line]:
    among = [row.group for row in table]
    return [dict(zip(TABLE_1, cells(row, place_of(row.group, among)), strict=True)) for row in table]


def cells(row: Row, place: str = "") -> list[Cell]:
    """The row under TABLE_1."""
    group, (strict, loose), guess = row.group, row.best, verdict.guessing(row)
    return [
        (group.model, place),
        (cleaning_of(group), _count(len(group.runs))),
        (str(row.replicates), _seeds(row)),
        estimate(row.top1, guess),
        estimate(row.asr),
        estimate(strict.top1, guess),
        estimate(strict.kept),
        (f"{strict.reached} of {row.replicates}", _rates(strict) or _rate_of_lowest(row)) if group.method else MISSING,
        estimate(loose.top1, guess),
        estimate(row.area),
    ]


def _count(runs: int) -> str:
    return f"{runs} {'run' if runs == 1 else 'runs'}"


def rates(best: tables.Best) -> dict[float, int]:
    """How many seeds have their best point at each learning rate, the most frequent first."""
    return dict(Counter(run.config["lr"] for run, _ in filter(None, best.points) if run.config.get("lr")).most_common())


def _rates(best: tables.Best) -> str:
    found = rates(best)
    told = [rate(lr) + (f" ({times})" if len(found) > 1 else "") for lr, times in found.items()]
    return f"lr {', '.join(told)}" if told else ""


def _rate_of_lowest(row: Row) -> str:
    """Return the learning rate of the lowest ASR, for a row of which no evaluation is within a ceiling."""
    lr = next((run.config.get("lr") for run in row.group.runs if any(e is row.lowest for e in run.cleaned)), None)
    return f"lowest ASR at lr {rate(lr)}" if lr else ""


def _seeds(row: Row) -> str:
    return "of the cleaning only" if row.models == 1 < row.replicates else ""


def _best_points(table: Sequence[Row]) -> list[Line]:
    """Which run and step each best point is."""
    return [
        {
            "Pre-training": row.group.model,
            "Cleaning": row.group.method,
            "ASR at most": f"{ceiling:.0%}",
            "Run": (run.name, run.id),
            "Settings": _settings(run),
            "Where": (f"step {e['step']}", f"epoch {e['epoch']:.3g}"),
            "Top-1": split(percent(e["top1"], e, "top1")),
            "ASR": split(percent(e["asr"], e, "asr")),
        }
        for row in table
        for ceiling, best in zip(CEILINGS, row.best, strict=True)
        for run, e in filter(None, best.points)
    ]


def _settings(run: Run) -> str:
    lr = run.config.get("lr")
    return f"lr {rate(lr) if lr else '?'}, seed {run.config.get('seed', '?')}"


def _measured(runs: Sequence[Run]) -> dict[str, str]:
    """What was measured on what: the set, its images, the triggered ones, aims of the attacks; empty where nothing was.

    `aims` is empty without an attack, and `same`, what all models have in common, where they have nothing.
    """
    evaluations = [e for run in runs for e in run.metrics if not e.get("subset")]
    if not evaluations:
        return {}
    attacks = [e for e in evaluations if e.get("asr") is not None]
    guess = chance(evaluations)
    return {
        "set": evaluations[-1]["set"],
        "images": _range(evaluations, "n"),
        "triggered": _range(attacks, "n_asr"),
        "aims": ", ".join(sorted({f"{short(e.get('trigger', '?'))} to “{e.get('target', '?')}”" for e in attacks})),
        "same": _same(groups(runs)),
        "chance": share(guess) if guess else "",
    }


def _same(found: Sequence[Group]) -> str:
    """What all models have in common."""
    shared = {name: common(found, lambda group, k=k: group.place[k]) for k, name in enumerate(PLACE)}
    return "; ".join(f"{name} {value}" for name, value in shared.items() if value)


def _range(evaluations: Sequence[Evaluation], key: str) -> str:
    counts = sorted({e[key] for e in evaluations if key in e})
    return " to ".join(f"{n:,}" for n in (counts if len(counts) < 2 else (counts[0], counts[-1]))) or "?"


# ---- the other tables ----


def _stability(runs: Sequence[Run]) -> dict[str, Any]:
    """A row for each cleaned group, and the `worst` with the share of steps that it `falls` in; empty without rows.

    The worst is one of those where ASR rose by more than the evaluations' intervals; empty where there is none.
    """
    rows, shares = [], {}
    every = cleaned_groups(runs)
    for group in every:
        if found := [(run, seen) for run in group.runs if (seen := tables.instability(run))]:
            falls = [seen.fell for _, seen in found]
            run, most = max(found, key=lambda item: item[1].rise)
            place = place_of(group, every)
            if any(seen.clear for _, seen in found) and any(falls):
                name = f"{group.method} after {group.model}" + (f" ({place})" if place else "")
                shares[name] = statistics.fmean(falls)
            rows.append(_unstable(group, place, falls, most.rise, run))
    worst = max(shares, key=shares.__getitem__, default="")
    return {"rows": rows, "worst": worst, "falls": f"{shares[worst]:.0%}" if worst else ""} if rows else {}


def _unstable(group: Group, place: str, falls: Sequence[float], rise: float, risen: Run) -> Line:
    spread = f"{min(falls):.0%} to {max(falls):.0%}" if len(falls) > 1 else ""
    return {
        "Pre-training": (group.model, place),
        "Cleaning": group.method,
        "Accuracy fell while ASR rose": (f"{statistics.fmean(falls):.0%}", spread),
        "Largest rise of ASR": (f"{number(100 * rise)} points", risen.name),
        "Runs ended early": _ended_early(group) or "none",
    }


def _ended_early(group: Group) -> str:
    """How many of the group's runs ended for each reason, other than that they were finished."""
    ended = [run.result.get("reason") for run in group.runs]
    return ", ".join(f"{ended.count(r)} {r}" for r in sorted({r for r in ended if r and r != "finished"}))


def _stopping(runs: Sequence[Run]) -> dict[str, list[Line]]:
    """The rules over all groups, and in each; empty where none has chosen anything."""
    by_group = stopping.by_group(runs)
    if not any(choices for _, _, choices in by_group):
        return {}
    overall = []
    for name in stopping.RULES:
        chosen = [choice for _, rule, choices in by_group if rule == name for choice in choices]
        overall.append({"Rule": name, **_chosen(chosen)})
    each = [
        {"Pre-training": group.model, "Cleaning": group.method, "Rule": name, **_chosen(choices)}
        for group, name, choices in by_group
    ]
    return {"overall": overall, "each": each}


def _chosen(choices: Sequence[stopping.Choice]) -> Line:
    found = stopping.summary(choices)
    came, asr, top1, given = "no choice", MISSING, MISSING, MISSING
    if found:
        came, asr, top1 = f"{found.clean} of {found.choices}", share(found.asr), share(found.top1)
        cost = MISSING if found.cost is None else f"{number(100 * found.cost)} points"
        given = cost, f"a clean stop existed for {found.possible} of {found.choices}"
    return {f"Came to {WITHIN[0]}": came, "ASR": asr, "Top-1": top1, "Top-1 given away": given}


def _rebound(runs: Sequence[Run]) -> list[Line]:
    measured = [(g, [(run, seen) for run in g.runs for seen in tables.rebounds(run)]) for g in cleaned_groups(runs)]
    return [_rebounded(group, found) for group, found in measured if found]


def _rebounded(group: Group, found: Sequence[tuple[Run, dict[str, Any]]]) -> Line:
    steps = ", ".join(sorted({f"{seen['steps']} steps{_rate(seen['lr'])}" for _, seen in found}))
    taken = ", ".join(sorted({statistics_of(run) for run, _ in found}))
    return {
        "Pre-training": group.model,
        "Cleaning": group.method,
        "Measured": (f"{len(found)} times in {_count(len({run.path for run, _ in found}))}", steps),
        "ASR after cleaning": _mean_and_range([seen["first"] for _, seen in found]),
        "Highest ASR": _mean_and_range([seen["max"] for _, seen in found]),
        "Change": _mean_and_range([seen["change"] for _, seen in found]),
        "Mean ASR": _mean_and_range([seen["mean"] for _, seen in found]),
        "Statistics of the cleaned model taken over": taken,
    }


def _rate(lr: float | None) -> str:
    return "" if lr is None else f" at lr {lr:g}"


def _mean_and_range(values: Sequence[float | None]) -> Cell:
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    spread = f"{number(100 * min(known))} to {number(100 * max(known))}" if len(known) > 1 else ""
    return share(statistics.fmean(known)), spread


def statistics_of(run: Run) -> str:
    """The images that the batch-norm statistics of a cleaned model were taken over in its cleaning."""
    if "vit" in run.architecture:
        return "no batch norm"
    if run.method == "par" and run.config.get("frozen_norms", True):
        return "as before cleaning"
    first, second = views_of(run)
    paired = "ssl" in run.objective and run.config.get("ssl_image", True)
    return f"{first} and {second} views" if paired and second else f"{first} views"


def views_of(run: Run) -> tuple[str, str]:
    """The first view of the run's images, and the second that a self-supervised loss adds; empty where it has none."""
    views = run.config.get("views", "cleanclip")
    return (short(views), "") if is_outside(views) else VIEWS.get(views, VIEWS["cleanclip"])


def _costs(runs: Sequence[Run]) -> list[Line]:
    used = sorted({tables.cores(run) for run in runs if tables.device(run) == "CPU"} - {""})
    of = f", {' or '.join(used)}" if used else ""
    return [_cost(objective_name(objective), part, cost, of) for objective, part, cost in tables.costs(runs)]


def _cost(objective: str, part: str, cost: tables.Cost, cores: str) -> Line:
    """`cores`: those that runs without a GPU used, in words."""
    took = f"{'about ' if cost.estimated else ''}{duration(3600 * cost.hours)}"
    return {
        "Pre-training": objective,
        "Part": part,
        "Runs": f"{cost.runs:,}",
        "Time": (took, cost.device + (cores if cost.device == "CPU" else "")),
        "Evaluating": f"{cost.evaluating:.0%}",
        "Pairs/s": MISSING if cost.pairs_per_s is None else f"{cost.pairs_per_s:,.0f}",
        "Of the limit": MISSING if cost.of_limit is None else f"{cost.of_limit:.0%}",
    }


def _published() -> dict[str, list[Line]]:
    """CleanCLIP on clean data, as in Table 1, and the others."""
    shown: dict[str, list[Line]] = {"cleanclip": [], "others": []}
    for any_point, kinds in published.table():
        clean = any_point["cleaning"] == "cleanclip" and any_point["poison_left"] == "0"
        shown["cleanclip" if clean else "others"].append(_peer(any_point, kinds))
    return shown


def _peer(any_point: published.Point, kinds: Mapping[str, published.Point]) -> Line:
    method, _, loss = any_point["cleaning"].partition("_")
    left = f", {any_point['poison_left']} poisoned pairs left" if any_point["poison_left"] != "0" else ""
    start, best = kinds["start"], kinds.get("best_asr_5")
    kept = float(best["top1"] or 0) / float(start["top1"]) if best else None
    trained = f"{any_point['data']}, {any_point['architecture']}, {any_point['attack']}"
    cleaned = facts("method", method).title + (f" ({objective_name(loss)})" if loss else "")
    return {
        "Pre-training": (objective_name(any_point["pretraining"]), trained),
        "Cleaning": (cleaned, f"{int(any_point['clean_pairs']):,} pairs{left}"),
        "Top-1 before": f"{float(start['top1']):.1f}%",
        "ASR before": f"{float(start['asr']):.1f}%",
        BEST_WITHIN[0]: _at_most(best),
        BEST_WITHIN[1]: _at_most(kinds.get("best_asr_10")),
        "Accuracy kept": percent(kept),
        "Source": any_point["source"],
    }


def _at_most(point: published.Point | None) -> str:
    if point is None:
        return MISSING
    return f"{float(point['top1']):.1f}%" if point["top1"] else "none"


def _without_curve(runs: Sequence[Run]) -> str:
    """How many runs are left out of the losses' curves, in words; empty where none is."""
    found = Counter(VERBS[run.verb] for run in runs if len(run.log) == 1)
    return " and ".join(f"{times:,} {verb if times == 1 else verb + 's'}" for verb, times in sorted(found.items()))


def _samples(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A contact sheet for each attack, of the pre-training with the most kinds of views where there is one."""
    sheets: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: (run.verb == "clean", "ssl" not in run.objective)):
        if (run.path / "samples.png").exists():
            sheets.setdefault(run.attack, run)
    return [
        {
            "attack": attack,
            "run": run.name,
            "alt": _sheet(run),
            "source": embedded((run.path / "samples.png").read_bytes()),
        }
        for attack, run in sheets.items()
    ]


def _sheet(run: Run) -> str:
    views = " and ".join(filter(None, views_of(run)))
    planted = f", poisoned ones with the trigger ({run.attack})" if run.attack else ""
    return f"Training images of {run.name}, {views}: clean ones{planted}."


# ---- how to repeat it ----


def _circumstances(group: Group) -> dict[str, str]:
    """Each run's command, hash and settings, then all circumstances of the first."""
    first, runs = group.runs[0], group.runs
    varied = [key for key in first.config if len({str(run.config.get(key)) for run in runs}) > 1 and key not in PATHS]
    lines = []
    for run in runs:
        settings = ", ".join(f"{key} {run.config.get(key)}" for key in varied)
        lines.append(f"{run.id or '-':<12}  {run.name}{f'  ({settings})' if settings else ''}")
        lines += [f"{'':<12}  {run.recorded['command']}"] if run.recorded.get("command") else []
    facts = {"folder": str(first.path), "config": first.config, "environment": first.env}
    return {
        "title": f"{group.model}: {group.method or 'pre-training'} ({_count(len(runs))})",
        "commands": "\n".join(lines),
        "first": first.name,
        "settings": json.dumps(facts, indent=2, ensure_ascii=False),
    }


WITHIN = [f"ASR\N{NO-BREAK SPACE}≤\N{NO-BREAK SPACE}{ceiling:.0%}" for ceiling in CEILINGS]
BEST_WITHIN = [f"Best top-1 at {within}" for within in WITHIN]
VERDICTS = {"shows": "shows a difference", "does not show": "does not show one", "cannot tell": "cannot tell"}
TABLE_1 = (
    "Pre-training",
    "Cleaning",
    "Seeds",
    "Top-1 before",
    "ASR before",
    BEST_WITHIN[0],
    "Accuracy kept",
    "Reached by, with",
    BEST_WITHIN[1],
    "Trade-off",
)
PLACE = ("architecture", "data", "attack")  # what Group.place holds
PATHS = marked("place", *TRAINING)
VIEWS = {  # the first view, and the second that a self-supervised loss adds
    "cleanclip": ("plain", "AutoAugment"),
    "randaugment": ("plain", "RandAugment"),
    "slip": ("randomly cropped", "SimCLR"),
    "par": ("noisy and partly erased", ""),
}
