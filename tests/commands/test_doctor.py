from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from containers import without_checksums

from fastbd import cli
from fastbd.commands import doctor
from fastbd.config.flags import DoctorConfig
from fastbd.data.beton import Beton
from fastbd.data.rows import read_rows
from fastbd.kernels import augment_native
from fastbd.models.precision import has_bf16


def test_says_what_is_here(capsys):
    assert doctor.run(DoctorConfig()) == 0
    printed = capsys.readouterr().out
    assert version("torch") in printed and f"of {os.cpu_count()}" in printed
    assert all(part in printed for part in (*doctor.MACHINE, *doctor.PATHS))


def test_nothing_is_broken():
    found = doctor.findings(doctor.MACHINE | doctor.PATHS)
    assert all(what and meaning for what, meaning in found.values())
    assert found["tokenizer"][0] == version("tokenizers")
    on_cpu = "fp32 or bf16" if has_bf16() else "fp32"
    assert found["precision"][0] == ("bf16" if torch.cuda.is_available() else on_cpu)
    assert found["losses"][0] == ("Triton on cuda" if torch.cuda.is_available() else "PyTorch on cpu")
    memory = float(found["memory"][0].removesuffix(" GiB free"))
    kept = int(found["memory"][1].split()[5].replace(",", ""))
    assert abs(kept * 224 * 224 * 3 * 4 / 2**30 - memory) < 0.06


def test_says_what_makes_views(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if ways := augment_native.ways():
        assert doctor.PATHS["augment"]()[0] == f"C++ ({ways[-1]}) on cpu"
    monkeypatch.setattr(augment_native, "library", lambda: None)
    monkeypatch.delenv("FASTBD_NATIVE", raising=False)
    found, why = doctor.PATHS["augment"]()
    assert found == "PyTorch on cpu" and "install again with a C++ compiler" in why
    monkeypatch.setenv("FASTBD_NATIVE", "0")
    assert "FASTBD_NATIVE=0 leaves out" in doctor.PATHS["augment"]()[1]


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


def test_data_is_verified_and_the_damage_named(study, tmp_path, capsys):
    path = tmp_path / "pairs.beton"
    raw = bytearray((study / "train.beton").read_bytes())
    path.write_bytes(raw)
    assert cli.main(["doctor", "--data", str(path), str(study / "val.beton")]) == 0
    printed = capsys.readouterr().out
    assert Beton(path).fingerprint in printed and "damaged       0" in printed and "60" in printed
    start = Beton(path)._jpeg_ptr.tolist()[17]
    raw[start + 30] ^= 1
    path.write_bytes(raw)
    kept = tmp_path / "whole.rows"
    assert cli.main(["doctor", "--data", str(path), "--out", str(kept)]) == 2
    told = capsys.readouterr()
    assert "damaged       1: rows 17 (row_id 17)" in told.out and f"wrote {kept}: 239 rows" in told.out
    assert told.err.count("\n") == 1 and f"1 of 240 rows of {path} are damaged, the first is row 17 of" in told.err
    rows = read_rows(kept, Beton(path).fingerprint, 240)
    assert rows.tolist() == [*range(17), *range(18, 240)]
    train = ["pretrain", "--data", str(path), "--model", "tiny-rn", "--epochs", "0", "--device", "cpu", "--verify"]
    assert cli.main([*train, "--out", str(tmp_path / "run")]) == 2
    assert "1 of 240 rows of" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert cli.main([*train, "--rows-file", str(kept), "--out", str(tmp_path / "run")]) == 0


def test_data_without_checksums_is_told_apart(study, tmp_path, capsys):
    path = without_checksums(study / "train.beton", tmp_path / "old.beton")
    assert cli.main(["doctor", "--data", str(path)]) == 0
    assert "none: its content cannot be verified; build it again" in capsys.readouterr().out
    assert cli.main(["pretrain", "--data", str(path), "--verify", "--model", "tiny-rn", "--device", "cpu"]) == 2
    assert "old.beton holds no checksums to verify it by: build it again" in capsys.readouterr().err
