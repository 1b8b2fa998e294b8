from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from fastbd.commands import report
from fastbd.config import ReportConfig
from fastbd.errors import UserError
from fastbd.study.html import COLUMNS, answers, cells, page, percent
from fastbd.study.pareto import outcomes
from fastbd.study.runs import find

FIGURES = {"scatter": b"first", "trajectories": b"second", "curves": b"third"}
VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Collects tags, attributes and text; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.images, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.images += [value for name, value in attrs if name == "src"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def clean_run(write_run, folder, *metrics):
    config = {"verb": "clean", "method": "cleanclip", "objective": "mmcl", "pretrain_objective": "mmcl"}
    return write_run(folder, config | {"start": "/models/base"}, list(metrics), [])


def answer(path) -> str:
    (result,) = answers(outcomes(find([path])))
    return result[1]


def test_page_is_well_formed_and_needs_nothing_else(study):
    checked = Checker(page(find([study]), FIGURES))
    assert not {"script", "link", "iframe"} & set(checked.tags)
    pictures = [base64.b64decode(src.removeprefix("data:image/png;base64,")) for src in checked.images]
    assert pictures[:3] == list(FIGURES.values())
    assert len(pictures) == 3 + 6  # a contact sheet for each objective and method
    assert pictures[3] == (study / "mmcl" / "samples.png").read_bytes()
    assert checked.tags.count("details") == 10 and checked.tags.count("tr") == 1 + 4
    assert "http" not in page(find([study]), FIGURES)


def test_text_of_the_runs_is_escaped(write_run, evaluation, tmp_path):
    config = {"objective": "<b>x", "pretrain_objective": "<b>x", "name": "<script>&", "config": {"notes": "</pre><i>"}}
    write_run(tmp_path / "a<u>", config, [evaluation(0, 0, 0.5, 0.9) | {"target": "<q>", "set": "<em>"}], [])
    checked = Checker(page(find([tmp_path]), FIGURES))
    assert not {"b", "script", "i", "u", "q", "em"} & set(checked.tags)
    assert all(text in "".join(checked.text) for text in ("<b>x", "<script>&", "</pre><i>", "a<u>", "<q>", "<em>"))


def test_answer_names_cost_and_failure(study):
    first, second = answers(outcomes(find([study])))
    assert first[0] == "MMCL (mmcl)" and second[0] == "MMCL+SSL (mmcl_ssl)"
    # by the formula: 0.5704 before; after ten epochs at rate 1 0.5704 - 0.06 + 0.02 = 0.5304, 7.0 % less
    assert "CleanCLIP brought ASR down to 0.4% at the cost of 7.0% of the accuracy (top-1 53.0%)." in first[1]
    assert re.search(r"CleanCLIP failed to reach ASR ≤ 5%: its lowest is 8\.5%, at top-1 38\.7%\.", second[1])


def test_answer_says_when_nothing_was_lost_or_learned(write_run, evaluation, tmp_path):
    good = clean_run(write_run, tmp_path / "good", evaluation(0, 0, 0.5, 0.99), evaluation(9, 1, 0.51, 0.05))
    assert "down to 5.0% at no cost in accuracy (top-1 51.0%)" in answer(good)
    weak = clean_run(write_run, tmp_path / "weak", evaluation(0, 0, 0.5, 0.49), evaluation(9, 1, 0.5, 0.0))
    assert answer(weak).startswith("The attack never landed") and "49.0%" in answer(weak)
    blind = clean_run(write_run, tmp_path / "blind", evaluation(0, 0, 0.5), evaluation(9, 1, 0.5))
    assert answer(blind).startswith("No ASR was measured")
    begun = clean_run(write_run, tmp_path / "begun", evaluation(0, 0, 0.5, 0.9))
    assert answer(begun).endswith("CleanCLIP has no evaluation yet.")


def test_pretrained_only(study):
    assert "not cleaned in these runs" in answer(study / "mmcl")


def test_cells(study):
    row = dict(zip(COLUMNS, cells(outcomes(find([study]))[0]), strict=True))
    assert row["Model"] == "MMCL (mmcl)" and row["Cleaning"] == "CleanCLIP (runs: 2)"
    assert row["ASR before"] == "99.4% (98.6–99.8)"  # Wilson's interval of 0.994 of 760
    assert row["Top-1 after"].startswith("53.0% (49.6–56.5")


def test_percent():
    assert percent(None) == "–" and percent(0.16494) == "16.5%"
    assert percent(0.5, {"asr_low": 0.4, "asr_high": 0.61}, "asr") == "50.0% (40.0–61.0)"


def test_report_writes_page_and_figures(study, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    assert report.run(ReportConfig(runs=(study,), out=out)) == 0
    written = {path.name for path in out.parent.iterdir()}
    assert written == {"curves.png", "page.html", "scatter.png", "trajectories.png"}
    inlined = base64.b64encode((out.parent / "scatter.png").read_bytes()).decode()
    assert inlined in out.read_text()
    printed = capsys.readouterr().out
    assert str(out) in printed and "99.4 → 0.4" in printed


def test_report_of_no_runs_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        report.run(ReportConfig(runs=(tmp_path,), out=tmp_path / "page.html"))
    with pytest.raises(UserError, match="is a folder"):
        report.run(ReportConfig(runs=(tmp_path,), out=tmp_path))
    assert not list(tmp_path.iterdir())
