from __future__ import annotations

import csv

from fastbd.report import published


def test_table_has_the_papers_numbers():
    found = {
        (p["data"], p["pretraining"], p["clean_pairs"]): (kinds["start"]["top1"], kinds["best_asr_5"]["top1"])
        for p, kinds in published.table()
        if p["cleaning"] == "cleanclip" and p["poison_left"] == "0"
    }
    assert found == {  # arXiv 2311.14948, table 1
        ("CC3M", "mmcl", "100000"): ("16.0", "16.49"),
        ("CC3M", "mmcl_ssl", "100000"): ("17.04", "14.16"),
        ("CC6M", "mmcl", "100000"): ("23.76", "24.04"),
        ("CC6M", "mmcl_ssl", "100000"): ("23.86", "13.05"),
        ("CC6M", "mmcl_ssl", "200000"): ("23.86", "2.62"),
    }


def test_every_point_is_possible_and_has_a_source():
    for point in published.points():
        assert point["source"] and all(0 <= float(point[key]) <= 100 for key in ("top1", "asr") if point[key])
    for _, kinds in published.table():
        tops = [float(p["top1"]) for n in (5, 10, 20, 50) if (p := kinds.get(f"best_asr_{n}")) and p["top1"]]
        assert tops == sorted(tops) and all(top <= float(kinds["highest_top1"]["top1"]) for top in tops[1:])
    assert len(published.measured()) > 30


def test_the_package_ships_it():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "published.csv" in project["tool"]["setuptools"]["package-data"]["fastbd.report"]
    with Path(published.__file__).with_name("published.csv").open() as file:
        assert len({tuple(row) for row in csv.reader(file)}) == len(published.points()) + 1
