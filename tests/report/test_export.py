from __future__ import annotations

import csv
import io
import math
import sys

import pytest

from fastbd.base.errors import UserError
from fastbd.base.run_folder import find
from fastbd.report import export
from fastbd.report.tables import table


def read(data: bytes) -> list[dict]:
    return list(csv.DictReader(io.StringIO(data.decode())))


@pytest.fixture(scope="module")
def tables(large):
    return {name: read(data) for name, data in export.files(find([large]), "csv").items()}


def test_tables_hold_what_the_runs_do(tables, large):
    runs = find([large])
    evaluations = tables["evaluations.csv"]
    assert len(evaluations) == sum(len(run.rows) for run in runs) == 6 * 12 + 144 * 24
    found = [e for e in evaluations if e["run"] == "mmcl-s0-par-mmcl-lr0.001"]
    run = next(run for run in runs if run.name == "mmcl-s0-par-mmcl-lr0.001")
    assert [float(e["asr"]) for e in found] == [e["asr"] for e in run.rows]
    assert {(e["id"], e["lr"], e["seed"], e["torch"]) for e in found} == {(run.id, "0.001", "0", "2.13.0")}
    first = tables["table.csv"][0]
    best = table(runs)[0].best[0]
    assert float(first["top1_at_asr_5"]) == best.top1.mean and float(first["kept_at_asr_5_low"]) == best.kept.low
    assert first["points_at_asr_5"].split() == [f"{run.id}@{e['step']}" for run, e in best.points]
    cost = {row["run"]: row for row in tables["runs.csv"]}
    assert float(cost[run.name]["seconds"]) == 45 and float(cost[run.name]["rebound_max"]) > 0


def test_the_log_is_a_table_too(tables, large):
    runs = {run.name: run for run in find([large])}
    assert len(tables["log.csv"]) == sum(len(run.log) for run in runs.values())
    line = tables["log.csv"][-1]
    run = runs[line["run"]]
    assert float(line["loss"]) == run.log[-1]["loss"] and float(line["lr"]) == run.config["lr"]


def test_without_an_interval_its_ends_are_empty(fake_runs):
    rows = read(export.as_csv(export.table_rows(find([fake_runs]))))
    first = rows[0]  # of one seed: no interval of the accuracy kept
    assert float(first["kept_at_asr_5"]) > 0 and first["kept_at_asr_5_low"] == first["kept_at_asr_5_high"] == ""
    assert not {"inf", "-inf", "nan"} & {value for row in rows for value in row.values()}


def test_parquet_holds_the_same(large):
    parquet = pytest.importorskip("pyarrow.parquet")
    runs = find([large])
    for name, data in export.files(runs, "parquet").items():
        rows = parquet.read_table(io.BytesIO(data)).to_pylist()
        expected = read(export.as_csv(export.TABLES[name.removesuffix(".parquet")](runs)))
        assert [{k: "" if v is None else v for k, v in row.items()}.keys() for row in rows[:1]] == [expected[0].keys()]
        assert len(rows) == len(expected)
        for row, text in zip(rows, expected, strict=True):
            assert all(_same(row[key], text[key]) for key in row)


def _same(value, text: str) -> bool:
    if isinstance(value, float):
        return math.isclose(value, float(text))
    return ("" if value is None else str(value)) == text


def test_a_column_of_texts_and_numbers_is_one_of_texts():
    pytest.importorskip("pyarrow.parquet")
    assert export._alike(["last", 5, None]) == ["last", "5", None]
    assert export._alike([1, 2.5, None]) == [1.0, 2.5, None] and export._alike([None, 3]) == [None, 3]


def test_without_pyarrow_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="--tables parquet needs PyArrow: pip install"):
        export.check("parquet")
    export.check("csv")


@pytest.mark.parametrize(("classes", "kept"), [(6, {"top1", "top5"}), (5, {"top1"}), (None, {"top1", "top5", "top10"})])
def test_the_first_ten_of_six_classes_are_no_measure(classes, kept, write_run, evaluation, tmp_path):
    row = evaluation(0, 0, 0.5, 0.9) | ({"n_classes": classes} if classes else {})
    write_run(tmp_path / "a", {"objective": "mmcl", "pretrain_objective": "mmcl"}, [row], [])
    (line,) = export.evaluation_rows(find([tmp_path]))
    assert {key for key in line if key.startswith("top") and key[3:].isdecimal()} == kept
