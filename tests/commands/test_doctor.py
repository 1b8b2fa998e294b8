from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from fastbd.commands import doctor
from fastbd.config import DoctorConfig


def test_says_what_is_here(capsys):
    assert doctor.run(DoctorConfig()) == 0
    printed = capsys.readouterr().out
    assert version("torch") in printed and f"of {os.cpu_count()}" in printed
    assert all(part in printed for part in (*doctor.MACHINE, *doctor.PATHS))


def test_nothing_is_broken():
    found = doctor.findings(doctor.MACHINE | doctor.PATHS)
    assert all(what and meaning for what, meaning in found.values())
    assert found["tokenizer"][0] == version("instant-clip-tokenizer")
    assert found["precision"][0] == ("bf16" if torch.cuda.is_available() else "fp32")
    assert found["losses"][0] == ("Triton on cuda" if torch.cuda.is_available() else "PyTorch on cpu")
    memory = float(found["memory"][0].removesuffix(" GiB free"))
    kept = int(found["memory"][1].split()[5].replace(",", ""))
    assert abs(kept * 224 * 224 * 3 * 4 / 2**30 - memory) < 0.06


def test_a_probe_that_fails_is_a_finding():
    def broken():
        raise OSError("libsomething.so: cannot open")

    found = doctor.findings({"first": broken, "second": lambda: ("here", "works")})
    assert found == {"first": ("broken", "OSError: libsomething.so: cannot open"), "second": ("here", "works")}


def test_a_package_that_is_not_installed():
    assert doctor._package("nowhere", "no-such-package", "here", "install it")() == ("none", "install it")


def test_without_the_optional_libraries():
    """An import that fails must neither stop the command nor change its exit code."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(['nvidia', 'triton', 'nltk', 'ffcv']);"
        "from fastbd import cli; sys.exit(cli.main(['doctor']))"
    )
    root = Path(__file__).parents[2]
    env = os.environ | {"COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=env)
    assert done.returncode == 0, done.stderr
    assert "pil on cpu" in done.stdout and "second text views" in done.stdout
