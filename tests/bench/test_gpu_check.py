"""gpu-check rehearsed on the CPU: the real driver, with stages of its own."""

from __future__ import annotations

import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import venv
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench import gpu_check, parity
from bench.gpu_check import CALLS, GRACE, Stage, check

pytestmark = pytest.mark.process
ROOT = Path(__file__).parents[2]
LIMITS = {"1": 300, "2": 420}  # seconds of a call


def python(code: str, limit: float = 60, name: str = "code", **about) -> Stage:
    return Stage(name, ("-c", code), limit, **about)


def read(path: Path) -> list[str]:
    return path.read_text().splitlines()


def is_running(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends(pid: int) -> bool:
    """Whether a process ends soon, as one that has been sent a signal does."""
    end = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_running(pid)


def wait_for(path: Path, pattern: str) -> re.Match:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if path.exists() and (found := re.search(pattern, path.read_text())):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{path} never had {pattern}")


# ---- what the calls are made of ----


@pytest.mark.parametrize("call", CALLS)
def test_a_call_keeps_to_its_time(call):
    assert sum(stage.limit + GRACE for stage in CALLS[call]) <= LIMITS[call] - 5  # the driver's own


@pytest.mark.parametrize("call", CALLS)
def test_a_call_leaves_few_files_with_plain_names(call):
    """A log for each stage, rows of the GPU and of the CPU, the summary; none in a folder of its own."""
    names = [stage.name for stage in CALLS[call]]
    assert len(set(names)) == len(names) and len(names) + 3 <= 8
    assert all(re.fullmatch("[A-Za-z0-9._-]+", name) for name in names)


@pytest.mark.parametrize("stage", [stage for call in CALLS.values() for stage in call], ids=lambda stage: stage.name)
def test_what_a_stage_runs_is_there(stage):
    dash, module, *words = stage.words
    assert dash == "-m"
    if module == "bench":
        options = bench.arguments(words)
        assert options.names and set(options.names) <= set(bench.BENCHES)
        assert options.quick and options.seconds < stage.limit and str(options.out) == "{out}"
        modules = [import_module(bench.BENCHES[name]) for name in options.names]
        cases = [case for module in modules for case, _ in module.cases("cuda", True)]
        assert all(any(part in case for case in cases) for part in options.cases)
    elif module == "bench.parity":
        assert words[0] == "--seconds" and float(words[1]) < stage.limit
    elif module == "pytest":
        paths = [word.removeprefix("--ignore=") for word in words if "tests/" in word]
        assert len(paths) > 3 and all((ROOT / path.partition("::")[0]).exists() for path in paths)
    else:
        assert module == "bench.imports" and stage.needed and words[0] == "cuda" and "torch" in words


def test_every_test_that_needs_a_gpu_is_run():
    (stage,) = (stage for stage in CALLS["2"] if stage.name == "tests")
    for path in ROOT.glob("tests/**/test_*.py"):
        if re.search(r"is_available\(\)\)?, reason=\"needs a GPU|DEVICE = \"cuda\" if", path.read_text()):
            name = str(path.relative_to(ROOT))
            assert any(name.startswith(word) or word.startswith(f"{name}::") for word in stage.words), name


# ---- the driver ----


def test_a_small_call_from_end_to_end(tmp_path, monkeypatch):
    """Stages of call 1 on the CPU; a bench that has time for nothing has not passed."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("FASTBD_COMMIT", "abc123")
    small = {
        "imports": ("-m", "bench.imports", "cpu", "numpy", "PIL"),
        "kernels": ("-m", "bench", "loss", "--quick", "--seconds", "0", "--out", "{out}"),
    }
    stages = [Stage(stage.name, small[stage.name], 300) for stage in CALLS["1"] if stage.name in small]
    assert check(stages, tmp_path / "out") == 1
    assert [line.split(", ")[0] for line in read(tmp_path / "out" / "summary.txt")] == [
        "commit abc123",
        "imports: passed",
        "kernels: FAILED with exit code 1",
    ]
    (found,) = read(tmp_path / "out" / "imports.log")
    assert f"numpy {version('numpy')}, PIL {version('pillow')}" in found
    assert "the 0 seconds of this run were over" in (tmp_path / "out" / "kernels.log").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["imports.log", "kernels.log", "summary.txt"]


ENVIRONMENT = """
import os, sys, fastbd.kernels as module, carried
print(module.__file__, carried.__file__, *(os.environ[name] for name in sys.argv[1:]))
"""


def test_a_stage_runs_the_tree_with_the_carried_packages_and_shared_caches(tmp_path, monkeypatch):
    carried = tmp_path / "site" / "carried.py"
    carried.parent.mkdir()
    carried.touch()
    (tmp_path / "site" / "fastbd").mkdir()  # another fastbd does not come before the tree's
    (tmp_path / "site" / "fastbd" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "site")
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_INTERPRET")
    stages = [Stage(name, ("-c", ENVIRONMENT, *names), 60) for name in ("first", "second")]
    assert check(stages, Path("out")) == 0
    (one,), (other,) = read(tmp_path / "out" / "first.log"), read(tmp_path / "out" / "second.log")
    module, found, triton, inductor, interpreted = one.split()
    assert one == other and Path(module).is_relative_to(ROOT)
    assert found == str(carried) and interpreted == "0"
    assert Path(triton).parent == Path(inductor).parent and not Path(triton).is_relative_to(tmp_path / "out")
    assert not Path(triton).parent.exists()


def test_one_stage_that_fails_leaves_the_others_their_turn(tmp_path, capfd):
    """Exit code, death by a signal with its stack, a hang in a child of its own with the stacks of both."""
    hang = "import subprocess, sys; print('now'); subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
    stages = [
        python("raise SystemExit(3)", name="code"),
        python("import ctypes\ndef fall(): ctypes.string_at(0)\nfall()", name="signal"),
        python(hang, 2.0, name="hang"),
        python("print('well')", name="last"),
    ]
    assert check(stages, tmp_path) == 1
    _, code, fault, hung, last = read(tmp_path / "summary.txt")
    assert code.startswith("code: FAILED with exit code 3, ") and fault.startswith("signal: DIED of SIGSEGV, ")
    assert hung.startswith("hang: STOPPED after 2 s") and last.startswith("last: passed, ")
    assert "in fall" in (tmp_path / "signal.log").read_text()
    stacks = (tmp_path / "hang.log").read_text()
    # Two processes write at once, by turns and some of it letter by letter.
    assert stacks.startswith("now\n") and stacks.count("Fatal Python error: ") == stacks.count("Aborted") == 2
    assert read(tmp_path / "last.log") == ["well"] and "  well\n" in capfd.readouterr().out


def test_a_process_that_a_stage_leaves_is_ended(tmp_path):
    leave = "import subprocess; print(subprocess.Popen(['sleep', '99']).pid)"
    assert check([python(leave)], tmp_path) == 0
    (pid,) = map(int, read(tmp_path / "code.log"))
    assert ends(pid)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_call_that_is_cut_off_leaves_what_it_knew(tmp_path, sent):
    """In its log, on the screen, in the summary; its stage is ended where there is time to."""
    talk = "import os, time; print('number 7', os.getpid()); time.sleep(99)"
    code = (
        "import signal, sys; from pathlib import Path; from bench import gpu_check\n"
        f"gpu_check.CALLS['1'] = (gpu_check.Stage('quick', ('-c', 'print(5)'), 20), "
        f"gpu_check.Stage('talk', ('-c', {talk!r}), 50))\n"
        f"sys.exit(gpu_check.main(('1', {str(tmp_path)!r})))"
    )
    with open(tmp_path / "screen", "w") as screen:
        driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=screen)
    pid = int(wait_for(tmp_path / "talk.log", r"number 7 (\d+)\n")[1])
    wait_for(tmp_path / "screen", "  number 7 ")
    driver.send_signal(sent)
    assert driver.wait(20) == (143 if sent == signal.SIGTERM else -9)
    if sent == signal.SIGKILL:
        assert is_running(pid)
        os.kill(pid, signal.SIGKILL)
    assert ends(pid)
    _, quick, talked = read(tmp_path / "summary.txt")
    assert quick.startswith("quick: passed, ") and talked == "talk: not ended, at most 50 s"


# ---- the box ----


def test_a_box_without_the_packages_is_told_at_once_what_is_missing(tmp_path):
    """A Python of its own that has nothing but what PYTHONPATH carries to it."""
    venv.create(tmp_path / "box", symlinks=True)
    carried = tmp_path / "site" / "ftfy.py"
    carried.parent.mkdir()
    carried.write_text("__version__ = '1.2.3'\n")
    command = [tmp_path / "box" / "bin" / "python", "-m", "bench.gpu_check", "1", tmp_path / "out"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(carried.parent)}
    )
    assert done.returncode == 2
    assert done.stderr == "error: gpu-check stops here, as something is missing: see imports.log.\n"
    said = read(tmp_path / "out" / "imports.log")
    assert re.fullmatch(r"Python 3\.\d+\.\d+, \d+ cores, ftfy 1.2.3", said[0])
    absent = [line.removeprefix("missing: ").split()[0] for line in said if line.startswith("missing: ")]
    assert absent == [name for name in gpu_check.MODULES if name != "ftfy"]
    assert "missing: torch (ModuleNotFoundError: No module named 'torch')" in said and "PYTHONPATH" in said[-1]
    assert [line.split(", ")[0] for line in read(tmp_path / "out" / "summary.txt")[1:]] == [
        "imports: FAILED with exit code 2"
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["imports.log", "summary.txt"]


def run_module(monkeypatch, name: str, *words: str) -> int:
    """Exit code of `python -m NAME`, run within this process as on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.delitem(sys.modules, name, raising=False)  # it is loaded anew
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    return ended.value.code


@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
def test_a_machine_without_a_gpu_is_told_so(monkeypatch, capsys):
    _, module, *words = CALLS["1"][0].words
    assert run_module(monkeypatch, module, *words) == gpu_check.MISSING
    found, missing, _ = capsys.readouterr().out.splitlines()
    assert f", torch {version('torch')}, triton {version('triton')}, " in found
    assert missing == "missing: a GPU (torch sees none on this machine)"


def test_parity_by_its_own_command(monkeypatch, capsys):
    """Of the last of its settings; all of them on a GPU."""
    count = len(parity.SETTINGS)
    words = ("--device", "cpu", "--modes", "eager", "--done", str(count - 1))
    assert run_module(monkeypatch, "bench.parity", *words) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith(f"eager {parity.SETTINGS[-1]}: right, ")
    assert said[1] == f"0 of {count} failed"


@pytest.mark.parametrize("words", [(), ("1",), ("3", "out"), ("1", "out", "more")], ids=" ".join)
def test_other_words_are_answered_with_the_usage(words, capsys):
    assert gpu_check.main(words) == 2
    assert capsys.readouterr().err == "usage: python -m bench.gpu_check 1|2 OUT\n"


# ---- its own tools ----


def test_a_failed_test_is_told_before_the_next_one_begins(tmp_path, capsys):
    (tmp_path / "test_two.py").write_text("def test_one():\n    assert 2 == 3\ndef test_other(): pass\n")
    words = ["-v", "-pbench.pytest_gpu", "-pno:cacheprovider", "-pno:faulthandler", "--import-mode=importlib"]
    assert pytest.main([*words, str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert -1 < said.find("assert 2 == 3") < said.find("test_two.py::test_other")


def test_what_is_wrong_or_fails_is_said_and_the_next_one_has_its_turn(capsys):
    """Batch norm over each part by itself is not that over the whole batch; and there is no such model."""
    right = parity.Setting("tiny-vit", 1, 2, 0, "fp32")
    settings = [replace(right, model="tiny-rn"), replace(right, model="no-such"), right]
    assert parity.main(["--device", "cpu", "--modes", "eager"], settings) == 1
    lines = capsys.readouterr().out.splitlines()
    about = "views=1 accumulate=2 bn-group=0 fp32"
    assert re.match(rf"eager tiny-rn {about}: WRONG, loss [\d.]+ to [\d.]+, off by ", lines[0])
    assert lines[1].startswith("Traceback") and "UserError: there is no model 'no-such'" in lines[-4]
    assert re.match(rf"eager no-such {about}: FAILED, UserError; [\d.]+ s$", lines[-3])
    assert re.match(r"eager tiny-vit .*: right, .*; [\d.]+ s$", lines[-2]) and lines[-1] == "2 of 3 failed"
    assert parity.main(["--device", "cpu", "--modes", "eager", "--done", "2", "--failed", "1"], settings) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 3 failed"
    nothing = ["--device", "cpu", "--modes", "eager", "--seconds", "-1"]
    assert parity.main(nothing, settings) == 1
    assert capsys.readouterr().out == "0 of 3 failed, for the last 3 there was no time\n"


def test_compiled_steps_are_compared(monkeypatch, capsys):
    """By a compiler that needs no other."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert parity.main(["--device", "cpu"], [parity.Setting("tiny-vit", 1, 1, 0, "fp32")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["eager", "compiled", "0"]


def test_the_distance_of_losses_by_hand():
    one, other = [{"loss": 2.0, "scale": 10.0}], [{"loss": 2.5, "scale": 10.0}]
    assert parity.difference(one, other) == pytest.approx(0.2)
    assert parity.difference(one, [{"loss": float("nan"), "scale": 10.0}]) == math.inf
