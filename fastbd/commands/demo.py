"""fastbd demo: the whole study in small, through the same commands that a user types."""

from __future__ import annotations

import json
import time
from pathlib import Path

from fastbd import cli
from fastbd.base import files
from fastbd.base.console import console
from fastbd.base.errors import UserError
from fastbd.commands import demo_data, poison
from fastbd.config.flags import DemoConfig, PoisonConfig
from fastbd.data.demo import TARGET
from fastbd.training.folder import free_folder

OBJECTIVES = ("mmcl_ssl", "mmcl")


def demo_set() -> tuple[Path, Path, Path]:
    """Return the paths of (train.beton, val.beton, plan) of the demo set, which is made on first use."""
    train, val = demo_data.demo_data()
    plan = demo_data.folder() / "train.poison.json"
    if not plan.is_file():
        with demo_data.making():
            poison.run(
                PoisonConfig(data=train, target=TARGET, rate=0.08, templates="demo", seed=demo_data.SEED, out=plan)
            )
    return train, val, plan


def run(config: DemoConfig) -> int:
    """Pre-train with both objectives, clean both, write the report; the last line is the result as JSON."""
    began = time.perf_counter()
    out = config.out or free_folder(Path("runs/demo"))
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out.")
    files.check_out(out)
    console.print(
        f"The study in small: a backdoor for '{TARGET}' in {demo_data.PAIRS:,} image-caption pairs, a tiny CLIP "
        "pre-trained\nwith two objectives, both cleaned with CleanCLIP, a report. About 7 minutes on 2 CPU cores; "
        f"everything goes\nto {out}.",
        markup=False,
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
    step("report", "--runs", out, "--out", out / "report")
    result = {objective: outcome(run) for objective, run in zip(OBJECTIVES, cleaned, strict=True)}
    print(json.dumps({**result, "seconds": round(time.perf_counter() - began, 1)}))
    return 0


def step(*argv: str | Path) -> None:
    """Run one command line, shown as a user would type it."""
    words = [str(word) for word in argv]
    console.print(f"\n$ python -m fastbd {' '.join(words)}", style="bold cyan", markup=False)
    code = cli.main(words)
    if code:
        raise SystemExit(code)


def outcome(cleaned: Path) -> dict[str, float]:
    """Accuracy and ASR before and after cleaning, from the first and last evaluation of a cleaning run."""
    rows = [json.loads(line) for line in (cleaned / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    return {"top1": first["top1"], "asr": first["asr"], "top1_cleaned": last["top1"], "asr_cleaned": last["asr"]}
