from __future__ import annotations

import json
import re

import pytest

from fastbd.base.errors import UserError
from fastbd.base.run_folder import find
from fastbd.report.head import QUESTION, head


def test_the_study_gives_the_title_and_the_question(write_run, evaluation, tmp_path):
    study = tmp_path / "studies" / "mine"
    for number, about in ((1, "Old?"), (10, "Does it <work>?"), (2, "Older?")):
        (study / f"study.{number}").mkdir(parents=True)
        (study / f"study.{number}/study.json").write_text(json.dumps({"study": {"name": "mine", "about": about}}))
    config = {"objective": "mmcl", "pretrain_objective": "mmcl"}
    env = {"fastbd": "0.1.0", "commit": "abc1234", "date": "2026-03-01 23:50:00", "cpu_cores": 2, "torch": "2.13.0"}
    ended = {"seconds": 1800.0, "devices": 1}
    folder = write_run(study / "runs" / "a", config, [evaluation(0, 0, 0.5, 0.9)], [], ended)
    (folder / "env.json").write_text(json.dumps(env))
    clean = config | {"verb": "clean", "method": "par", "start": str(folder)}
    write_run(study / "runs" / "b", clean, [], [])
    found = head(find([study]))
    assert (found["title"], found["question"]) == ("mine: backdoor cleaning report", "Does it <work>?")
    facts = dict(found["facts"])
    assert facts["Runs"] == "1 pre-training, 1 cleaning (1 of 2 ended)"
    assert "2026-03-02 00:20" in facts["Made"] and "commit abc1234" in facts["By"]
    assert facts["On"].startswith("CPU, 2 cores, torch 2.13.0")


def test_runs_of_no_study_have_a_plain_head(fake_runs):
    found = head(find([fake_runs]))
    assert (found["title"], found["question"]) == ("Backdoor cleaning report", QUESTION)
    assert dict(found["facts"])["Runs"] == "2 pre-trainings, 8 cleanings"


@pytest.mark.parametrize(
    "text", ["{", "NaN", "[]", '{"study": 3}', '{"study": {"name": 7}}', '{"study": {"about": []}}']
)
def test_a_damaged_study_is_named(text, write_run, evaluation, tmp_path):
    path = tmp_path / "study.1" / "study.json"
    path.parent.mkdir()
    path.write_text(text)
    config = {"objective": "mmcl", "pretrain_objective": "mmcl"}
    write_run(tmp_path / "runs" / "a", config, [evaluation(0, 0, 0.5, 0.9)], [])
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} is damaged.*: put a copy of it back\.$"):
        head(find([tmp_path]))


@pytest.mark.parametrize(
    ("env", "devices", "told"),
    [
        ({"cpu_cores": 2, "threads": 1}, 1, "CPU, 1 of 2 cores, torch"),
        ({"cpu_cores": 8, "threads": 2}, 3, "CPU, 6 of 8 cores, torch"),
        ({"cpu_cores": 2, "threads": 2}, 1, "CPU, 2 cores, torch"),
        ({"cpu_cores": 2}, 1, "CPU, 2 cores, torch"),
        ({}, 1, "CPU, torch"),
    ],
)
def test_the_cores_that_were_used_are_told(env, devices, told, write_run, evaluation, tmp_path):
    config = {"objective": "mmcl", "pretrain_objective": "mmcl"}
    folder = write_run(tmp_path / "a", config, [evaluation(0, 0, 0.5, 0.9)], [], {"seconds": 1.0, "devices": devices})
    (folder / "env.json").write_text(json.dumps({"torch": "2.13.0", **env}))
    assert dict(head(find([tmp_path]))["facts"])["On"].startswith(told)
