"""Fake run folders, values by formula: an MMCL model that cleaning mends and an MMCL+SSL model that it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import exp, sqrt
from pathlib import Path

import pytest
from PIL import Image

IMAGES, TRIGGERED = 800, 760


def wilson(p: float, n: int) -> tuple[float, float]:
    """95 % interval of a share p of n (Wilson 1927)."""
    z = 1.96
    centre, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def evaluation(step: int, epoch: float, top1: float, asr: float | None = None) -> dict:
    """A line of metrics.jsonl."""
    line = {"step": step, "epoch": epoch, "seconds": 1.5, "set": "demo-val", "n": IMAGES}
    shares = {"top1": (top1, IMAGES)}
    line |= {"top5": min(1, 1.5 * top1), "top10": min(1, 1.7 * top1)}
    if asr is not None:
        line |= {"target": "banana", "trigger": "badnet", "n_asr": TRIGGERED, "asr_all": asr}
        shares |= {"asr": (asr, TRIGGERED), "recovery": (top1 * (1 - asr), TRIGGERED)}
    for key, (share, n) in shares.items():
        low, high = wilson(share, n)
        line |= {key: share, f"{key}_low": low, f"{key}_high": high}
    return line


def write_run(folder: Path, config: dict, metrics: list[dict], log: list[dict]) -> Path:
    """A run folder with a small contact sheet."""
    folder.mkdir(parents=True)
    recorded = {"verb": "pretrain", "name": folder.name, "fastbd": "0.1.0", "method": None, "start": None, "config": {}}
    (folder / "config.json").write_text(json.dumps(recorded | config))
    (folder / "env.json").write_text(json.dumps({"gpu": None, "torch": "2.13.0", "date": "2025-01-01"}))
    for name, lines in (("metrics", metrics), ("log", log)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.linear_gradient("L").resize((320, 96)).convert("RGB").save(folder / "samples.png")
    return folder


def losses(steps: int, epochs: float, parts: list[str], start: float) -> list[dict]:
    """Lines of log.jsonl: each part decays, with a ripple of 5 %."""
    rows = []
    for i in range(steps):
        values = {p: start * exp(-2 * i / steps) * (1 + 0.05 * (-1) ** (i * (k + 1))) for k, p in enumerate(parts)}
        rows.append({"step": i, "epoch": epochs * i / steps, "loss": sum(values.values()), **values, "scale": 14.3})
    return rows


@pytest.fixture(name="write_run")
def _write_run() -> Callable[..., Path]:
    return write_run


@pytest.fixture(name="evaluation")
def _evaluation() -> Callable[..., dict]:
    return evaluation


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "runs")


def write_study(root: Path, rates: tuple[float, ...] = (0.3, 1.0), epochs: int = 10) -> Path:
    """Two pre-trained models, each cleaned by two methods at each of `rates`; a larger rate forgets more."""
    for objective, top, weakness in (("mmcl", 0.62, 1.0), ("mmcl_ssl", 0.66, 0.25)):
        parts = ["mmcl", "ssl_image", "ssl_text"][: 1 if objective == "mmcl" else 3]
        grown = [1 - exp(-e / 12) for e in range(31)]
        metrics = [evaluation(40 * e, e, 0.1 + (top - 0.1) * g, min(0.997, g * 1.09)) for e, g in enumerate(grown)]
        common = {"objective": objective, "pretrain_objective": objective}
        start = write_run(root / objective, common, metrics, losses(300, 30, parts, 4.0 + 0.4 * len(parts)))
        for method, strength, damage in (("cleanclip", 3.0, 0.06), ("finetune", 0.15, 0.02)):
            used = ["mmcl", "ssl_image", "ssl_text"] if method == "cleanclip" else ["mmcl"]
            for rate in rates:
                metrics = []
                for e in range(epochs + 1):
                    kept = exp(-strength * weakness * rate * e / 3)
                    cost = damage * rate * (1 - exp(-2 * e)) / weakness - 0.02 * e / epochs
                    metrics.append(evaluation(20 * e, e, max(0.001, 0.92 * top - cost), 0.99 * kept + 0.004))
                config = {"verb": "clean", "method": method, "start": str(start), "config": {"lr": rate * 1e-4}}
                log = losses(100, epochs, used, 1.0 + 0.3 * rate + 0.2 * weakness)
                write_run(root / f"{objective}-{method}-{rate:g}", common | config, metrics, log)
    return root
