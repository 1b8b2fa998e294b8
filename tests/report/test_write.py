from __future__ import annotations

import base64
import csv
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from pages import Page

from fastbd.base.errors import UserError
from fastbd.base.run_folder import find
from fastbd.commands import report
from fastbd.config.flags import ReportConfig
from fastbd.report import write
from fastbd.report.compare import sides

FIGURES = ("scatter", "methods", "trajectories", "curves")
TABLES = ("table", "runs", "evaluations", "log", "stopping")


def names(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(large, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "new" / "page"
    assert report.run(ReportConfig(runs=(large,), out=out)) == 0
    return out


def test_report_is_a_folder_of_a_page_figures_and_tables(written):
    expected = {f"figures/{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    expected |= {f"tables/{name}.csv" for name in TABLES} | {"index.html"}
    assert names(written) - {"figures/interactive.html"} == expected
    inlined = base64.b64encode((written / "figures/scatter.png").read_bytes()).decode()
    assert inlined in (written / "index.html").read_text()


def test_all_that_the_page_refers_to_is_in_the_folder(written):
    page = Page((written / "index.html").read_text())
    assert page.links and {link for link in page.links if not link.startswith("#")} <= names(written)
    assert all(source.startswith("data:image/png;base64,") for source in page.images)


def test_a_report_takes_the_place_of_a_report(fake_runs, tmp_path):
    out = tmp_path / "report"
    report.run(ReportConfig(runs=(fake_runs,), out=out))
    before = names(out)
    (out / "notes.txt").write_text("mine")
    report.run(ReportConfig(runs=(fake_runs / "mmcl",), out=out, tables="parquet"))
    gone = {"figures/methods.png", "figures/methods.svg", *(f"tables/{name}.csv" for name in TABLES)}
    assert gone <= before
    assert names(out) == (before - gone) | {f"tables/{name}.parquet" for name in TABLES} | {"notes.txt"}


def test_what_is_not_a_reports_stays_in_its_folders(fake_runs, tmp_path):
    kept = [tmp_path / "figures/mine.png", tmp_path / "tables/mine.csv"]
    for path in kept:
        path.parent.mkdir()
        path.touch()
    write.write(find([fake_runs]), tmp_path)
    assert all(path.exists() for path in kept)
    named = {file for drawn in write.DRAWN for file in (f"figures/{drawn}.png", f"figures/{drawn}.svg")}
    assert {str(path.relative_to(tmp_path)) for path in (tmp_path / "figures").iterdir()} <= {
        "figures/mine.png", write.INTERACTIVE, *named
    }  # fmt: skip


def test_files_of_an_older_report_are_named_and_stay(fake_runs, tmp_path, capsys):
    left = {"report.html": "<title>Backdoor cleaning report</title>", "scatter.png": "", "table.csv": ""}
    for name, text in left.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "mine.csv").touch()
    report.run(ReportConfig(runs=(fake_runs / "mmcl",), out=tmp_path / "report"))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"of an older report, not of this one, are in {tmp_path}: report.html, scatter.png, table.csv"
    assert all((tmp_path / name).read_text() == text for name, text in left.items())
    (tmp_path / "report.html").write_text("<title>My own page</title>")
    report.run(ReportConfig(runs=(fake_runs / "mmcl",), out=tmp_path / "report"))
    assert "older report" not in capsys.readouterr().out


def test_no_other_folder_is_written_to(fake_runs, tmp_path):
    (tmp_path / "index.html").write_text("<html>my page</html>")
    (tmp_path / "notes").write_text("mine")
    before = names(tmp_path)
    with pytest.raises(UserError, match="has other files than a report in it: choose another --out"):
        report.run(ReportConfig(runs=(fake_runs,), out=tmp_path))
    with pytest.raises(UserError, match="is a page, and a report is a folder: give one, as --out page"):
        report.run(ReportConfig(runs=(fake_runs,), out=tmp_path / "page.html"))
    with pytest.raises(UserError, match="is not a folder: choose another --out"):
        report.run(ReportConfig(runs=(fake_runs,), out=tmp_path / "notes"))
    assert names(tmp_path) == before


def test_a_report_that_was_cut_short_is_finished(fake_runs, tmp_path):
    out = tmp_path / "report"
    write.save({"figures/scatter.png": b"", "tables/table.csv": b""}, out)
    report.run(ReportConfig(runs=(fake_runs / "mmcl",), out=out))
    assert (out / "index.html").is_file() and (out / "figures/scatter.png").stat().st_size > 10_000


def test_terminal_has_the_answer_and_the_table(fake_runs, tmp_path, capsys):
    report.run(ReportConfig(runs=(fake_runs,), out=tmp_path / "report"))
    said = capsys.readouterr().out
    assert "with one pre-trained model on a side nothing can be said about others" in said and "53.0" in said
    assert f"wrote {tmp_path / 'report/index.html'}" in said


def test_terminal_tells_of_a_model_by_itself_as_the_page_does(fake_runs, tmp_path, capsys):
    report.run(ReportConfig(runs=(fake_runs / "mmcl",), out=tmp_path / "report"))
    said = "MMCL: backdoored (top-1 57.7%, ASR 99.7%), and not cleaned in these runs."
    assert said in capsys.readouterr().out and said in (tmp_path / "report/index.html").read_text()


def test_report_of_no_runs_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        report.run(ReportConfig(runs=(tmp_path,), out=tmp_path / "report"))
    with pytest.raises(UserError, match="--watch follows one study"):
        report.run(ReportConfig(compare=(tmp_path, tmp_path), watch=True, out=tmp_path / "report"))
    assert not list(tmp_path.iterdir())


def test_a_study_is_not_compared_with_itself(fake_runs, tmp_path):
    (tmp_path / "link").symlink_to(fake_runs)
    for same in (fake_runs, fake_runs / ".." / "runs", tmp_path / "link"):
        with pytest.raises(UserError, match="both are the same runs; give the folders of two studies"):
            report.run(ReportConfig(compare=(fake_runs, same), out=tmp_path / "report"))
    assert not (tmp_path / "report").exists()


def test_two_studies_side_by_side(fake_runs, large, tmp_path):
    out = tmp_path / "report"
    report.run(ReportConfig(compare=(fake_runs / "..", large), out=out))
    page = (out / "index.html").read_text()
    assert names(out) == {"figures/compare.png", "figures/compare.svg", "tables/compared.csv", "index.html"}
    whole = Page(page)
    assert "2 pre-trainings, 8 cleanings" in whole.text and "6 pre-trainings, 144 cleanings" in whole.text
    assert "tables/compared.csv" in whole.links
    compared = sides(("one", "other"), find([fake_runs]), find([large]))
    with (out / "tables/compared.csv").open() as file:
        first = [float(row["top1_at_asr_5"]) for row in csv.DictReader(file) if row["pair"] == "1"]
    assert first == [row.best[0].top1.mean for row in compared.pairs[0]]
    pairs = {(a or b).group.method: (a, b) for a, b in compared.pairs if (a or b).group.objective == "mmcl"}
    assert [method for method, (a, _) in pairs.items() if a] == ["CleanCLIP", "Finetuning (MMCL)"]
    a, b = pairs["CleanCLIP"]
    difference = 100 * (b.best[0].top1.mean - a.best[0].top1.mean)
    assert math.isfinite(difference) and f"{abs(difference):.1f} points" in page
    report.run(ReportConfig(compare=(fake_runs, large), out=out, tables="parquet"))
    assert names(out) >= {"tables/compared.parquet"} and not (out / "tables/compared.csv").exists()
    write.check(out)  # a report, too, which another may replace


@pytest.mark.process
def test_watch_waits_draws_again_and_ends_with_ctrl_c(fake_runs, write_run, evaluation, tmp_path):
    empty, out = tmp_path / "later", tmp_path / "report"
    code = "from fastbd.commands import report; report.SECONDS = 0.1; from fastbd.cli import main; import sys; "
    code += f"sys.exit(main(['report', '--watch', '--runs', {str(empty)!r}, '--out', {str(out)!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    page = out / "index.html"
    time.sleep(1)
    config = {"verb": "clean", "method": "par", "objective": "mmcl", "pretrain_objective": "mmcl", "start": "/base"}
    for name in ("first", "second"):
        assert process.poll() is None
        write_run(empty / name, config, [evaluation(0, 0, 0.5, 0.9), evaluation(10, 1, 0.4, 0.01)], [])
        until = time.time() + 60
        while time.time() < until and not (page.exists() and name in page.read_text()):
            time.sleep(0.05)
        assert name in page.read_text() and 'http-equiv="refresh"' in page.read_text()
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 0, process.stderr.read()
