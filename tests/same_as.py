"""python tests/same_as.py BEFORE AFTER: show whether two source trees write the same bytes; exit code 1 where not.

Each tree builds, poisons, pre-trains for ten steps, cleans by every method, evaluates, detects, labels, sweeps and
reports, in a folder of the same path. What depends on the clock is set to fixed values before the reports are written.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

TIMED = {
    "seconds": 1.0,
    "train_seconds": 1.0,
    "evaluate_seconds": 1.0,
    "pairs_per_s": 100.0,
    "data_wait": 0.1,
    "of_limit": 0.5,
    "date": "2026-01-01 00:00:00",
    "commit": "none",
    "expires": 0.0,
    "time": 0.0,
    "at": 0.0,
    "began": 0.0,
    "ended": 0.0,
    "pid": 0,
    "beat": 0,
}
OBJECTIVES = ("mmcl", "ssl", "mmcl_ssl", "siglip", "siglip_ssl", "cyclip")
ROBUST = {"roclip": "mmcl", "safeclip": "mmcl_ssl", "progressive": "mmcl_ssl"}
METHODS = {
    "finetune": "",
    "cleanclip": "",
    "par": "",
    "shrink_perturb": "",
    "deep_cluster": "--clusters 5",
    "unlearn": "--flagged 4",
    "supervised": "--data val.beton",
}
STUDY = """
name = "tiny"
about = "A study of few steps."
seeds = [0, 1]

[[pretrain]]
objective = ["mmcl", "mmcl_ssl"]
epochs = 1
model = "tiny-rn"
data = "train.beton"
plan = "train.poison.json"
eval_data = "val.beton"
templates = "demo"

[[clean]]
method = "cleanclip"
lr = [1e-4, 1e-3]
epochs = 1
force = true

[[clean]]
method = "par"
tau = [0.0, 2.15]
epochs = 1
force = true
"""
MACHINE = "--batch-size 20 --device cpu --decode pil --workers 1 --log-every 1"
TRAIN = (
    "pretrain --data train.beton --plan train.poison.json --epochs 1 --model tiny-rn --eval-data val.beton "
    f"--templates demo {MACHINE}"
)
SHORT = "--epochs 3 --warm-epochs 1 --roclip-pool 32 --remove-epochs 1"
LINES = (
    "build --source train.csv --out train.beton --workers 1",
    "build --source val.csv --out val.beton --class-key class --text-views 0 --workers 1",
    "poison --data train.beton --patch-size 6 --rate 0.1 --templates demo",
    "preview --data train.beton --plan train.poison.json --model tiny-rn --decode pil --out preview.png",
    *(f"{TRAIN} --objective {name} --out runs/{name}" for name in OBJECTIVES),
    *(f"{TRAIN} --robust {name} --objective {loss} --out runs/{name} {SHORT}" for name, loss in ROBUST.items()),
    *(
        f"clean --run runs/mmcl_ssl --method {name} --out runs/clean-{name} --epochs 2 --force {own} {MACHINE}"
        for name, own in METHODS.items()
    ),
    "evaluate --run runs/mmcl --device cpu --asr-seed 0 1",
    "detect --run runs/mmcl --drop 0.05 --out kept.rows --device cpu --k 4",
    "label --run runs/mmcl --data train.beton --classes cifar10 --out labels.npy --device cpu",
    "sweep --study tiny.toml --out studies/tiny --device cpu",
)
REPORTS = ("report --runs runs --out report", "report --runs studies/tiny --out studies/again")


def fastbd(line: str) -> None:
    from fastbd import cli

    if code := cli.main(line.split()):
        sys.exit(f"{line}: exit code {code}")


def work(folder: Path) -> None:
    """Run all verbs of the tree that is on the path, in the folder."""
    from fastbd.data.demo import write_demo_set

    os.chdir(folder)
    list(write_demo_set(folder, 240, 60, seed=1))
    (folder / "tiny.toml").write_text(STUDY)
    for line in LINES:
        fastbd(line)
    shutil.rmtree(folder / "studies/tiny/claims")  # which tell of processes
    for path in (*folder.rglob("*.json"), *folder.rglob("*.jsonl")):
        untimed(path)
    for line in REPORTS:
        fastbd(line)


def untimed(path: Path) -> None:
    """Set what depends on the clock in a .json or .jsonl file."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(fixed(json.loads(line))) + "\n" for line in text.splitlines()))
    else:
        path.write_text(json.dumps(fixed(json.loads(text)), indent=2) + "\n")


def fixed(value):
    """The value with the fixed ones of TIMED in it."""
    if isinstance(value, dict):
        return {key: TIMED[key] if key in TIMED and item is not None else fixed(item) for key, item in value.items()}
    return [fixed(item) for item in value] if isinstance(value, list) else value


def differences(before: Path, after: Path) -> list[str]:
    """What differs between two folders, a line each."""
    found = []
    for name in sorted(names(before) | names(after)):
        one, other = before / name, after / name
        if not (one.exists() and other.exists()):
            found.append(f"{name} is only in {'the second' if other.exists() else 'the first'}")
        elif one.suffix == ".pt":
            found += [f"{name}: {where}" for where in unlike(load(one), load(other))]
        elif one.read_bytes() != other.read_bytes():
            found.append(name)
    return found


def names(folder: Path) -> set[str]:
    """The files in a folder, but for locks, and for a sweep's report, which tells times."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path) for path in paths if path.parent != Path("studies/tiny")}


def load(path: Path):
    import torch

    return torch.load(path, weights_only=True)


def unlike(one, other, where: str = "") -> list[str]:
    """The places where two checkpoints differ."""
    import torch

    if where.endswith("/seconds"):
        return []
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {**one, **other}
        return [x for key in keys for x in unlike(one.get(key), other.get(key), f"{where}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [x for k, pair in enumerate(zip(one, other, strict=True)) for x in unlike(*pair, f"{where}/{k}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    return [] if one == other else [where]


def main(before: str, after: str) -> int:
    with TemporaryDirectory() as temporary:
        for name, tree in (("before", before), ("after", after)):
            folder = Path(temporary) / "work"
            folder.mkdir()
            environment = os.environ | {"PYTHONPATH": os.path.abspath(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
            subprocess.run([sys.executable, __file__, "--work", folder], env=environment, check=True)
            shutil.move(folder, Path(temporary) / name)
        found = differences(Path(temporary) / "before", Path(temporary) / "after")
    print("\n".join(found) or "the same bytes")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[2])) if sys.argv[1] == "--work" else main(*sys.argv[1:]))
