"""fastbd demo: the whole study in small, through the same commands that a user types."""

from __future__ import annotations

import json
import time
from pathlib import Path

from fastbd import cli
from fastbd.base import files
from fastbd.base.console import console, progress
from fastbd.base.errors import UserError
from fastbd.commands import build, poison
from fastbd.config.flags import BuildConfig, DemoConfig, PoisonConfig
from fastbd.data.demo import TARGET, write_demo_set
from fastbd.training.folder import free_folder

FOLDER = Path("data/demo")
PAIRS, HELD_OUT, SEED = 4_000, 800, 0
OBJECTIVES = ("mmcl_ssl", "mmcl")


def demo_set() -> tuple[Path, Path, Path]:
    """(train.beton, val.beton, plan) of the demo set, made on first use."""
    made = train, val, plan = FOLDER / "train.beton", FOLDER / "val.beton", FOLDER / "train.poison.json"
    if not all(path.is_file() for path in made):  # else nothing is written, as the folder may be read-only
        files.check_out(
            FOLDER, "the demo set's folder", instead="start in a folder that can be written to, or give --data"
        )
        FOLDER.mkdir(parents=True, exist_ok=True)
        held = files.lock(FOLDER, wait=True)
        assert held is not None, "it was waited for"
        with held:
            _make(train, val, plan)
    return made


def _make(train: Path, val: Path, plan: Path) -> None:
    if not val.is_file() or not train.is_file():
        console.print(f"making the demo set in {FOLDER}: {PAIRS:,} pairs and {HELD_OUT} held-out images")
        with progress("drawing", PAIRS + HELD_OUT) as advance:
            for _ in write_demo_set(FOLDER, PAIRS, HELD_OUT, SEED):
                advance()
        build.run(BuildConfig(source=FOLDER / "train.csv", out=train, seed=SEED))
        build.run(BuildConfig(source=FOLDER / "val.csv", out=val, class_key="class", text_views=0, seed=SEED))
    if not plan.is_file():
        poison.run(PoisonConfig(data=train, target=TARGET, rate=0.08, templates="demo", seed=SEED))


def run(config: DemoConfig) -> int:
    """Pre-train with both objectives, clean both, write the report; the last line is the result as JSON."""
    began = time.perf_counter()
    out = config.out or free_folder(Path("runs/demo"))
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out.")
    files.check_out(out)
    console.print(
        f"The study in small: a backdoor for '{TARGET}' in {PAIRS:,} image-caption pairs, a tiny CLIP pre-trained\n"
        "with two objectives, both cleaned with CleanCLIP, a report. About 7 minutes on 2 CPU cores; everything goes\n"
        f"to {out}."
    )
    epochs, force = (["--epochs", str(config.epochs)], ["--force"]) if config.epochs else ([], [])
    cleaned = []
    for objective in OBJECTIVES:
        start = out / objective
        step("pretrain", "--objective", objective, "--out", start, *epochs)
        step("evaluate", "--run", start)
        cleaned.append(out / f"{objective}-cleanclip")
        step("clean", "--run", start, "--method", "cleanclip", "--out", cleaned[-1], *force)
        step("evaluate", "--run", cleaned[-1])
    step("report", "--runs", out, "--out", out / "report.html")
    result = {objective: outcome(run) for objective, run in zip(OBJECTIVES, cleaned, strict=True)}
    print(json.dumps({**result, "seconds": round(time.perf_counter() - began, 1)}))
    return 0


def step(*argv: str | Path) -> None:
    """Run one command line, shown as a user would type it."""
    words = [str(word) for word in argv]
    console.print(f"\n[bold cyan]$ python -m fastbd {' '.join(words)}[/]")
    code = cli.main(words)
    if code:
        raise SystemExit(code)


def outcome(cleaned: Path) -> dict[str, float]:
    """Accuracy and ASR before and after cleaning, from the first and last evaluation of a cleaning run."""
    rows = [json.loads(line) for line in (cleaned / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    return {"top1": first["top1"], "asr": first["asr"], "top1_cleaned": last["top1"], "asr_cleaned": last["asr"]}
