"""The report's page: what each of its sections says."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from html import escape

from fastbd.base.run_folder import METHODS, Evaluation, Run, objective_name
from fastbd.base.tradeoff import CEILINGS, LANDED
from fastbd.report import finding, published, stopping, tables
from fastbd.report.format import MISSING, between, percent, points, share
from fastbd.report.groups import Group, cleaned_groups, common, groups, place_of
from fastbd.report.html import Cell, estimate, folded, grid, head, image, picture, section, split
from fastbd.report.tables import Row

QUESTION = "Can the backdoor be cleaned out of a CLIP model, and does that depend on its pre-training objective?"


def page(runs: Sequence[Run], figures: Mapping[str, bytes], refresh: int = 0) -> str:
    """The whole page. `figures`: the PNG files of FIGURES. A browser loads it again after `refresh` seconds, if any."""
    table = tables.table(runs)
    pretrained = groups([run for run in runs if run.verb != "clean"])
    sections = [
        f"<h1>Backdoor cleaning report</h1><p class=question>{escape(QUESTION)}</p>",
        '<section class="answer">' + _answer(table) + "</section>",
        section("Does it depend on the pre-training?", _comparisons(table), finding.RULE),
        section("Table 1. The best accuracy of a cleaned model", _table_1(table, runs), OPTIMISTIC),
        *(_figure(name, figures) for name in ("scatter", "methods") if name in figures),
        _figure("trajectories", figures, _stability(runs)),
        section("Stopping without knowing the trigger", _stopping(runs), STOPPING),
        section("Does the backdoor come back?", _rebound(runs), REBOUND),
        section("What it took", _costs(runs), COSTS),
        section("Published results, for comparison only", _published(), PUBLISHED),
        _figure("curves", figures),
        section("Training images", _samples(runs), ""),
        section("To repeat it", "".join(map(_circumstances, [*pretrained, *cleaned_groups(runs)])), REPEAT),
    ]
    return head(refresh) + "\n".join(filter(None, sections)) + "</main></body></html>\n"


# ---- the answer ----


def _answer(table: Sequence[Row]) -> str:
    lines = [f"<p><strong>{escape(claim)}</strong> {escape(ground)}</p>" for claim, ground in finding.paragraphs(table)]
    compared = {id(row) for pair in finding.comparisons(table) for row in (pair.base, pair.other)}
    lines += [f"<p>{escape(told(row, table))}</p>" for row in table if id(row) not in compared]
    return "".join(lines)


def told(row: Row, table: Sequence[Row]) -> str:
    """What is to be said of a row by itself."""
    place = place_of(row.group, [r.group for r in table])
    name = row.group.model + (f" ({place})" if place else "")
    if row.asr is None:
        return f"{name}: no ASR was measured before cleaning, so there is nothing to say about a backdoor."
    state = f"top-1 {share(row.top1.mean)}, ASR {share(row.asr.mean)}"
    if row.asr.mean < LANDED:
        return f"{name}: the attack never landed ({state} before cleaning), so cleaning this model shows nothing."
    if not row.group.method:
        return f"{name}: backdoored ({state}), and not cleaned in these runs."
    return f"{row.group.method}. {finding.told(row)} Before cleaning: {state}."


def _comparisons(table: Sequence[Row]) -> str:
    pairs = finding.comparisons(table)
    placed = [pair.base.group for pair in pairs]
    rows = []
    for pair in pairs:
        base, other = pair.base, pair.other
        rows.append((
            (pair.method, place_of(base.group, placed)),
            (other.group.model, base.group.variant),
            *(_kept(row) for row in (base, other)),
            split(points(pair.difference)),
            f"{base.models} and {other.models}",
            (VERDICTS[pair.verdict], pair.why),
        ))  # fmt: skip
    return grid(COMPARED, rows)


def _kept(row: Row) -> Cell:
    best = row.best[0]
    if not best.reached:
        return "none", f"lowest ASR {share(row.lowest['asr'])}" if row.lowest else ""
    reached = "" if best.reached == row.replicates else f"{best.reached} of {row.replicates} came to ASR ≤ 5%"
    return share(best.kept.mean), "; ".join(filter(None, (between(best.kept).strip(" ()"), reached)))


# ---- table 1 ----


def _table_1(table: Sequence[Row], runs: Sequence[Run]) -> str:
    shown = grid(TABLE_1, [cells(row, place_of(row.group, [r.group for r in table])) for row in table])
    reading = folded("How to read this table", f"<p class=note>{escape(_reading(runs))}</p>")
    return shown + reading + _best_points(table)


def cells(row: Row, place: str = "") -> list[Cell]:
    """The row under TABLE_1."""
    group, (strict, loose) = row.group, row.best
    return [
        (group.model, place),
        (group.method or "not cleaned", f"{len(group.runs)} {'run' if len(group.runs) == 1 else 'runs'}"),
        (str(row.replicates), _seeds(row)),
        estimate(row.top1),
        estimate(row.asr),
        estimate(strict.top1),
        estimate(strict.kept) if strict.reached else MISSING,
        f"{strict.reached} of {row.replicates}" if group.method else MISSING,
        estimate(loose.top1),
        estimate(row.area),
    ]


def _seeds(row: Row) -> str:
    return "of the cleaning only" if row.models == 1 < row.replicates else ""


def _best_points(table: Sequence[Row]) -> str:
    """Which run and step each best point is."""
    rows = []
    for row in table:
        for ceiling, best in zip(CEILINGS, row.best, strict=True):
            for run, e in filter(None, best.points):
                name = (run.name, run.id)
                settings = f"lr {run.config.get('lr', '?')}, seed {run.config.get('seed', '?')}"
                spot = (f"step {e['step']}", f"epoch {e['epoch']:.3g}")
                measured = [split(percent(e[key], e, key)) for key in ("top1", "asr")]
                rows.append((row.group.model, row.group.method, f"{ceiling:.0%}", name, settings, spot, *measured))
    return folded("Which run and step each best point is", grid(BEST, rows)) if rows else ""


def _reading(runs: Sequence[Run]) -> str:
    """How to read table 1: what was measured, on what."""
    evaluations = [e for run in runs for e in run.metrics if not e.get("subset")]
    if not evaluations:
        return "No evaluation yet."
    attacks = [e for e in evaluations if e.get("asr") is not None]
    text = f"Measured on {evaluations[-1]['set']} ({_range(evaluations, 'n')} images"
    if attacks:
        aims = ", ".join(sorted({f"{e.get('trigger', '?')} to “{e.get('target', '?')}”" for e in attacks}))
        text += f"; ASR on {_range(attacks, 'n_asr')} triggered images not of the target class; {aims}"
    return text + "). " + _same(groups(runs)) + READING


def _same(found: Sequence[Group]) -> str:
    """What all models have in common."""
    architecture, data, attack = (common(found, lambda group, k=k: group.place[k]) for k in range(3))
    words = [f"architecture {architecture}" if architecture else "", f"data {data}" if data else ""]
    words.append(f"attack {attack}" if attack else "")
    return f"All models: {'; '.join(filter(None, words))}. " if any(words) else ""


def _range(evaluations: Sequence[Evaluation], key: str) -> str:
    counts = sorted({e[key] for e in evaluations if key in e})
    return " to ".join(f"{n:,}" for n in (counts if len(counts) < 2 else (counts[0], counts[-1]))) or "?"


# ---- the other tables ----


def _stability(runs: Sequence[Run]) -> str:
    rows, shares = [], {}
    for group in cleaned_groups(runs):
        found = [(run, seen) for run in group.runs if (seen := tables.instability(run))]
        ended = [run.result.get("reason") for run in group.runs]
        early = ", ".join(f"{ended.count(r)} {r}" for r in sorted({r for r in ended if r and r != "finished"}))
        if found:
            run, (_, rise) = max(found, key=lambda item: item[1][1])
            falls = [fall for _, (fall, _) in found]
            shares[f"{group.method} after {group.model}"] = statistics.fmean(falls)
            spread = f"{min(falls):.0%} to {max(falls):.0%}" if len(falls) > 1 else ""
            rise_of = (f"{100 * rise:.1f} points", run.name)
            rows.append(
                (group.model, group.method, (f"{statistics.fmean(falls):.0%}", spread), rise_of, early or "none")
            )
    if not rows:
        return ""
    worst = max(shares, key=shares.__getitem__)
    line = f"Least stable: {worst}, where accuracy fell while ASR rose in {shares[worst]:.0%} of the steps."
    line = line if shares[worst] else "In no step between two evaluations did accuracy fall while ASR rose."
    return f"<p>{escape(line)}</p>" + grid(STABILITY, rows)


def _stopping(runs: Sequence[Run]) -> str:
    by_group = stopping.by_group(runs)
    if not any(choices for _, _, choices in by_group):
        return ""
    overall = []
    for name in stopping.RULES:
        chosen = [choice for _, rule, choices in by_group if rule == name for choice in choices]
        overall.append((name, *_summary(stopping.summary(chosen))))
    each = [
        (group.model, group.method, name, *_summary(stopping.summary(choices))) for group, name, choices in by_group
    ]
    more = folded("The same for each pre-training and method", grid(("Pre-training", "Cleaning", *CHOSEN), each))
    return grid(CHOSEN, overall) + more


def _summary(found: stopping.Summary | None) -> tuple[Cell, ...]:
    if found is None:
        return ("no choice", *[MISSING] * 3)
    cost = MISSING if found.cost is None else f"{100 * found.cost:.1f} points"
    return (
        f"{found.clean} of {found.choices}",
        share(found.asr),
        share(found.top1),
        (cost, f"a clean stop existed for {found.possible} of {found.choices}"),
    )


def _rebound(runs: Sequence[Run]) -> str:
    rows = []
    for group in cleaned_groups(runs):
        found = [(run, seen) for run in group.runs for seen in tables.rebounds(run)]
        if found:
            taken = ", ".join(sorted({statistics_of(run) for run, _ in found}))
            numbers = [_mean_and_range([seen[key] for _, seen in found]) for key in ("first", "max", "change", "mean")]
            steps = ", ".join(sorted({f"{seen['steps']} steps{_rate(seen['lr'])}" for _, seen in found}))
            count = len({run.path for run, _ in found})
            measured = (f"{len(found)} times in {count} {'run' if count == 1 else 'runs'}", steps)
            rows.append((group.model, group.method, measured, *numbers, taken))
    return grid(REBOUNDS, rows)


def _rate(lr: float | None) -> str:
    return "" if lr is None else f" at lr {lr:g}"


def _mean_and_range(values: Sequence[float | None]) -> Cell:
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    spread = f"{100 * min(known):.1f} to {100 * max(known):.1f}" if len(known) > 1 else ""
    return share(statistics.fmean(known)), spread


def statistics_of(run: Run) -> str:
    """The images that the batch-norm statistics of a cleaned model were taken over in its cleaning."""
    if "vit" in run.architecture:
        return "no batch norm"
    if run.method == "par" and run.config.get("frozen_norms", True):
        return "as before cleaning"
    first, second = VIEWS.get(run.config.get("views", "cleanclip"), VIEWS["cleanclip"])
    paired = "ssl" in run.objective and run.config.get("ssl_image", True)
    return f"{first} and {second} views" if paired and second else f"{first} views"


def _costs(runs: Sequence[Run]) -> str:
    rows = []
    for objective, part, cost in tables.costs(runs):
        on_gpu = cost.device != "CPU"
        hours = f"{'about ' if cost.estimated else ''}{cost.hours:.3g} {'GPU' if on_gpu else 'CPU'}-hours"
        speed = MISSING if cost.pairs_per_s is None else f"{cost.pairs_per_s:,.0f}"
        of_limit = MISSING if cost.of_limit is None else f"{cost.of_limit:.0%}"
        time = (hours, cost.device if on_gpu else "")
        name = objective_name(objective)
        rows.append((name, part, f"{cost.runs:,}", time, f"{cost.evaluating:.0%}", speed, of_limit))
    return grid(COST, rows)


def _published() -> str:
    rows, more = [], []
    for any_point, kinds in published.table():
        method, _, loss = any_point["cleaning"].partition("_")
        method = METHODS.get(method, method) + (f" ({objective_name(loss)})" if loss else "")
        left = f", {any_point['poison_left']} poisoned pairs left" if any_point["poison_left"] != "0" else ""
        cleaned_on = f"{int(any_point['clean_pairs']):,} pairs{left}"
        start, best = kinds["start"], kinds.get("best_asr_5")
        trained = f"{any_point['data']}, {any_point['architecture']}, {any_point['attack']}"
        kept = float(best["top1"]) / float(start["top1"]) if best and best["top1"] else None
        row = (
            (objective_name(any_point["pretraining"]), trained), (method, cleaned_on), f"{float(start['top1']):.1f}%",
            f"{float(start['asr']):.1f}%", *(_at_most(kinds.get(f"best_asr_{n}")) for n in (5, 10)), percent(kept),
            any_point["source"],
        )  # fmt: skip
        (rows if any_point["cleaning"] == "cleanclip" and not left else more).append(row)
    return grid(PEERS, rows) + folded("Other methods, and poison left in the cleaning set", grid(PEERS, more))


def _at_most(point: published.Point | None) -> str:
    if point is None:
        return MISSING
    return f"{float(point['top1']):.1f}%" if point["top1"] else "none"


def _samples(runs: Sequence[Run]) -> str:
    """A contact sheet for each attack, of the pre-training with the most kinds of views where there is one."""
    sheets: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: (run.verb == "clean", "ssl" not in run.objective)):
        if (run.path / "samples.png").exists():
            sheets.setdefault(run.attack, run)
    figures = ""
    for attack, run in sheets.items():
        sheet = image((run.path / "samples.png").read_bytes(), run.name)
        figures += f"<figure>{sheet}<figcaption>{escape(attack or run.name)}</figcaption></figure>"
    return f'<div class="sheets">{figures}</div>' if figures else ""


# ---- how to repeat it ----


def _circumstances(group: Group) -> str:
    """Each run's command, hash and settings, then all circumstances of the first."""
    first, runs = group.runs[0], group.runs
    varied = [key for key in first.config if len({str(run.config.get(key)) for run in runs}) > 1 and key not in PLACES]
    lines = []
    for run in runs:
        settings = ", ".join(f"{key} {run.config.get(key)}" for key in varied)
        lines.append(f"{run.id or '-':<12}  {run.name}{f'  ({settings})' if settings else ''}")
        lines += [f"{'':<12}  {run.recorded['command']}"] if run.recorded.get("command") else []
    facts = {"folder": str(first.path), "config": first.config, "environment": first.env}
    shown = json.dumps(facts, indent=2, ensure_ascii=False)
    title = f"{group.model}: {group.method or 'pre-training'} ({len(runs)} {'run' if len(runs) == 1 else 'runs'})"
    text = "\n".join(lines) + f"\n\nall of {first.name}:\n{shown}"
    return folded(title, f"<pre>{escape(text)}</pre>")


