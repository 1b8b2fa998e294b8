from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from fastbd.base.run_folder import find
from fastbd.report import interactive, write


class Scripts(HTMLParser):
    """The contents of the JSON scripts of a page, and every address that it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.kind, self.data, self.loaded = None, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.kind = found.get("type") if tag == "script" else None
        self.loaded += [found[name] for name in ("src", "href") if name in found]

    def handle_endtag(self, tag):
        self.kind = None

    def handle_data(self, data):
        self.data += [data] if self.kind == "application/json" else []


def columns(page: str) -> list[dict]:
    """Every data source of a page."""
    found = []

    def look(value) -> None:
        if isinstance(value, dict):
            if value.get("name") == "ColumnDataSource":
                entries = value["attributes"]["data"]["entries"]
                found.append({key: column for key, column in entries})
            for inner in value.values():
                look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    for text in Scripts(page).data:
        look(json.loads(text))
    return found


def test_every_evaluation_can_be_pointed_at_without_the_network(fake_runs):
    pytest.importorskip("bokeh")
    runs = find([fake_runs])
    page = interactive.page(runs, "a title").decode()
    scripts = Scripts(page)
    assert not scripts.loaded and re.search("<title>a title</title>", page)
    sources = [source for source in columns(page) if "run" in source]
    told = {name for source in sources for name in source["run"]}
    assert told == {run.name for run in runs if run.verb == "clean"}
    shown = {(run, at) for source in sources for run, at in zip(source["run"], source["at"], strict=True)}
    assert len(shown) == sum(len(run.attacks) for run in runs if run.verb == "clean")
    assert {lr for source in sources for lr in source["lr"]} == {"3e-5", "1e-4"}


def test_without_bokeh_the_report_goes_without_and_says_so(fake_runs, tmp_path, monkeypatch, capsys):
    from fastbd.commands import report
    from fastbd.config.flags import ReportConfig

    monkeypatch.setattr(interactive, "installed", lambda: False)
    report.run(ReportConfig(runs=(fake_runs,), out=tmp_path / "report"))
    assert write.WITHOUT in capsys.readouterr().out.replace("\n", " ")
    assert write.WITHOUT in (tmp_path / "report/index.html").read_text()
    assert not (tmp_path / "report" / write.INTERACTIVE).exists()
