"""What a report is of: the study and its question, when, on what and by what its runs were made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fastbd.base.console import duration
from fastbd.base.errors import UserError
from fastbd.base.files import read_json
from fastbd.base.run_folder import Run, study_folder_of
from fastbd.report.tables import cores, device, seconds

TITLE = "Backdoor cleaning report"
QUESTION = "Can the backdoor be cleaned out of a CLIP model, and does that depend on its pre-training objective?"


def head(runs: Sequence[Run]) -> dict[str, Any]:
    """{study, title, question, facts}: of the study that the cleanings are part of; facts are (name, text)."""
    studies = _studies([run for run in runs if run.verb == "clean"] or runs)
    title = ", ".join(filter(None, (study.get("name") for study in studies)))
    question = " ".join(filter(None, (study.get("about") for study in studies)))
    facts = {"Runs": _count(runs), "Made": _when(runs), "On": _machines(runs), "By": _versions(runs)}
    return {
        "study": title,
        "title": f"{title}: {TITLE[0].lower()}{TITLE[1:]}" if title else TITLE,
        "question": question or QUESTION,
        "facts": [(name, text) for name, text in facts.items() if text],
    }


def _studies(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Name and question of each study, as its newest study.N/study.json has them."""
    folders = {folder: None for run in runs if (folder := study_folder_of(run.path))}
    return [_study(_newest(folder)) for folder in folders]


def _study(path: Path) -> dict[str, Any]:
    """The study of a study.json; UserError where there is none in it."""
    remedy = "put a copy of it back"
    version = read_json(path, remedy)
    study = version.get("study") if isinstance(version, dict) else None
    if not isinstance(study, dict) or not all(isinstance(study.get(key), str | None) for key in ("name", "about")):
        raise UserError(f"{path} is damaged (it holds no study): {remedy}.")
    return study


def _newest(folder: Path) -> Path:
    numbered = {path: path.parent.suffix[1:] for path in folder.glob("study.*/study.json")}
    return max(numbered, key=lambda path: int(numbered[path]) if numbered[path].isdecimal() else -1)


def _count(runs: Sequence[Run]) -> str:
    cleanings = sum(run.verb == "clean" for run in runs)
    counts = {"pre-training": len(runs) - cleanings, "cleaning": cleanings}
    ended = sum(bool(run.result) for run in runs)
    said = ", ".join(f"{n:,} {name}{'s' * (n != 1)}" for name, n in counts.items() if n)
    return said + (f" ({ended:,} of {len(runs):,} ended)" if 0 < ended < len(runs) else "")


def _when(runs: Sequence[Run]) -> str:
    """From the first start to the last end, and how long that is."""
    spans = []
    for run in runs:
        with suppress(ValueError, TypeError):
            began = datetime.fromisoformat(run.env["date"]) if "date" in run.env else None
            spans += [(began, began + timedelta(seconds=sum(seconds(run))))] if began else []
    if not spans:
        return ""
    first, last = min(began for began, _ in spans), max(ended for _, ended in spans)
    till = f"{last:%H:%M}" if first.date() == last.date() else f"{last:%Y-%m-%d %H:%M}"
    return f"{first:%Y-%m-%d %H:%M} to {till} ({duration((last - first).total_seconds())})"


def _machines(runs: Sequence[Run]) -> str:
    return "; ".join(sorted({_machine(run) for run in runs if run.env}))


def _machine(run: Run) -> str:
    """The devices of a run, and what they are in."""
    name, many, used = device(run), run.result.get("devices", 1), cores(run)
    of = f", {used}" if used else ""
    return (name + of if name == "CPU" else f"{many} x {name}") + f", torch {run.env.get('torch', '?')}"


def _versions(runs: Sequence[Run]) -> str:
    made: dict[str, set[str]] = {}
    for run in runs:
        made.setdefault(run.recorded.get("fastbd") or "?", set()).update(filter(None, [run.env.get("commit")]))
    return "; ".join(
        f"fastbd {version}" + (f", commit {', '.join(sorted(commits))}" if commits else "")
        for version, commits in sorted(made.items())
    )
