"""The report: one HTML file that needs nothing else, neither scripts nor the network."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape

from fastbd.study.pareto import CEILINGS, LANDED, Outcome, outcomes
from fastbd.study.runs import Evaluation, Run, method_name, objective_name

QUESTION = "Can the backdoor be cleaned out of a CLIP model, and does that depend on its pre-training objective?"


def page(runs: Sequence[Run], figures: Mapping[str, bytes]) -> str:
    """The whole page. `figures`: the PNG files "scatter", "trajectories" and "curves"."""
    table = outcomes(runs)
    sections = [
        f"<h1>Backdoor cleaning report</h1><p class=question>{escape(QUESTION)}</p>",
        '<section class="answer">' + _answers(table) + "</section>",
        f"<section><h2>Models</h2>{_table(table)}<p class=note>{escape(_reading(runs))}</p></section>",
        *(_plot(name, figures[name], title, text) for name, title, text in FIGURES),
        _samples(runs),
        "<section><h2>Circumstances</h2>" + "".join(_circumstances(run) for run in runs) + "</section>",
    ]
    return HEAD + "\n".join(sections) + "</main></body></html>\n"


def answers(table: Sequence[Outcome]) -> list[tuple[str, str]]:
    """(model, what cleaning did to it, in numbers) for each pre-trained model."""
    models: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in table:
        models.setdefault((outcome.objective, outcome.model), []).append(outcome)
    return [(f"{objective_name(key[0])} ({key[1]})", _answer(group)) for key, group in models.items()]


def _answer(group: list[Outcome]) -> str:
    start = next((o.start for o in group if o.start), None)
    if start is None or start.get("asr") is None:
        return "No ASR was measured before cleaning, so there is nothing to say about a backdoor."
    state = f"top-1 {percent(start['top1'])}, ASR {percent(start['asr'])}"
    if start["asr"] < LANDED:
        return f"The attack never landed ({state} before cleaning), so cleaning this model shows nothing."
    if group[0].method is None:
        return f"Backdoored ({state}), and not cleaned in these runs."
    return f"Before cleaning: {state}. " + " ".join(_verdict(outcome, start) for outcome in group)


def _verdict(outcome: Outcome, start: Evaluation) -> str:
    method = method_name(outcome.method or "")
    cleaned, lowest = outcome.best[0], outcome.lowest
    if lowest is None:
        return f"{method} has no evaluation yet."
    if cleaned is None:
        return (
            f"{method} failed to reach ASR ≤ {CEILINGS[0]:.0%}: its lowest is {percent(lowest['asr'])}, "
            f"at top-1 {percent(lowest['top1'])}."
        )
    change = cleaned["top1"] / start["top1"] - 1 if start["top1"] else 0.0
    cost = f"at the cost of {percent(-change)} of the accuracy" if change < 0 else "at no cost in accuracy"
    return f"{method} brought ASR down to {percent(cleaned['asr'])} {cost} (top-1 {percent(cleaned['top1'])})."


def cells(outcome: Outcome) -> list[str]:
    """The outcome's row under COLUMNS."""
    before, last = outcome.start or {}, outcome.last or {}
    return [
        f"{objective_name(outcome.objective)} ({outcome.model})",
        percent(before.get("top1"), before, "top1"),
        percent(before.get("asr"), before, "asr"),
        f"{method_name(outcome.method)} (runs: {outcome.runs})" if outcome.method else "not cleaned",
        percent(last.get("top1"), last, "top1"),
        percent(last.get("asr"), last, "asr"),
        percent(last.get("recovery"), last, "recovery"),
        *(percent(e["top1"] if e else None, e, "top1") for e in outcome.best),
        percent(outcome.area) if outcome.last else MISSING,
    ]


def percent(share: float | None, evaluation: Evaluation | None = None, key: str = "") -> str:
    """0.1649 -> "16.5%", with the interval of the evaluation's `key` where it has one."""
    if share is None:
        return MISSING
    text = f"{100 * share:.1f}%"
    if evaluation and f"{key}_low" in evaluation:
        text += f" ({100 * evaluation[key + '_low']:.1f}–{100 * evaluation[key + '_high']:.1f})"
    return text


def _answers(table: Sequence[Outcome]) -> str:
    return "".join(f"<p><strong>{escape(model)}</strong>: {escape(text)}</p>" for model, text in answers(table))


