from __future__ import annotations

from cleanings import start

from fastbd import cli
from fastbd.data.beton import Beton


def test_evaluation_and_cleaning_refuse_damaged_data_before_they_begin(study, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(study)
    start(study)
    raw = bytearray((study / "val.beton").read_bytes())
    raw[int(Beton(study / "val.beton")._metadata["caption"]["ptr"][7])] ^= 1
    path = tmp_path / "val.beton"
    path.write_bytes(raw)
    sets = ["--eval-data", str(path), "--device", "cpu", "--verify"]
    before = (study / "runs/start/metrics.jsonl").read_bytes()
    for verb in (["evaluate"], ["clean", "--force", "--epochs", "0", "--out", str(tmp_path / "cleaned")]):
        capsys.readouterr()
        assert cli.main([*verb, "--run", "runs/start", *sets]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"1 of 60 rows of {path} are damaged, the first is row 7 of" in said
    assert (study / "runs/start/metrics.jsonl").read_bytes() == before and not (tmp_path / "cleaned").exists()
