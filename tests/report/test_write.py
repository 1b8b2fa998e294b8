from __future__ import annotations

import base64
import csv
import os
import signal
import subprocess
import sys
import time

import pytest

from fastbd.base.errors import UserError
from fastbd.base.run_folder import find
from fastbd.commands import report
from fastbd.config.flags import ReportConfig
from fastbd.report.compare import sides
from fastbd.report.tables import table


def rows(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def written(large, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "new" / "page.html"
    assert report.run(ReportConfig(runs=(large,), out=out)) == 0
    return out


def test_report_writes_page_figures_and_tables(written):
    figures = ("scatter", "methods", "trajectories", "curves")
    tables = ("table", "runs", "evaluations", "stopping")
    expected = {f"{name}.{kind}" for name in figures for kind in ("png", "svg")} | {f"{name}.csv" for name in tables}
    assert {path.name for path in written.parent.iterdir()} == expected | {"page.html"}
    inlined = base64.b64encode((written.parent / "scatter.png").read_bytes()).decode()
    assert inlined in written.read_text()


def test_tables_hold_what_the_runs_do(written, large):
    runs = find([large])
    evaluations = rows(written.parent / "evaluations.csv")
    assert len(evaluations) == sum(len(run.rows) for run in runs) == 6 * 12 + 144 * 24
    found = [e for e in evaluations if e["run"] == "mmcl-s0-par-mmcl-lr0.001"]
    run = next(run for run in runs if run.name == "mmcl-s0-par-mmcl-lr0.001")
    assert [float(e["asr"]) for e in found] == [e["asr"] for e in run.rows]
    assert {(e["id"], e["lr"], e["seed"], e["torch"]) for e in found} == {(run.id, "0.001", "0", "2.13.0")}
    first = rows(written.parent / "table.csv")[0]
    best = table(runs)[0].best[0]
    assert float(first["top1_at_asr_5"]) == best.top1.mean and float(first["kept_at_asr_5_low"]) == best.kept.low
    assert first["points_at_asr_5"].split() == [f"{run.id}@{e['step']}" for run, e in best.points]
    cost = {row["run"]: row for row in rows(written.parent / "runs.csv")}
    assert float(cost[run.name]["seconds"]) == 45 and float(cost[run.name]["rebound_max"]) > 0


def test_terminal_has_the_answer_and_the_table(fake_runs, tmp_path, capsys):
    report.run(ReportConfig(runs=(fake_runs,), out=tmp_path / "page.html"))
    said = capsys.readouterr().out
    assert "with one seed nothing can be said about other seeds" in said and "53.0" in said
    assert f"wrote {tmp_path / 'page.html'}" in said


def test_report_of_no_runs_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        report.run(ReportConfig(runs=(tmp_path,), out=tmp_path / "page.html"))
    with pytest.raises(UserError, match="is a folder"):
        report.run(ReportConfig(runs=(tmp_path,), out=tmp_path))
    with pytest.raises(UserError, match="--watch follows one study"):
        report.run(ReportConfig(compare=(tmp_path, tmp_path), watch=True, out=tmp_path / "page.html"))
    assert not list(tmp_path.iterdir())


def test_two_studies_side_by_side(fake_runs, large, tmp_path):
    out = tmp_path / "page.html"
    report.run(ReportConfig(compare=(fake_runs / "..", large), out=out))
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"compare.png", "compare.svg", "page.html"}
    compared = sides(("one", "other"), find([fake_runs]), find([large]))
    pairs = {(a or b).group.method: (a, b) for a, b in compared.pairs if (a or b).group.objective == "mmcl"}
    assert [method for method, (a, _) in pairs.items() if a] == ["CleanCLIP", "Finetuning (MMCL)"]
    a, b = pairs["CleanCLIP"]
    assert f"{100 * (b.best[0].top1.mean - a.best[0].top1.mean):+.1f} points" in out.read_text()


@pytest.mark.process
def test_watch_waits_draws_again_and_ends_with_ctrl_c(fake_runs, write_run, evaluation, tmp_path):
    empty, out = tmp_path / "later", tmp_path / "page.html"
    code = "from fastbd.commands import report; report.SECONDS = 0.1; from fastbd.cli import main; import sys; "
    code += f"sys.exit(main(['report', '--watch', '--runs', {str(empty)!r}, '--out', {str(out)!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(1)
    config = {"verb": "clean", "method": "par", "objective": "mmcl", "pretrain_objective": "mmcl", "start": "/base"}
    for name in ("first", "second"):
        assert process.poll() is None
        write_run(empty / name, config, [evaluation(0, 0, 0.5, 0.9), evaluation(10, 1, 0.4, 0.01)], [])
        until = time.time() + 60
        while time.time() < until and not (out.exists() and name in out.read_text()):
            time.sleep(0.05)
        assert name in out.read_text() and 'http-equiv="refresh"' in out.read_text()
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 0, process.stderr.read()
