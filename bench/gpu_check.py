"""python -m bench.gpu_check OUT: test the kernels and run the quick benches on a machine with a GPU and no network.

Nothing is installed: a copy of the tree is laid out as the package is, and this interpreter runs it. Logs, rows and
a summary go to OUT. Exit code 0; 1 when a stage failed; 2 without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "numpy", "rich", "pytest", "tyro", "pillow", "ftfy", "instant-clip-tokenizer",
            "nvidia-dali-cuda130", "ffcv", "torchvision", "open-clip-torch")  # fmt: skip
# name, arguments of the interpreter, seconds; 9 minutes together with the rest. Correctness comes before timings, and
# of these the step's first.
STAGES = (
    ("tests", ("-m", "pytest", "tests/kernels", "tests/data/test_gpu.py", "tests/test_step_gpu.py",
               "-pno:cacheprovider", "--durations=5"), 145),
    ("step", ("-m", "bench", "step", "--quick", "--seconds", "80", "--out", "{out}"), 140),
    ("eval", ("-m", "bench", "eval", "--quick", "--seconds", "90", "--out", "{out}"), 140),
    ("pixels", ("-m", "bench", "data", "augment", "--quick", "--seconds", "60", "--out", "{out}"), 95),
    ("bench", ("-m", "bench", "loss", "text", "--quick", "--seconds", "35", "--out", "{out}"), 65),
)  # fmt: skip


def main(out: Path) -> int:
    """Run the stages one after the other, a failed one too, and sum up."""
    if why := no_gpu():
        print(f"error: gpu-check needs a GPU: {why}; nothing was run.", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    lines = circumstances()
    failed = False
    with TemporaryDirectory(prefix="fastbd-") as folder:
        lay_out(Path(folder))
        for name, words, limit in STAGES:
            began = time.monotonic()
            code = run(name, [word.format(out=out.resolve()) for word in words], limit, Path(folder), out)
            failed |= code != 0
            verdict = {0: "passed", None: f"stopped after {limit} s"}.get(code, f"FAILED with exit code {code}")
            lines.append(f"{name}: {verdict}, {time.monotonic() - began:.0f} s, {out / name}.log")
    summary = "\n".join(lines) + "\n"
    (out / "summary.txt").write_text(summary)
    print("\n" + summary, end="")
    return int(failed)


def no_gpu() -> str:
    """Why torch cannot use a GPU here; "" when it can."""
    if not importlib.util.find_spec("torch"):
        return f"{sys.executable} has no torch"
    import torch

    return "" if torch.cuda.is_available() else "torch sees none on this machine"


def circumstances() -> list[str]:
    """GPU, interpreter, and the packages that are there or absent."""
    import torch

    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    there = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    absent = ", ".join(name for name, number in found.items() if not number)
    return [f"{torch.cuda.get_device_name()}, Python {sys.version.split()[0]}, {there}", f"absent: {absent or 'none'}"]


def lay_out(site: Path) -> None:
    """Copy the tree so that `import fastbd.kernels` works without an installation."""
    ignore = shutil.ignore_patterns("__pycache__", "results")
    for name in ("fastbd", "bench", "tests"):
        shutil.copytree(ROOT / name, site / name, ignore=ignore)
    shutil.copytree(ROOT / "kernels", site / "fastbd" / "kernels", ignore=ignore)
    (site / "kernels").symlink_to(site / "fastbd" / "kernels")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, site)


def run(name: str, words: list[str], limit: float, site: Path, out: Path) -> int | None:
    """Exit code of one stage, None when its time was over. Its output goes to OUT/NAME.log, the end to the screen."""
    print(f"{name}: at most {limit:.0f} s", flush=True)
    settings = {"TRITON_INTERPRET": "0", "PYTHONPATH": str(site), "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    if commit := os.environ.get("FASTBD_COMMIT") or described():
        settings["FASTBD_COMMIT"] = commit
    log = out / f"{name}.log"
    with open(log, "w") as file:
        stage = subprocess.Popen([sys.executable, *words], cwd=site, stdout=file, stderr=subprocess.STDOUT,
                                 env=os.environ | settings, start_new_session=True)  # fmt: skip
        try:
            code = stage.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(stage)
    for line in log.read_text(errors="replace").splitlines()[-60:]:
        print(f"  {line[:200]}", flush=True)
    return code


def stop(stage: subprocess.Popen) -> None:
    """End a stage and the processes that it started."""
    with suppress(ProcessLookupError):
        os.killpg(stage.pid, signal.SIGKILL)
    stage.wait()


def described() -> str | None:
    """The commit of the tree, where there is a history."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    git = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.gpu_check OUT")
    sys.exit(main(Path(sys.argv[1])))
