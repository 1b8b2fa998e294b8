"""Fake run folders, values by formula: an MMCL model that cleaning mends and an MMCL+SSL model that it does not."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from math import exp, sqrt
from pathlib import Path

import pytest
from PIL import Image

IMAGES, TRIGGERED = 800, 760
PLAN = {
    "version": 2,
    "total": 4000,
    "attacks": [
        {
            "target": "banana",
            "geometry": "squash",
            "trigger": {"name": "badnet", "patch_size": 16, "location": "random", "blend": 0.0, "pattern": ""},
            "pairs": {str(row): "a banana" for row in range(320)},
        }
    ],
}


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


def write_run(folder: Path, config: dict, metrics: list[dict], log: list[dict], result: dict | None = None) -> Path:
    """A run folder with a small contact sheet."""
    folder.mkdir(parents=True)
    recorded = {
        "verb": "pretrain",
        "name": folder.name,
        "fastbd": "0.1.0",
        "method": None,
        "start": None,
        "config": {},
        "model": "demo",
        "data": "/data/pairs.beton",
    }
    (folder / "config.json").write_text(json.dumps(recorded | config))
    (folder / "env.json").write_text(json.dumps({"gpu": None, "torch": "2.13.0", "date": "2025-01-01"}))
    for name, lines in (("metrics", metrics), ("log", log)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    (folder / "plan.json").write_text(json.dumps(PLAN))
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
def fake_runs(tmp_path: Path) -> Path:
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
                config["objective"] = "mmcl_ssl" if method == "cleanclip" else "mmcl"
                log = losses(100, epochs, used, 1.0 + 0.3 * rate + 0.2 * weakness)
                write_run(root / f"{objective}-{method}-{rate:g}", common | config, metrics, log)
    return root


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> Path:
    return write_large(tmp_path_factory.mktemp("large") / "runs")


METHODS = {  # method, objective: (how fast ASR falls, how fast accuracy does), by pre-training objective
    ("cleanclip", "mmcl_ssl"): {"mmcl": (3.0, 0.02), "mmcl_ssl": (0.5, 0.12)},
    ("finetune", "mmcl"): {"mmcl": (0.1, 0.02), "mmcl_ssl": (0.05, 0.02)},
    ("finetune", "ssl"): {"mmcl": (0.9, 0.10), "mmcl_ssl": (0.4, 0.25)},
    ("par", "mmcl"): {"mmcl": (1.6, 0.08), "mmcl_ssl": (1.4, 0.09)},
}
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


def write_large(root: Path, seeds: tuple[int, ...] = (0, 1, 2), rates: tuple[float, ...] = RATES) -> Path:
    """A sweep with all that a sweep writes: two objectives, four methods, six rates, three seeds; with noise."""
    rng = random.Random(0)
    for objective, top in (("mmcl", 0.62), ("mmcl_ssl", 0.66)):
        for seed in seeds:
            base = top + rng.gauss(0, 0.008)
            common = {"pretrain_objective": objective}
            metrics = [evaluation(40 * e, e, base * (1 - exp(-e / 3)), 0.99 * (1 - exp(-e / 2))) for e in range(1, 13)]
            config = common | {"objective": objective, "id": f"{len(objective)}{seed}" * 6}
            config["config"] = {"seed": seed, "lr": 1e-3, "batch_size": 128 if objective == "mmcl" else 64}
            took = {"reason": "finished", "seconds": 300.0, "train_seconds": 270.0, "evaluate_seconds": 30.0}
            log = losses(40, 12, ["mmcl", "ssl_image", "ssl_text"][: 1 if objective == "mmcl" else 3], 5.0)
            start = write_run(root / f"{objective}-s{seed}", config, metrics, log, took)
            for (method, loss), speeds in METHODS.items():
                luck = exp(rng.gauss(0, 0.1))
                for rate in rates:
                    name = f"{start.name}-{method}-{loss}-lr{rate:g}"
                    rows = _cleaning(rng, metrics[-1], speeds[objective], luck * rate / 3e-4)
                    _write_cleaning(root / name, start, common, (method, loss), rate, seed, rows, took)
    return root


def _cleaning(rng: random.Random, start: dict, speeds: tuple[float, float], strength: float) -> list[dict]:
    """Evaluations along one cleaning, each full one followed by one on part of the images."""
    rows = []
    for third in range(13):
        fall, damage = speeds
        kept = exp(-fall * strength * third / 2)
        asr = max(
            0.002, start["asr"] * kept + 0.01 * rng.random() + 0.04 * (1 - kept) * rng.random() * (rng.random() < 0.2)
        )
        loss = damage * strength * (1 - exp(-third)) - 0.01 * (1 - exp(-strength * third))
        top1 = max(0.05, start["top1"] * exp(-loss) * (1 + 0.005 * rng.gauss(0, 1))) if third else start["top1"]
        row = evaluation(20 * third, third / 3, min(1.0, top1), asr if third else start["asr"])
        drift = 1 - exp(-strength * third / 20)
        watched = {"val_loss": 1.2 + loss - 0.05 * drift, "drift_image": drift, "drift_text": drift / 2}
        rows.append(row | watched | {"agreement": 0.7 + 0.2 * drift * exp(-loss)})
        if 0 < third < 12:
            part = evaluation(
                20 * third + 10, third / 3 + 1 / 6, top1 * (1 + 0.03 * rng.gauss(0, 1)), asr * rng.random()
            )
            rows.append(part | {"subset": True, "n": 100, "n_asr": 95})
    return rows


def _write_cleaning(
    folder: Path, start: Path, common: dict, how: tuple, rate: float, seed: int, rows: list, took: dict
):
    method, loss = how
    flags = {
        "lr": rate,
        "seed": seed,
        "rows": 2000,
        "batch_size": 64,
        "views": "par" if method == "par" else "cleanclip",
    }
    config = common | {"verb": "clean", "method": method, "objective": loss, "start": str(start), "config": flags}
    config["id"] = f"{zlib.crc32(folder.name.encode()):012x}"
    config["command"] = f"python -m fastbd clean --run runs/{start.name} --method {method} --lr {rate:g} --seed {seed}"
    log = losses(20, 4, ["mmcl", "ssl_image", "ssl_text"] if loss == "mmcl_ssl" else ["mmcl"], 2.0)
    log = [line | {"pairs_per_s": 250.0 + line["step"], "of_limit": 0.4} for line in log]
    result = took | {"seconds": 45.0, "train_seconds": 36.0, "evaluate_seconds": 9.0, "device": "CPU", "devices": 1}
    if rate == 1e-3 and method != "finetune":
        asr = [rows[-1]["asr"] * (1 + 0.5 * k) for k in range(3)]
        result["rebound"] = {
            "rebound_max": asr[-1],
            "rebound_change": asr[-1] - asr[0],
            "rebound_area": asr[1],
            "rebound": {"steps": [0, 50, 100], "asr": asr, "top1": [0.5] * 3},
        }
    write_run(folder, config, rows, log, result)
