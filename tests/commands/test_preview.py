from __future__ import annotations

import shutil

from PIL import Image

from fastbd import cli


def test_preview_draws_clean_and_poisoned_pairs(fastbd, study, tmp_path):
    out = tmp_path / "sheets" / "preview.png"
    done = fastbd(
        "preview",
        "--data",
        study / "train.beton",
        "--plan",
        study / "train.poison.json",
        "--views",
        "slip",
        "--count",
        3,
        "--epoch",
        2,
        "--out",
        out,
        cwd=study,
    )
    assert f"wrote {out}: random_crop | simclr | simclr" in " ".join(done.stdout.split())
    sheet = Image.open(out)
    width = 3 * (2 * 64 + 4) + 234  # three views of 64 px, enlarged, and the captions
    assert sheet.size == (2 * width + 4, 2 * (30 + 2 * 132) + 4)  # two groups of two lines
    again = tmp_path / "again.png"
    fastbd("preview", "--data", study / "train.beton", "--views", "slip", "--count", 3, "--out", again, cwd=study)
    assert Image.open(again).size == (2 * width + 4, 30 + 2 * 132 + 4)  # without a plan nothing is poisoned


def test_preview_refuses_a_folder(fastbd, study):
    done = fastbd("preview", "--data", study / "train.beton", "--out", study, cwd=study, code=2)
    assert f"--out {study} is a folder" in done.stderr


def test_preview_draws_over_no_other_file(study, tmp_path, capsys):
    data = shutil.copyfile(study / "train.beton", tmp_path / "train.beton")
    assert cli.main(["preview", "--data", str(data), "--out", str(data)]) == 2
    said = f"error: --out {data} exists and is no PNG: give another name, such as preview.png.\n"
    assert capsys.readouterr().err == said and data.read_bytes() == (study / "train.beton").read_bytes()
