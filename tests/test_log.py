from __future__ import annotations

import json

import pytest

from fastbd import log


def test_rewinding_drops_later_steps_and_what_a_kill_has_torn(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"step": step, "loss": 0.1 * step} for step in (1, 2, 3, 2)]
    for row in rows:
        log.append(path, row)
    with path.open("a") as file:
        file.write('{"step": 1, "lo')
    log.rewind(path, 2)
    log.append(path, {"step": 3})
    kept = [rows[0], rows[1], rows[3], {"step": 3}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == kept
    log.rewind(tmp_path / "nowhere.jsonl", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_new_folder_is_there_when_all_is_in_it_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "run"
    with log.new_folder(path) as new:
        (new / "a").touch()
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), log.new_folder(tmp_path / "deep" / "other") as new:
        (new / "b").touch()
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="not empty"), log.new_folder(path):
        pass  # whoever came first keeps it
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["deep", "deep/run", "deep/run/a"]


def test_what_a_killed_process_left_of_a_folder_goes_and_no_other_does(tmp_path):
    others = ["run", "run.5", "run.5.0123abcd.tmp", "run2.0123abcd.tmp", "run.tmp"]
    for name in (*others, "run.0123abcd.tmp", "run.fedc4567.tmp"):
        (tmp_path / name / "deep").mkdir(parents=True)
    log.remove_unfinished(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
