"""Images that were damaged after the build, through the real command line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from damage import damaged

from fastbd.data.beton import Beton

TRAIN = (
    "pretrain",
    "--data",
    "broken.beton",
    "--model",
    "tiny-rn",
    "--batch-size",
    24,
    "--epochs",
    1,
    "--device",
    "cpu",
    "--resident",
    "none",
    "--log-every",
    1,
)
HAS_DALI = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
BACKENDS = ["pil", *(pytest.param(name, marks=needs_dali) for name in ("dali", "dali-cpu"))]


def broken(study: Path, folder: Path, damages: dict[int, str]) -> None:
    """broken.beton: the study's pairs, with these damages of rows."""
    beton, data = Beton(study / "train.beton"), bytearray((study / "train.beton").read_bytes())
    for row, damage in damages.items():
        jpeg = beton.jpeg(row).tobytes()
        new = damaged(jpeg)[damage][0].ljust(len(jpeg), b"\0")
        start = bytes(data).index(jpeg)
        data[start : start + len(jpeg)] = new
    (folder / "broken.beton").write_bytes(data)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_goes_on_with_as_many_damaged_images_as_it_may_and_ends_at_one_more(fastbd, study, tmp_path, backend):
    rows = {3: "zeros: second half", 50: "no such Huffman code", 51: "cut: at the scan", 239: "zeros: second half"}
    broken(study, tmp_path, rows)
    run = (*TRAIN, "--decode", backend)
    said = fastbd(*run, "--max-bad", 0.02, "--out", "run", cwd=tmp_path).stdout  # 4 of 240
    names = {3: 4, 50: 52, 51: 52, 239: 0}  # and who stands in
    for row, other in names.items():
        assert f"image {row} of broken.beton cannot be decoded (damaged image" in said, said
        assert f"the image of row {other} stands in" in said
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(log) == 10 and log[-1]["bad_images"] == len(rows)
    env, by = json.loads((tmp_path / "run/env.json").read_text()), "pil" if backend == "pil" else "dali on a CPU"
    assert (env["decode"], env["resident"]) == (by, "none")
    assert f"images are decoded in each epoch by {by}: " in said

    del rows[50]  # of which DALI itself would speak on stderr
    broken(study, tmp_path, rows)
    ended = fastbd(*run, "--max-bad", 0.01, "--out", "other", cwd=tmp_path, code=2)  # 2 of 240
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("error: image ") and "and --max-bad allows 2 such images: the file was damaged" in line
    assert not (tmp_path / "other/result.json").exists()
