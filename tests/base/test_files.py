from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastbd.base import files
from fastbd.base.errors import UserError
from fastbd.data.beton import BetonWriter
from fastbd.report.write import save
from fastbd.training import checkpoint


@pytest.fixture
def odd(tmp_path) -> Path:
    """A folder with what can stand where a folder is meant."""
    (tmp_path / "file").write_text("1")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("file/out", "Not a directory"),
        ("file/deep/out", "Not a directory"),
        ("dangling/out", "No such file or directory"),
        ("loop/out", "Too many levels of symbolic links"),
        ("x" * 300, "File name too long"),
        ("x" * 250, "File name too long"),  # with what is added while it is made
        ("/proc/fastbd/out", "No such file or directory"),
    ],
)
@pytest.mark.parametrize("name", [None, "page.html"])
def test_what_cannot_be_made_is_known_before(odd, path, why, name):
    before = sorted(odd.rglob("*"))
    with pytest.raises(UserError, match=rf"^--out .*{path} cannot be written in .* \({why}\): choose another --out\.$"):
        files.check_out(odd / path, name=name)
    assert sorted(odd.rglob("*")) == before


def test_a_file_is_on_the_disk_before_it_takes_its_name_and_the_name_before_all_ends(tmp_path, monkeypatch):
    """Else a loss of power could leave an empty file under the name."""
    done, path = [], tmp_path / "file"
    monkeypatch.setattr(os, "fsync", lambda number: done.append(Path(os.readlink(f"/proc/self/fd/{number}")).name))
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("renamed"), rename(*names)))
    with files.replacing(path) as temporary:
        temporary.write_text("new")
    assert done == ["file.tmp", "renamed", tmp_path.name] and path.read_text() == "new"


def test_what_can_be_made_is_not_made_yet(odd, monkeypatch):
    monkeypatch.chdir(odd)
    for path in ("new", "new/deep/out", "folder/new", str(odd / "new")):
        files.check_out(Path(path))
        files.check_out(Path(path), name="page.html")
    files.check_out(Path("folder"))
    files.check_out(Path("file"), name="page.html")
    files.check_out(Path("dangling"), name="page.html")  # the link is replaced
    assert sorted(p.name for p in odd.rglob("*")) == ["dangling", "file", "folder", "loop"]


def test_a_folder_is_not_a_file_nor_the_reverse(odd):
    with pytest.raises(UserError, match=r"folder is a folder; name the file in it, such as .*folder/page\.html"):
        files.check_out(odd / "folder", name="page.html")
    for path in ("file", "dangling", "loop"):
        with pytest.raises(UserError, match=f"--run .*{path} is not a folder: copy it"):
            files.check_out(odd / path, "--run", instead="copy it")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]
    with files.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a"]


def beton(path: Path) -> None:
    with BetonWriter(path, 1, 0, False) as writer:
        writer.add(jpeg=b"", width=1, height=1, tokens=np.zeros(77), text_views=None, caption="", row_id=0)


WRITERS = {
    "text": lambda path: files.write_text(path, "text"),
    "json": lambda path: files.write_json(path, {}),
    "report": lambda path: save({path.name: b""}, path.parent),
    "beton": beton,
}


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("writer", WRITERS)
def test_the_first_error_is_the_one_that_is_told(writer, code, tmp_path, monkeypatch):
    """Where a file cannot be given its name, and nothing can be removed either."""

    def refuse(number: int, what: str):
        def call(path, *more, **named):
            raise OSError(number, what, str(path))

        return call

    monkeypatch.setattr(os, "replace", refuse(code, "first"))
    monkeypatch.setattr(os, "unlink", refuse(errno.EBUSY, "second"))
    with pytest.raises(OSError, match="first"):
        WRITERS[writer](tmp_path / "out")


def test_the_first_error_of_a_checkpoint_is_the_one_that_is_told(tmp_path):
    with pytest.raises(UserError, match=r"ckpt_last\.pt could not be written \(No such file"):
        checkpoint.save(tmp_path / "gone" / "ckpt_last.pt", {"fastbd": "1"})


def test_on_a_file_system_that_is_read_only(tmp_path, read_only):
    """A real one, where unlink says so even of what is not there."""
    code = (
        "import sys; from pathlib import Path\n"
        "from fastbd.base import files; from fastbd.base.errors import UserError\n"
        "try: files.write_text(Path(sys.argv[1]) / 'a', '')\n"
        "except OSError as error: print(error.filename, error.strerror)\n"
        "try: files.check_out(Path(sys.argv[1]) / 'deep' / 'a')\n"
        "except UserError as error: print(error)\n"
    )
    done = read_only(tmp_path, sys.executable, "-c", code, tmp_path)
    assert done.stdout.splitlines() == [
        f"{tmp_path}/a.tmp Read-only file system",
        f"--out {tmp_path}/deep/a cannot be written in {tmp_path} (Read-only file system): choose another --out.",
    ], done.stderr


def test_several_that_replace_one_file_take_turns(tmp_path):
    """Each finds what it has written itself until the file has its name."""

    def replace(k: int) -> None:
        for _ in range(50):
            with files.replacing(tmp_path / "a") as temporary:
                temporary.write_text(str(k))
                time.sleep(0.001)
                assert temporary.read_text() == str(k)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(replace, range(4)))
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() in "0123"


def test_a_lock_keeps_others_out_until_it_is_let_go(tmp_path):
    held = files.lock(tmp_path)
    assert files.lock(tmp_path) is None and files.holder(tmp_path).startswith(f"process {os.getpid()} on ")
    held.close()
    again = files.lock(tmp_path)
    assert again and os.listdir(tmp_path) == [files.LOCK]
    again.close()


def test_a_lock_dies_with_its_process_and_not_with_what_that_has_started(tmp_path):
    code = (
        "import subprocess, sys, time; from pathlib import Path; from fastbd.base import files\n"
        "held = files.lock(Path(sys.argv[1]))\n"
        "child = subprocess.Popen(['sleep', '60'], close_fds=False)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as owner:
        child = int(owner.stdout.readline())
        try:
            assert files.lock(tmp_path) is None and files.holder(tmp_path).startswith(f"process {owner.pid} ")
            owner.kill()
            owner.wait()
            assert files.lock(tmp_path)
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_nobody_is_kept_out(code, tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert files.lock(tmp_path) and files.lock(tmp_path)