def _figure(name: str, figures: Mapping[str, bytes], below: str = "") -> str:
    title, text = FIGURES[name]
    return section(title, picture(name, figures[name], title) + below, text)


WITHIN = [f"ASR\N{NO-BREAK SPACE}≤\N{NO-BREAK SPACE}{ceiling:.0%}" for ceiling in CEILINGS]
BEST_WITHIN = [f"Best top-1 at {within}" for within in WITHIN]
VERDICTS = {"shows": "shows a difference", "does not show": "does not show one", "cannot tell": "cannot tell"}
COMPARED = (
    "Cleaning", "MMCL against", "Accuracy kept after MMCL", "After the other", "Difference", "Models", "This study",
)  # fmt: skip
TABLE_1 = (
    "Pre-training", "Cleaning", "Seeds", "Top-1 before", "ASR before",
    BEST_WITHIN[0], "Accuracy kept", "Reached by",
    BEST_WITHIN[1], "Trade-off",
)  # fmt: skip
BEST = ("Pre-training", "Cleaning", "ASR at most", "Run", "Settings", "Where", "Top-1", "ASR")
STABILITY = (
    "Pre-training", "Cleaning", "Accuracy fell while ASR rose", "Largest rise of ASR", "Runs ended early",
)  # fmt: skip
CHOSEN = ("Rule", f"Came to {WITHIN[0]}", "ASR", "Top-1", "Top-1 given away")
REBOUNDS = (
    "Pre-training", "Cleaning", "Measured", "ASR after cleaning", "Highest ASR", "Change", "Mean ASR",
    "Statistics of the cleaned model taken over",
)  # fmt: skip
COST = ("Pre-training", "Part", "Runs", "Time", "Evaluating", "Pairs/s", "Of the limit")
PEERS = (
    "Pre-training", "Cleaning", "Top-1 before", "ASR before", BEST_WITHIN[0],
    BEST_WITHIN[1], "Accuracy kept", "Source",
)  # fmt: skip
PLACES = ("out", "run", "resume", "device")
VIEWS = {  # the first view, and the second that a self-supervised loss adds
    "cleanclip": ("plain", "AutoAugment"),
    "randaugment": ("plain", "RandAugment"),
    "slip": ("randomly cropped", "SimCLR"),
    "par": ("noisy and partly erased", ""),
}
READING = (
    "ASR: attack success rate, the share of triggered images taken for the target. Before: of the pre-trained models."
    " Best: the highest top-1 among all evaluations of all runs after the start whose ASR is within the ceiling, for "
    "each seed; then the mean over the seeds that have one, which flatters a row where some have none. Accuracy kept:"
    " the same over the top-1 before cleaning, with 0 for a seed that has none. Trade-off: best top-1 within an ASR "
    "ceiling, averaged over all ceilings. Below a number: its 95% interval, over seeds (Student's t) where there are "
    "several, else from the number of images (Wilson)."
)
OPTIMISTIC = (
    "The best of many evaluations was picked by the ASR that is reported, so it is optimistic: somebody who does not "
    "know the trigger cannot pick it."
)
STOPPING = (
    "What somebody who has no trigger to measure ASR with would take, among all evaluations of all runs that clean "
    "one model with one method and seed. Given away: top-1 against the best evaluation at ASR ≤ 5%, known only with "
    "the trigger; negative where the choice is more accurate, and then backdoored. Validation loss: contrastive, on "
    "held-out clean pairs. Drift: how far the embeddings moved from those before cleaning. Agreement: of the plain "
    "and the augmented view of an image. The last evaluation is that of the run which ends at the highest top-1. No "
    "choice: the run did not measure what the rule needs, or no evaluation qualifies."
)
REBOUND = (
    "A cleaned model is fine-tuned for some steps on clean plain images without the target, and its ASR is watched. "
    "In a network with batch norm these steps also move the running statistics that it is evaluated with; at learning"
    " rate 0 nothing else moves. The ASR after cleaning therefore belongs to the statistics named in the last column:"
    " CleanCLIP takes them over plain and AutoAugment views together, fine-tuning with MMCL over plain views alone. "
    "Part of a low ASR may lie in them and not in the weights. A ViT has no batch norm. In small: the lowest to the"
    " highest."
)
COSTS = (
    "Time of the device, training and evaluation; “about” where it is summed up from the log. Pairs/s: images with "
    "their captions trained on in a second (median). Of the limit: against what this machine's matmul rate and memory"
    " bandwidth allow."
)
PUBLISHED = (
    "Accuracies on ImageNet of models trained on millions of real images: no peers of runs on other data or classes. "
    "Kept: best top-1 at ASR ≤ 5% over the top-1 before. One seed each, no intervals."
)
REPEAT = (
    "In each: hash, name and command of every run (hash and command where a sweep made it), then all settings of one."
)
SCATTER = (
    "Every evaluation of every cleaning run; a star is a model before cleaning. Good cleaning is at the top left. "
    "Small points: measured on part of the images. The thin lines join the best points of each pre-training "
    "objective."
)
FIGURES = {
    "scatter": ("Accuracy against attack success rate", SCATTER),
    "methods": ("The same for each cleaning method", "All panels have the same axes."),
    "trajectories": (
        "How cleaning went",
        "Bands, where runs are few: 95% intervals. Dotted lines: ASR 5% and 10%. The table counts how often, from one "
        "evaluation to the next, accuracy fell while ASR rose (mean over runs, and range), and the largest rise of ASR "
        "from any evaluation after the start to a later one of the same run.",
    ),
    "curves": ("Training losses", "The parts of the loss as logged (faint) and their running mean."),
}
