"""python -m bench.gpu_check CALL OUT: test and measure on a machine with a GPU and no network, in two calls.

Call 1 takes at most 300 seconds and looks at the training step and the kernels; call 2 takes at most 420 and looks at
everything else. Nothing is installed: this interpreter runs the tree where it lies, with the packages of PYTHONPATH.

All output is shown and written to OUT as it comes, so that a call which is cut off leaves what it had found: a log for
each stage, the rows of the benches, and summary.txt. A stage whose time is over writes the stacks of its processes to
its log and is ended; the next one follows. Exit code 0; 1 when a stage failed; 2 when something is missing.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
MISSING = 2  # exit code of a stage that names what the machine lacks
GRACE = 2.0  # seconds in which the processes of a stage may write their stacks when its time is over
WIDTH = 200  # characters of a line on the screen; the logs have all


@dataclass(frozen=True)
class Stage:
    """What the interpreter is given, {out} being the folder, and for how many seconds at most.

    Nothing follows a `needed` one that finds something MISSING.
    """

    name: str
    words: tuple[str, ...]
    limit: float
    needed: bool = False


MODULES = ("torch", "triton", "numpy", "rich", "PIL", "ftfy", "tokenizers")
MORE_MODULES = ("tyro", "nvidia.dali", "pytest", "xdist", "pytest_timeout")
# The names of all tests as they run, eight at a time, one by one to whichever process is free. One that hangs writes
# its stacks and is ended, and another one takes its place.
PYTEST = (
    "--override-ini=addopts=--import-mode=importlib",
    "-v",
    "--tb=short",
    "--durations=10",
    "-pno:cacheprovider",
    "-pbench.pytest_gpu",
    "-n8",
    "--maxschedchunk=1",
    "--override-ini=faulthandler_timeout=75",
    "--timeout=80",
    "--timeout-method=thread",
)
TESTED = (
    "tests/training/test_step_gpu.py",
    "tests/methods/test_losses.py",
    "tests/data/test_gpu.py",
    "tests/kernels",
    "tests/training/test_capture.py::test_a_gpu_is_as_before_after_a_capture_that_broke_off",
    "tests/training/test_checkpoint.py::test_a_snapshot_of_a_gpu_waits_for_nothing_and_takes_its_memory_again",
)
NOT_TESTED = ("tests/kernels/test_aot.py", "tests/kernels/test_contrastive_distributed.py")  # they use no GPU
SIZES = "loss B=256,loss B=512,loss B=1024,step rn50 B=256"
PEERS = ",".join(
    (
        # Of the loss: the borders between them.
        "fastbd tile",
        "fastbd small",
        "fastbd hybrid",
        # Of the step; ours are compiled anew, the slow ones as long as there is time.
        "CleanCLIP",
        "open_clip",
        "fastbd, compiled, captured",
        "open_clip, step compiled",
        "fastbd, compiled, captured, fused",
        "fastbd, compiled, captured, combo kernels",
    )
)


def bench(name: str, *words: str, limit: float) -> Stage:
    """A stage of `python -m bench`, which begins no case in the last fifth of its time."""
    seconds = f"{0.8 * limit:.0f}"
    return Stage(name, ("-m", "bench", *words, "--quick", "--seconds", seconds, "--out", "{out}"), limit)


# Correctness comes before timings, and what is known soonest first.
CALLS = {
    "1": (
        Stage("imports", ("-m", "bench.imports", "cuda", *MODULES), 30, needed=True),
        Stage("parity", ("-m", "bench.parity", "--seconds", "40"), 55),
        bench("step", "step", "--providers", "fastbd", "--kernels", "40", limit=145),
        bench("kernels", "text", "loss", limit=55),
    ),
    "2": (
        Stage("imports", ("-m", "bench.imports", "cuda", *MODULES, *MORE_MODULES), 30, needed=True),
        Stage("tests", ("-m", "pytest", *PYTEST, *TESTED, *(f"--ignore={path}" for path in NOT_TESTED)), 115),
        bench("eval", "eval", "--cases", "protocol", limit=75),
        bench("decode", "augment", "data", limit=90),
        bench("peers", "loss", "step", "--cases", SIZES, "--providers", PEERS, limit=90),
    ),
}


def main(words: Sequence[str]) -> int:
    if len(words) != 2 or words[0] not in CALLS:
        print(f"usage: python -m bench.gpu_check {'|'.join(CALLS)} OUT", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # the stage is ended then too
    return check(CALLS[words[0]], Path(words[1]))


def check(stages: Sequence[Stage], out: Path) -> int:
    """Run the stages one after the other, and sum up in OUT/summary.txt after each. Returns the exit code."""
    out = out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(out, ["begun"])
    except OSError as error:
        print(f"error: {out} cannot be written ({error.strerror}): give another OUT.", file=sys.stderr)
        return 2
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))  # a stage that is aborted writes its stacks, not its memory
    commit = os.environ.get("FASTBD_COMMIT") or described()
    failed, lines = False, [f"commit {commit or 'unknown'}"]
    with TemporaryDirectory(prefix="fastbd-", ignore_cleanup_errors=True) as caches:
        settings = environment(Path(caches), commit)
        for stage in stages:
            write(out, [*lines, f"{stage.name}: not ended, at most {stage.limit:g} s"])
            began = time.monotonic()
            code = run(stage, out, settings)
            lines.append(f"{stage.name}: {verdict(code, stage.limit)}, {time.monotonic() - began:.0f} s")
            write(out, lines)
            failed |= code != 0
            if stage.needed and code == MISSING:  # slow or killed, it may have shown nothing that is missing
                print(f"error: gpu-check stops here, as something is missing: see {stage.name}.log.", file=sys.stderr)
                return 2
    print("\n".join(["", *lines, f"logs and rows are in {out}"]), flush=True)
    return int(failed)


def write(out: Path, lines: Sequence[str]) -> None:
    (out / "summary.txt").write_text("\n".join(lines) + "\n")


def verdict(code: int | None, limit: float) -> str:
    if code is None:
        return f"STOPPED after {limit:g} s, its stacks are in its log"
    if code < 0:
        return f"DIED of {signal.Signals(-code).name}"
    return f"FAILED with exit code {code}" if code else "passed"


def environment(caches: Path, commit: str | None) -> dict[str, str]:
    """Environment of every stage: the tree before the caller's packages, and one folder of caches for all stages."""
    carried = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *carried]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # at SIGABRT a process writes the stacks of its threads, whatever it is doing
        "COLUMNS": "120",
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        **({"FASTBD_COMMIT": commit} if commit else {}),
    }