def _table(table: Sequence[Outcome]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    rows = []
    for outcome in table:
        row = zip(COLUMNS, cells(outcome), strict=True)
        # the data-label is what a narrow screen shows in place of the head
        rows.append("".join(f'<td data-label="{escape(column)}">{_value(cell)}</td>' for column, cell in row))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _value(cell: str) -> str:
    value, space, detail = cell.partition(" (")
    return f"<span>{escape(value)}{f' <small>({escape(detail)}</small>' if space else ''}</span>"


def _reading(runs: Sequence[Run]) -> str:
    """How to read the table: what was measured, on what, and how a row stands for several runs."""
    evaluations = [e for run in runs for e in run.metrics]
    attacks = [e for run in runs for e in run.attacks]
    text = f"Measured on {evaluations[-1]['set']} ({_range(evaluations, 'n')} images"
    if attacks:
        aims = ", ".join(sorted({f"{e.get('trigger', '?')} to “{e.get('target', '?')}”" for e in attacks}))
        text += f"; ASR and recovery on {_range(attacks, 'n_asr')} triggered images not of the target class; {aims}"
    return text + (
        "). In brackets: 95% intervals. Best: over every evaluation of these runs after the start. "
        "After: the last evaluation of the run that gave the best, or else of the one that ended at the lowest ASR. "
        "Recovery: accuracy on triggered images. Trade-off: best top-1 within an ASR ceiling, averaged over ceilings."
    )


def _range(evaluations: Sequence[Evaluation], key: str) -> str:
    counts = sorted({e[key] for e in evaluations if key in e})
    return " to ".join(f"{n:,}" for n in (counts if len(counts) < 2 else (counts[0], counts[-1]))) or "?"


def _image(png: bytes, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _plot(name: str, png: bytes, title: str, text: str) -> str:
    caption = f"<p class=note>{escape(text)}</p>"
    return f'<section><h2>{escape(title)}</h2><div class="plot {name}">{_image(png, title)}</div>{caption}</section>'


def _samples(runs: Sequence[Run]) -> str:
    """A contact sheet for each objective and method; those of a sweep's other runs look the same."""
    sheets = {(run.method, run.objective): run for run in reversed(runs) if (run.path / "samples.png").exists()}
    figures = ""
    for run in reversed(sheets.values()):
        image = _image((run.path / "samples.png").read_bytes(), run.name)
        figures += f"<figure>{image}<figcaption>{escape(run.name)}</figcaption></figure>"
    return f'<section><h2>Training images</h2><div class="sheets">{figures}</div></section>' if figures else ""


def _circumstances(run: Run) -> str:
    facts = {"folder": str(run.path), "config": run.config, "environment": run.env}
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    return f"<details><summary>{escape(run.name)}</summary><pre>{escape(text)}</pre></details>"


MISSING = "–"
COLUMNS = (
    "Model",
    "Top-1 before",
    "ASR before",
    "Cleaning",
    "Top-1 after",
    "ASR after",
    "Recovery after",
    *(f"Best top-1 at ASR\N{NO-BREAK SPACE}≤\N{NO-BREAK SPACE}{ceiling:.0%}" for ceiling in CEILINGS),
    "Trade-off",
)
FIGURES = (
    (
        "scatter",
        "Accuracy against attack success rate",
        "Every evaluation of every cleaning run; a star is a model before cleaning. Good cleaning is at the top left. "
        "The thin lines join the best points of each pre-training objective.",
    ),
    ("trajectories", "How cleaning went", "Bands, where runs are few: 95% intervals. Dotted lines: ASR 5% and 10%."),
    ("curves", "Training losses", "The parts of the loss as logged (faint) and their running mean."),
)
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Backdoor cleaning report</title><style>
body { margin: 0; color: #1a1a1a; background: #fff; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { margin: 0; font-size: 1.8rem; line-height: 1.2; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.25rem; }
.question { margin: .5rem 0 1.5rem; color: #555; font-size: 1.1rem; }
.answer { padding: .25rem 1.25rem; background: #f3f6f9; border-left: 4px solid #0072b2; }
.answer p { max-width: 60rem; margin: .75rem 0; }
.note, figcaption, small { color: #555; }
.note, figcaption { max-width: 60rem; font-size: .875rem; }
small { display: block; font-size: .75rem; white-space: nowrap; }
td:first-child small { white-space: normal; overflow-wrap: anywhere; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
th { vertical-align: bottom; font-size: .8rem; border-bottom: 2px solid #1a1a1a; }
figure { margin: 0; }
img { max-width: 100%; height: auto; }
.plot { overflow-x: auto; }
.scatter img { max-width: min(100%, 46rem); }
.sheets { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem; }
details { border-bottom: 1px solid #ddd; }
summary { padding: .4rem 0; cursor: pointer; }
pre { margin: 0 0 1rem; padding: .75rem; overflow-x: auto; background: #f7f7f7; font-size: .8rem; }
@media screen and (max-width: 50rem) {
  thead { display: none; }
  tr { display: block; margin-bottom: 1rem; border-top: 2px solid #1a1a1a; }
  td { display: flex; justify-content: space-between; gap: 1rem; padding: .3rem 0; }
  td::before { content: attr(data-label); color: #555; }
  td span { text-align: right; }
  .trajectories img, .curves img { width: 44rem; max-width: none; }
}
@media print {
  body { font-size: 10pt; }
  table { font-size: 7.5pt; }
  th, small { font-size: 6.5pt; }
  th, td { padding: .25rem .3rem; }
  .plot, figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
</style></head><body><main>
"""
