from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from fastbd.base.run_folder import find
from fastbd.config.cards import METHODS
from fastbd.report import interactive, write
from fastbd.report.looks import SPARE


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


def models(page: str, name: str) -> list[dict]:
    """The attributes of every model of a class on a page, by Bokeh's names."""
    found = []

    def look(value) -> None:
        if isinstance(value, dict):
            found.extend([value["attributes"]] if value.get("name") == name and "attributes" in value else [])
            value = list(value.values())
        for inner in value if isinstance(value, list) else ():
            look(inner)

    for text in Scripts(page).data:
        look(json.loads(text))
    return found


def test_the_legend_shows_the_marks_of_what_it_hides(fake_runs, write_run, evaluation):
    """Not the star of the start; and a model that no run cleans is there, too."""
    pytest.importorskip("bokeh")
    config = {"objective": "siglip", "pretrain_objective": "siglip"}
    write_run(fake_runs / "other", config, [evaluation(k, k, 0.1 * k, 0.2 * k) for k in (1, 2, 3)], [])
    page = interactive.page(find([fake_runs]), "a title").decode()
    assert [legend["click_policy"] for legend in models(page, "Legend")] == ["hide"]
    entries = {item["label"]["value"]: item.get("index") for item in models(page, "LegendItem")}
    assert len(entries) == 5 and entries.pop("SigLIP: not cleaned") is None
    assert set(entries.values()) == {1}  # the first point of each is that of its start
    (alone,) = [source for source in columns(page) if source.get("run") == ["other"]]
    assert alone["mark"] == ["star"] and alone["top1"] + alone["asr"] == pytest.approx([30, 60])


def test_what_the_lines_mean_is_told_and_fits_a_phone(fake_runs):
    pytest.importorskip("bokeh")
    for run in find([fake_runs]):
        rows = [json.dumps(e | {"n_classes": 20}) for e in run.rows]
        (run.path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    page = interactive.page(find([fake_runs]), "a title").decode()
    told = [title["text"].split("\n") for title in models(page, "Title")]
    assert ["Dotted: ASR 5% (chance) and 10%"] in told and ["Dashed: chance 5%"] in told
    assert len(models(page, "Span")) == 2 + 1 + 2 + 1 and max(len(line) for lines in told for line in lines) < 50
    assert 'name="viewport" content="width=device-width' in page


def test_every_mark_has_one_of_its_own():
    used = [card.marker for card in METHODS.values() if card.marker] + list(SPARE)
    assert len({interactive.MARKERS[mark] for mark in used}) == len(set(used))


def test_without_bokeh_the_report_goes_without_and_says_so(fake_runs, tmp_path, monkeypatch, capsys):
    from fastbd.commands import report
    from fastbd.config.flags import ReportConfig

    monkeypatch.setattr(interactive, "installed", lambda: False)
    report.run(ReportConfig(runs=(fake_runs,), out=tmp_path / "report"))
    assert write.WITHOUT in capsys.readouterr().out.replace("\n", " ")
    assert write.WITHOUT in (tmp_path / "report/index.html").read_text()
    assert not (tmp_path / "report" / write.INTERACTIVE).exists()
