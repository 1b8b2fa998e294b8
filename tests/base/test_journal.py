from __future__ import annotations

import pytest

from fastbd.base.journal import Journal


def test_entries_are_found_again(tmp_path):
    path = tmp_path / "j"
    first = Journal(path, "job")
    assert not first.entries and not first.stale and not path.exists()
    first.append({"done": 1})
    first.append({"done": 2, "name": "\ud83d\n"})
    again = Journal(path, "job")
    assert again.entries == first.entries == [{"done": 1}, {"done": 2, "name": "\ud83d\n"}]
    again.append({"done": 3})
    assert Journal(path, "job").entries[-1] == {"done": 3}


def test_another_jobs_entries_are_not_taken(tmp_path):
    Journal(tmp_path / "j", "one").append({"done": 1})
    other = Journal(tmp_path / "j", "two")
    assert other.stale and other.entries == []
    other.append({"done": 9})
    assert Journal(tmp_path / "j", "one").stale and Journal(tmp_path / "j", "two").entries == [{"done": 9}]
    other.clear()
    assert not list(tmp_path.iterdir()) and not Journal(tmp_path / "j", "one").stale


@pytest.mark.parametrize("keep", range(48))
@pytest.mark.parametrize("tail", [b"", b"\0" * 20, b"7"])
def test_torn_lines_are_dropped(tmp_path, keep, tail):
    path = tmp_path / "j"
    journal = Journal(path, "job")
    for done in range(3):
        journal.append({"done": done})
    whole = path.read_bytes()
    path.write_bytes(whole[:keep] + tail)
    torn = Journal(path, "job")
    lines = whole[:keep].count(b"\n")
    assert torn.entries == [{"done": done} for done in range(max(lines - 1, 0))] and not torn.stale
    torn.append({"done": 7})
    assert Journal(path, "job").entries == torn.entries
