"""The report's files: the page, its figures and its tables, written so that a reader never meets half of one."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbd.base.files import replacing
from fastbd.base.run_folder import Run, method_name
from fastbd.config.fields import flags_of
from fastbd.config.flags import CleanConfig
from fastbd.report import page, plots, stopping, tables

FIGURES = (plots.scatter, plots.methods, plots.trajectories, plots.curves)


def write(runs: Sequence[Run], out: Path, refresh: int = 0) -> list[Path]:
    """The page `out`, and beside it each figure as PNG and SVG and the tables as CSV; their paths, the page last.

    With `refresh`, while runs go on, a browser loads the page again after so many seconds, and there is no SVG.
    """
    panels = {(method_name(run), run.attack) for run in runs if run.verb == "clean"}
    alone = len(panels) < 2  # then the scatter shows it all
    figures = {draw.__name__: plots.laid_out(draw(runs)) for draw in FIGURES if not (alone and draw is plots.methods)}
    images = {name: plots.png(figure) for name, figure in figures.items()}
    content = {f"{name}.png": png for name, png in images.items()}
    content |= {} if refresh else {f"{name}.svg": plots.svg(figure) for name, figure in figures.items()}
    tabled = {"table": table_rows, "runs": run_rows, "evaluations": evaluation_rows, "stopping": stopping_rows}
    content |= {f"{name}.csv": as_csv(rows(runs)) for name, rows in tabled.items()}
    content[out.name] = page.page(runs, images, refresh).encode()
    return save(content, out.parent)


def save(content: Mapping[str, bytes], folder: Path) -> list[Path]:
    """Write each file whole, by a rename."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        with replacing(folder / name) as part:
            part.write_bytes(data)
    return [folder / name for name in content]


def as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows under all keys that any of them has."""
    columns = list({key: None for row in rows for key in row})
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def table_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Table 1: shares are fractions."""
    rows = []
    for row in tables.table(runs):
        group = row.group
        line = {
            **_place(group.place),
            "pretrain_objective": group.objective,
            "variant": group.variant,
            "cleaning": group.method,
            "runs": len(group.runs),
            "seeds": row.replicates,
            "models": row.models,
            **_ends("top1_before", row.top1),
            **_ends("asr_before", row.asr),
        }
        for ceiling, best in zip(tables.CEILINGS, row.best, strict=True):
            name = f"at_asr_{100 * ceiling:g}"
            line |= {
                **_ends(f"top1_{name}", best.top1),
                **_ends(f"asr_{name}", best.asr),
                **_ends(f"kept_{name}", best.kept),
                f"seeds_{name}": best.reached,
            }
            line[f"points_{name}"] = " ".join(
                f"{run.id or run.name}@{e['step']}" for run, e in filter(None, best.points)
            )
        rows.append(line | _ends("area", row.area))
    return rows


def run_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a run: how it ended, its cost, its instability."""
    return [_run_row(run) for run in runs]


def _run_row(run: Run) -> dict[str, Any]:
    training, evaluating = tables.seconds(run)
    fell, rise = tables.instability(run) or (None, None)
    back = next(iter(tables.rebounds(run)), {})
    return {
        **_about(run),
        "reason": run.result.get("reason"),
        "device": tables.device(run),
        "seconds": round(training + evaluating, 3),
        "train_seconds": round(training, 3),
        "evaluate_seconds": round(evaluating, 3),
        "estimated": "seconds" not in run.result,
        "pairs_per_s": tables.speed(run, "pairs_per_s"),
        "of_limit": tables.speed(run, "of_limit"),
        "fell_while_asr_rose": fell,
        "largest_asr_rise": rise,
        **{f"rebound_{k}": v for k, v in back.items()},
        "command": run.recorded.get("command"),
    }


def evaluation_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every line of every metrics.jsonl, with its run's circumstances; what is no number or word is left out."""
    return [
        {**_about(run), **{k: v for k, v in e.items() if not isinstance(v, list | dict)}, **_environment(run)}
        for run in runs
        for e in run.rows
    ]


def stopping_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What each rule would have chosen in each run, and over all runs of a replicate."""
    chosen = [("run", _about(run), name, choice) for run, name, choice in stopping.by_run(runs)]
    for group, name, choices in stopping.by_group(runs):
        about = {"pretrain_objective": group.objective, "model": group.place[0], "method": group.method}
        chosen += [("sweep", about, name, choice) for choice in choices]
    return [
        {
            "over": over,
            **about,
            "rule": name,
            **{key: c.chosen[key] for key in ("step", "top1", "asr")},
            "top1_given_away": c.cost,
        }
        for over, about, name, c in chosen
    ]


def _about(run: Run) -> dict[str, Any]:
    flags = {key: run.config.get(key) for key in FLAGS}
    return {
        "run": run.name,
        "id": run.id,
        "verb": run.verb,
        "pretrain_objective": run.pretrain_objective,
        "method": method_name(run),
        "model": run.architecture,
        "data": run.recorded.get("data"),
        "attack": run.attack,
        "start": str(run.start or ""),
        **flags,
    }


def _environment(run: Run) -> dict[str, Any]:
    return {key: run.env.get(key) for key in ("fastbd", "commit", "date", "gpu", "cuda", "torch", "platform")}


def _place(place: tuple[str, str, str]) -> dict[str, str]:
    return dict(zip(("model", "data", "attack"), place, strict=True))


def _ends(name: str, value: tables.Estimate | None) -> dict[str, float | None]:
    mean, low, high = value[:3] if value else (None,) * 3
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


COLUMNS = {name: flag.column for name, flag in flags_of(CleanConfig).items() if flag.column}
FLAGS = sorted(COLUMNS, key=COLUMNS.__getitem__)
