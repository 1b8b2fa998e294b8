from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastbd.base import files
from fastbd.base.errors import UserError


def test_rewinding_drops_later_steps_and_what_a_kill_has_torn(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"step": step, "loss": 0.1 * step} for step in (1, 2, 3, 2)]
    for row in rows:
        files.append(path, row)
    with path.open("a") as file:
        file.write('{"step": 1, "lo')
    files.rewind(path, 2)
    files.append(path, {"step": 3})
    kept = [rows[0], rows[1], rows[3], {"step": 3}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == kept
    files.rewind(tmp_path / "nowhere.jsonl", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_new_folder_is_there_when_all_is_in_it_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "run"
    with files.new_folder(path) as new:
        (new / "a").touch()
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), files.new_folder(tmp_path / "deep" / "other") as new:
        (new / "b").touch()
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="not empty"), files.new_folder(path):
        pass  # whoever came first keeps it
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["deep", "deep/run", "deep/run/a"]


def test_what_a_killed_process_left_of_a_folder_goes_and_no_other_does(tmp_path):
    others = ["run.5", "run.5.unfinished-0123abcd.tmp", "run2.unfinished-0123abcd.tmp", "run.0123abcd.tmp"]
    for name in (*others, "run.unfinished-0123abcd.tmp", "run.unfinished-fedc4567.tmp"):
        (tmp_path / name / "deep").mkdir(parents=True)
    files.remove_unfinished(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_a_folder_that_a_living_process_makes_stays(tmp_path):
    with files.new_folder(tmp_path / "run") as new:
        files.remove_unfinished(tmp_path / "run")
        assert new.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_folders_that_are_made_and_cleared_at_once_are_made(tmp_path):
    """Four threads: no folder may go between its making and its lock."""

    def make(k: int) -> None:
        for time in range(50):
            files.remove_unfinished(tmp_path / str(time))
            try:
                with files.new_folder(tmp_path / str(time)) as new:
                    (new / str(k)).touch()
            except OSError as error:
                assert error.errno == errno.ENOTEMPTY  # another was faster

    with ThreadPoolExecutor(4) as pool:
        for made in [pool.submit(make, k) for k in range(4)]:
            made.result()
    assert {path.name for path in tmp_path.iterdir()} == {str(time) for time in range(50)}


def test_a_row_that_comes_while_the_file_is_rewound_stays(tmp_path):
    path = tmp_path / "log.jsonl"
    for step in (1, 2):
        files.append(path, {"step": step})
    with files.locked(path):  # as rewind() holds it
        adding = threading.Thread(target=files.append, args=(path, {"step": 3}))
        adding.start()
        adding.join(0.2)
        assert adding.is_alive()
        files.write_text(path, '{"step": 1}\n')
    adding.join()
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_an_unfinished_last_line_is_mended_before_the_next(tmp_path):
    path = tmp_path / "log.jsonl"
    for before, after in (
        ('{"step": 1}\n{"step": 2', '{"step": 1}\n'),  # torn: it goes
        ('{"step": 1}\n{"step": 2}', '{"step": 1}\n{"step": 2}\n'),  # whole but for its newline
        ('{"st', ""),
        ("", ""),
    ):
        path.write_text(before)
        files.append(path, {"step": 3})
        assert path.read_text() == after + '{"step": 3}\n'


def test_a_full_disk_takes_no_part_of_a_line(tmp_path):
    """A process that may write 20 bytes to a file stands for the full disk."""
    path = tmp_path / "log.jsonl"
    code = (
        "import resource, sys; from pathlib import Path; from fastbd.base import files\n"
        "path = Path(sys.argv[1]); files.append(path, {'step': 1})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))\n"
        "try: files.append(path, {'step': 2, 'loss': 0.5})\n"
        "except OSError as error: print(error.errno, path.stat().st_size)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "files.append(path, {'step': 2, 'loss': 0.5})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout.split() == [str(errno.EFBIG), "12"] and done.stderr == ""
    assert path.read_text() == '{"step": 1}\n{"step": 2, "loss": 0.5}\n'


@pytest.mark.parametrize("line", ['{"step": 1, "lo', "[1]", "7", "[" * 100_000, "", '{"step": "1"}', '{"steq": 1}'])
def test_rewinding_refuses_a_damaged_line_before_the_last(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"line 2 of {path} "):
        files.rewind(path, 2)
    assert path.read_bytes() == before


def test_an_error_that_names_no_file_is_given_the_folders_name(tmp_path):
    with pytest.raises(OSError) as raised, files.new_folder(tmp_path / "run"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(tmp_path / "run") and not list(tmp_path.iterdir())
