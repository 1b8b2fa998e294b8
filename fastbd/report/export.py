"""The tables of a report for those who plot by themselves, as CSV or Parquet: shares are fractions.

Each row is a dict; None is what is not known, an empty field in CSV. Where two tables share a column, it is the same.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastbd.base.errors import UserError
from fastbd.base.evaluation import RecordedEvaluation, measures_nothing
from fastbd.base.run_folder import Run, method_name
from fastbd.config.fields import flags_of
from fastbd.config.flags import CleanConfig
from fastbd.report import stopping, tables

Rows = list[dict[str, Any]]


def files(runs: Sequence[Run], kind: str) -> dict[str, bytes]:
    """Return the tables as files of a kind, csv or parquet, by their names."""
    write = WRITERS[kind]
    return {f"{name}.{kind}": write(rows(runs)) for name, rows in TABLES.items()}


def as_csv(rows: Rows) -> bytes:
    """The rows under all keys that any of them has."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: Rows) -> bytes:
    """The rows under all keys that any of them has; a column with texts and numbers is one of texts."""
    pyarrow = _pyarrow()
    columns = {name: _alike([row.get(name) for row in rows]) for name in _columns(rows)}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def check(kind: str) -> None:
    """Raise a UserError where tables of the kind cannot be written here."""
    if kind == "parquet":
        _pyarrow()


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "--tables parquet needs PyArrow: pip install 'fastbd[parquet]', or write --tables csv."
        ) from None
    return pyarrow


def _columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list({key: None for row in rows for key in row})


def _alike(values: list[Any]) -> list[Any]:
    """The values as one type: texts where any is a text, else floats where any is one."""
    kinds = {type(value) for value in values} - {type(None)}
    if len(kinds) < 2:
        return values
    one = float if kinds <= {int, float} else str
    return [None if value is None else one(value) for value in values]


def table_rows(runs: Sequence[Run]) -> Rows:
    """Table 1: shares are fractions."""
    return [table_row(row) for row in tables.table(runs)]


def table_row(row: tables.Row) -> dict[str, Any]:
    """A row of table 1."""
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
        line[f"points_{name}"] = " ".join(f"{run.id or run.name}@{e['step']}" for run, e in filter(None, best.points))
    return line | _ends("area", row.area)


def run_rows(runs: Sequence[Run]) -> Rows:
    """A row a run: how it ended, its cost, its instability."""
    return [_run_row(run) for run in runs]


def _run_row(run: Run) -> dict[str, Any]:
    training, evaluating = tables.seconds(run)
    fell, rise, _ = tables.instability(run) or (None, None, None)
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


def evaluation_rows(runs: Sequence[Run]) -> Rows:
    """Every line of every metrics.jsonl, with its run's circumstances; what is no number or word is left out.

    So is what a set of few classes cannot measure, as top-10 of six.
    """
    return [{**_about(run), **_measured(e), **_environment(run)} for run in runs for e in run.rows]


def _measured(e: RecordedEvaluation) -> dict[str, Any]:
    return {k: v for k, v in e.items() if not isinstance(v, list | dict) and not measures_nothing(e, k)}


def log_rows(runs: Sequence[Run]) -> Rows:
    """Every line of every log.jsonl; lr is the run's, the highest of its schedule."""
    return [{**about, **line, "lr": about["lr"]} for run in runs for about in [_short(run)] for line in run.log]


def stopping_rows(runs: Sequence[Run]) -> Rows:
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


def _short(run: Run) -> dict[str, Any]:
    """What tells the run and its curve from others."""
    about = _about(run)
    return {key: about[key] for key in ("run", "id", "verb", "pretrain_objective", "method", "lr", "seed")}


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
    """The mean and the ends of its interval; of those none where there is no interval."""
    mean, *ends = value[:3] if value else (None,) * 3
    low, high = ends if value and math.isfinite(value.low) else (None, None)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


COLUMNS = {name: flag.column for name, flag in flags_of(CleanConfig).items() if flag.column}
FLAGS = sorted(COLUMNS, key=COLUMNS.__getitem__)
TABLES: dict[str, Callable[[Sequence[Run]], Rows]] = {
    "table": table_rows,
    "runs": run_rows,
    "evaluations": evaluation_rows,
    "log": log_rows,
    "stopping": stopping_rows,
}
WRITERS = {"csv": as_csv, "parquet": as_parquet}