def run(stage: Stage, out: Path, settings: dict[str, str]) -> int | None:
    """Exit code of a stage, None when its time was over. It writes to its log, which the screen follows."""
    print(f"\n{stage.name}: at most {stage.limit:g} s", flush=True)
    log, end = out / f"{stage.name}.log", time.monotonic() + stage.limit
    command = [sys.executable, *(word.replace("{out}", str(out)) for word in stage.words)]
    with open(log, "w") as file, open(log, errors="replace") as written:
        # In a group of its own, so that all its processes can be ended.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=settings,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        line = ""
        try:
            while process.poll() is None and time.monotonic() < end:
                line = show(line + written.read())
                time.sleep(0.1)
            return process.poll()
        finally:
            show(line + written.read() + "\n")
            stop(process)


def show(text: str) -> str:
    """Print the whole lines of a text, without what is beyond WIDTH; returns the rest."""
    *lines, rest = text.split("\n")
    for line in lines:
        print(f"  {line[:WIDTH]}", flush=True)
    return rest


def stop(process: subprocess.Popen) -> None:
    """End a stage and the processes that it has started; when it still runs, all of them write their stacks first."""
    with suppress(ProcessLookupError):  # none is left
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGABRT)
            end = time.monotonic() + GRACE
            while time.monotonic() < end:
                time.sleep(0.05)
                process.poll()
                os.killpg(process.pid, 0)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def described() -> str | None:
    """The commit of the tree, where there is a history."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    git = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
