from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from forked import forked
from study import ledger_worker

from fastbd.base.errors import UserError
from fastbd.commands.sweep import open_ledger
from fastbd.config.flags import SweepConfig
from fastbd.study import ledger as ledgers
from fastbd.study import live
from fastbd.study.grid import Study
from fastbd.study.ledger import Ledger, seconds_left

pytestmark = pytest.mark.process
SMALL = Study(
    name="small",
    about="",
    attacks=({"trigger": "badnet"},),
    pretrain=({"objective": ("mmcl", "mmcl_ssl")},),
    clean=({"method": "cleanclip", "lr": (1e-4, 1e-3)},),
)


def take(folder: Path, lease: float, pipe: Connection) -> None:
    """Take a run of the ledger, say its name, and say so when it is lost."""
    claim = Ledger(folder, lease=lease).take()
    pipe.send(claim.run.name)
    while not claim.lost:
        time.sleep(0.01)
    pipe.send("lost")


def race(pipe: Connection) -> None:
    """Open each folder that is named, and take a run of it at the word."""
    while folder := pipe.recv():
        ledger = Ledger(folder, lease=60)
        pipe.send("ready")
        pipe.recv()
        pipe.send("won" if ledger.take() else "lost")


def piped(work: Callable[..., None], *arguments: object, cwd: Path) -> tuple[BaseProcess, Connection]:
    """Start work(*arguments, pipe) in a process of its own; with the other end of the pipe."""
    here, there = multiprocessing.Pipe()
    return forked(work, *arguments, there, cwd=cwd), here


def finish(claim, **result) -> None:
    """What a run leaves behind."""
    claim.run.product.parent.mkdir(parents=True, exist_ok=True)
    claim.run.product.write_text(json.dumps(result))
    claim.release()


def states(ledger: Ledger) -> dict[str, str]:
    return {row.run.name: row.status.state for row in ledger.table()}


def age(folder: Path, seconds: float) -> None:
    """Make the claims look as if nobody had touched them for so long."""
    for path in (folder / "claims").glob("*/claim.json"):
        os.utime(path, (time.time() - seconds,) * 2)


def test_runs_come_in_order_and_after_what_they_need(tmp_path):
    ledger, taken = Ledger(tmp_path, SMALL), []
    while claim := ledger.take():
        taken.append(claim.run.name)
        if claim.run.verb == "poison":
            assert ledger.take() is None and ledger.left()  # all others wait for the plan
        finish(claim)
    assert taken == [run.name for run in ledger.runs]
    assert not ledger.left() and set(states(ledger).values()) == {"finished"}


def test_two_ledgers_never_give_the_same_run_and_released_ones_go_on(tmp_path):
    here, there = Ledger(tmp_path, SMALL), Ledger(tmp_path)
    assert there.runs == here.runs and there.study == SMALL
    finish(here.take())
    first, second = here.take(), there.take()
    assert (first.run.name, second.run.name) == ("mmcl-s0", "mmcl_ssl-s0") and there.take() is None
    assert states(there)["mmcl-s0"] == "running" and there.table()[1].status.who.endswith(f":{os.getpid()}")
    first.release()
    again = there.take()
    assert again.run == first.run and again.held() and not first.held()


@pytest.mark.parametrize(
    ("changes", "absent", "named"),
    [
        ({"data": "train.beton"}, "train.beton", "train.beton"),
        ({"classes": "lists/few.txt"}, "lists/few.txt", "lists/few.txt"),
        ({"model": "mine.nets:build"}, "mine/nets.py", "mine.nets:build"),
        ("models/start", "models/start/config.json", "models/start"),
    ],
)
def test_what_a_study_names_is_looked_for_where_it_was_begun(changes, absent, named, tmp_path, monkeypatch):
    begun, elsewhere = tmp_path / "begun", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (begun / absent).parent.mkdir(parents=True)
    made = '{"verb": "pretrain", "config": {}}' if absent.endswith("json") else "def build(activation): ...\n"
    (begun / absent).write_text(made)
    monkeypatch.chdir(begun)
    monkeypatch.setattr(sys, "path", list(sys.path))
    if isinstance(changes, str):
        study = replace(SMALL, attacks=(), pretrain=(), pretrained=(Path(changes),))
    else:
        study = replace(SMALL, pretrain=({**changes, "eval_data": "x", "objective": "mmcl"},))
    ids = [run.id for run in Ledger(tmp_path / "study", study).runs]
    monkeypatch.chdir(elsewhere)
    with pytest.raises(UserError) as said:
        open_ledger(SweepConfig(out=tmp_path / "study"))
    begun_in = f"{tmp_path}/study holds a study that was begun in {begun}"
    assert str(said.value) == f"{begun_in} and names {named}, which is not in {elsewhere}: go on with it in {begun}."
    shutil.copytree(begun, elsewhere, dirs_exist_ok=True)  # as where all has moved
    sys.path[:] = [place for place in sys.path if place != str(begun)]
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]
    assert [run.id for run in Ledger(tmp_path / "study").runs] == ids


def test_a_failed_run_blocks_what_needs_it_until_it_is_tried_again(tmp_path):
    ledger = Ledger(tmp_path, SMALL)
    finish(ledger.take())
    ledger.take().fail("the loss is nan")
    finish(ledger.take())
    for _ in range(2):
        finish(ledger.take(), seconds=1)
    assert ledger.take() is None and not ledger.left()
    assert states(ledger) == {
        "badnet": "finished",
        "mmcl-s0": "failed",
        "mmcl_ssl-s0": "finished",
        "mmcl-s0-cleanclip-lr0.0001": "blocked",
        "mmcl-s0-cleanclip-lr0.001": "blocked",
        "mmcl_ssl-s0-cleanclip-lr0.0001": "finished",
        "mmcl_ssl-s0-cleanclip-lr0.001": "finished",
    }
    assert ledger.table()[1].status.reason == "the loss is nan"
    ledger.retry()
    assert ledger.left() and ledger.take().run.name == "mmcl-s0"


def test_a_pretraining_that_diverged_made_no_model(tmp_path):
    ledger = Ledger(tmp_path, SMALL)
    finish(ledger.take())
    claim = ledger.take()
    finish(claim, reason="diverged")
    assert states(ledger)["mmcl-s0"] == "waiting"
    again = ledger.take()
    assert again.run == claim.run
    again.fail("the loss is nan")
    finish(ledger.take(), reason="finished")
    assert list(states(ledger).values()) == [
        "finished",
        "failed",
        "finished",
        "blocked",
        "blocked",
        "waiting",
        "waiting",
    ]
    finish(ledger.take(), reason="diverged")
    assert states(ledger)["mmcl_ssl-s0-cleanclip-lr0.0001"] == "finished"  # a result all the same


def test_an_old_claim_expires_by_the_clock_of_the_file_server(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path, SMALL, lease=60)
    stalled = ledger.take()
    monkeypatch.setattr(time, "time", lambda: 4e9)  # a machine whose own clock is years ahead
    assert ledger.take() is None
    monkeypatch.undo()
    age(tmp_path, 59)
    assert ledger.take() is None
    age(tmp_path, 61)
    assert states(ledger)["badnet"] == "waiting" and stalled.held()  # to look is not to take
    claim = ledger.take()
    assert claim.run == stalled.run and claim.held() and not stalled.held() and stalled.lost
    stalled.fail("too late")
    assert states(ledger)["badnet"] == "running" and claim.held()


@pytest.mark.parametrize("end", ["finished", "failed"])
def test_a_run_that_ends_after_we_looked_is_not_done_again(tmp_path, monkeypatch, end):
    here, there = Ledger(tmp_path, SMALL), Ledger(tmp_path)

    def late(run, attempt):
        claim = there.take()
        finish(claim) if end == "finished" else claim.fail("diverged")
        monkeypatch.undo()
        return here._claim(run, attempt + 1)

    monkeypatch.setattr(here, "_claim", late)
    assert here.take() is None and states(there)["badnet"] == end


def test_a_run_whose_folder_was_removed_is_done_again(tmp_path):
    ledger = Ledger(tmp_path, SMALL, lease=60)
    finish(ledger.take())
    ledger.runs[0].product.unlink()
    assert states(Ledger(tmp_path, lease=60))["badnet"] == "finished"  # NFS may show files late
    age(tmp_path, 61)
    assert Ledger(tmp_path, lease=60).take().run.name == "badnet"


def test_a_holder_that_cannot_reach_its_claim_has_lost_it(tmp_path, monkeypatch):
    gone = Ledger(tmp_path / "gone", SMALL).take()
    shutil.rmtree(tmp_path / "gone")
    assert not gone.held() and gone.lost
    gone.fail("nothing is written")
    assert not (tmp_path / "gone").exists()
    ledger = Ledger(tmp_path / "away", SMALL, lease=0.3)

    def away(*_):
        raise OSError("stale file handle")

    claim = ledger.take()
    monkeypatch.setattr(os, "utime", away)
    assert claim._lost.wait(10)


def test_a_run_of_a_dead_process_is_free_at_once_also_when_its_id_is_used_again(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path, SMALL)
    worker, pipe = piped(take, tmp_path, 600, cwd=tmp_path)
    assert pipe.recv() == "badnet"
    assert ledger.take() is None
    worker.kill()
    while ledgers._started(worker.pid) is not None:
        time.sleep(0.01)
    claim = ledger.take()
    assert claim.run.name == "badnet"
    owner = json.loads((tmp_path / "claims" / f"{claim.run.id}.2" / "claim.json").read_text())
    assert owner["started"] > 0
    assert not ledgers._is_gone(owner) and ledgers._is_gone({**owner, "started": owner["started"] - 1})
    assert not ledgers._is_gone({**owner, "kernel": "another machine", "started": 1})


def test_of_two_processes_one_takes_over(tmp_path):
    """Fifty races for a claim that has expired."""
    folders = [tmp_path / str(k) for k in range(50)]
    racers = [piped(race, cwd=tmp_path) for _ in range(2)]
    for folder in folders:
        Ledger(folder, SMALL).take().release()
        claims = folder / "claims"
        (held,) = claims.glob("*/claim.json")
        held.write_text('{"host": "elsewhere", "pid": 1, "started": 1, "kernel": "x", "since": 0}')
        age(folder, 61)
        said = []
        for word in (folder, "go"):
            for _, pipe in racers:
                pipe.send(word)
            said = [pipe.recv() for _, pipe in racers]
        assert sorted(said) == ["lost", "won"]
        assert {path.suffix for path in claims.iterdir()} == {".1", ".2"}
    for racer, pipe in racers:
        pipe.send(None)
        racer.join()


def test_a_holder_that_was_stopped_notices_that_it_lost(tmp_path):
    ledger = Ledger(tmp_path, SMALL, lease=3.0)
    worker, pipe = piped(take, tmp_path, 3.0, cwd=tmp_path)
    assert pipe.recv() == "badnet"
    time.sleep(3.5)
    assert ledger.take() is None  # it lives
    os.kill(worker.pid, signal.SIGSTOP)
    while Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    age(tmp_path, 4)
    claim = ledger.take()
    os.kill(worker.pid, signal.SIGCONT)
    assert pipe.poll(30) and pipe.recv() == "lost" and claim.held()


def test_no_run_is_lost_or_done_twice_by_workers_that_are_killed(tmp_path):
    draw = random.Random(0)
    study = replace(SMALL, clean=({"method": "cleanclip", "lr": tuple(k * 1e-4 for k in range(1, 16))},))
    ledger = Ledger(tmp_path, study)
    (tmp_path / "journals").mkdir()
    workers, killed, said, until = [], 0, tmp_path / "said.txt", time.monotonic() + 120
    while ledger.left() and time.monotonic() < until:
        while len(workers) < 3:
            workers.append(forked(ledger_worker.main, tmp_path, cwd=tmp_path, said=said))
        time.sleep(draw.uniform(0.1, 0.8))  # some die at a run, also where starting takes long
        victim = workers.pop(draw.randrange(3))
        victim.kill()
        victim.join()
        killed += victim.exitcode == -signal.SIGKILL
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert said.read_text() == ""
    assert killed >= 3
    assert all(run.product.exists() for run in ledger.runs) and len(ledger.runs) == 33
    several = 0
    for run in ledger.runs:
        lines = [line.split() for line in (tmp_path / "journals" / run.id).read_text().splitlines()]
        assert [int(step) for step, _ in lines] == list(range(10))
        several += len({pid for _, pid in lines}) > 1
    assert several >= 1  # at least one run was gone on with


def test_the_view_shows_the_last_evaluation_and_estimates_the_rest(tmp_path):
    ledger = Ledger(tmp_path, SMALL)
    finish(ledger.take())
    for _ in range(2):
        finish(ledger.take(), seconds=100.0)
    assert seconds_left(ledger.table()) is None  # no cleaning has finished
    finish(ledger.take(), seconds=40.0)
    claim = ledger.take()
    claim.run.config.out.mkdir(parents=True)
    rows = [{"step": 1, "pad": "x" * 100_000}, {"step": 5}, {"step": 9, "epoch": 1.0, "top1": 0.7, "asr": 0.1}]
    lines = "\n".join(map(json.dumps, rows))
    (claim.run.config.out / "metrics.jsonl").write_text(lines + '\n{"step": 12, "ep')
    table = ledger.table()
    row = next(row for row in table if row.run == claim.run)
    assert (row.step, row.epoch, row.top1, row.asr) == (9, 1.0, 0.7, 0.1)
    assert 0 <= row.seconds < 20 and [r.seconds for r in table[:4]] == [None, 100, 100, 40]
    assert seconds_left(table) == pytest.approx(3 * 40 - row.seconds)


def test_what_is_left_takes_the_time_of_its_method(tmp_path):
    """A method of which none has finished: that of the others."""
    clean = [{"method": method, "lr": (1e-4, 1e-3)} for method in ("finetune", "cleanclip", "par")]
    ledger = Ledger(tmp_path, replace(SMALL, attacks=(), pretrain=({"objective": "mmcl"},), clean=tuple(clean)))
    for seconds in (100, 10, 10, 40):
        finish(ledger.take(), seconds=seconds)
    assert seconds_left(ledger.table()) == pytest.approx(40 + 2 * 20)


def test_a_study_can_grow_and_keeps_the_names_of_its_runs(tmp_path):
    one = replace(SMALL, clean=({"method": "cleanclip", "lr": 1e-3},))
    before = {run.id: run.name for run in Ledger(tmp_path, one).runs}
    more = replace(SMALL, seeds=(0, 1), clean=({"method": "cleanclip", "lr": (1e-3, 1e-4)},))
    after = Ledger(tmp_path, more)
    names = {run.id: run.name for run in after.runs}
    assert "mmcl-s0-cleanclip" in before.values() and before.items() <= names.items()
    assert {"mmcl-s1-cleanclip-lr0.001", "mmcl-s0-cleanclip-lr0.0001"} <= set(names.values())
    assert Ledger(tmp_path).runs == after.runs and len(list(tmp_path.glob("study.*"))) == 2
    assert len(Ledger(tmp_path, one).runs) == 5 and len(list(tmp_path.glob("study.*"))) == 2


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"pretrain": ({"objective": ("mmcl", "mmcl_ssl"), "epochs": 6},)},
            "mmcl-s0 was planned with epochs 12, now 6;",
        ),
        ({"attacks": ({"trigger": "badnet", "patch_size": 8},)}, "badnet was planned with patch_size 16, now 8;"),
        ({"name": "large"}, "holds the study 'small'; choose another folder"),
    ],
)
def test_other_settings_under_the_same_names_are_refused(tmp_path, other, said):
    Ledger(tmp_path, SMALL)
    with pytest.raises(UserError, match=said):
        Ledger(tmp_path, replace(SMALL, **other))


def test_a_folder_without_a_study_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="holds no study: name one with --study"):
        Ledger(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_open_a_folder_at_once_both_have_their_runs_written(tmp_path):
    Ledger(tmp_path, SMALL)
    assert not ledgers._create(ledgers._version(tmp_path, 1), {})
    assert [path.name for path in tmp_path.glob("study*")] == ["study.1"]


GARBAGE = [b"", b"{", b"[1, 2]", b"null", b'"held"', b"\xff\xfe", b"[" * 100_000, b"9" * 5000]


@pytest.mark.parametrize("text", [*GARBAGE, b'{"host": 3, "pid": "x"}'])
def test_a_claim_that_cannot_be_read_is_judged_by_its_age(tmp_path, text):
    ledger = Ledger(tmp_path, SMALL, lease=60)
    held = ledger.take()
    held._path.write_bytes(text)
    assert ledger.take() is None and ledger.left()
    assert ledger.table()[0].status.who == "unknown"
    assert held.held()  # by its holder it still is
    age(tmp_path, 61)
    claim = ledger.take()
    assert claim.run == held.run and claim._path != held._path
    assert not held.held() and claim.held()


def test_the_end_of_a_claim_that_cannot_be_read_counts(tmp_path):
    ledger = Ledger(tmp_path, SMALL, lease=60)
    held = ledger.take()
    held._path.write_text('{"host": "h')
    held.release()
    again = ledger.take()
    assert again.run == held.run
    again._path.write_text(again._path.read_text() + "\nrele")  # cut by a full disk: not an end
    assert again.held() and ledger.take() is None
    again.release()
    assert ledger.take().run == held.run


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_claim_that_was_removed_is_lost_to_its_holder(tmp_path, what):
    """Also when the next one has the same name."""
    ledger = Ledger(tmp_path, SMALL, lease=60)
    held = ledger.take()
    held._path.unlink() if what == "file" else shutil.rmtree(held._path.parent)
    if what == "file":
        assert ledger.take() is None  # its holder may not have found out
        os.utime(held._path.parent, (time.time() - 61,) * 2)
    claim = ledger.take()
    assert claim.run == held.run and (claim._path == held._path) == (what == "folder")
    assert claim.held() and not held.held()
    held.release()
    assert claim.held()


def test_a_claim_from_the_future_expires_when_it_stands_still(tmp_path):
    """As after the server's clock was put back; by the clock of the process that looks."""
    ledger = Ledger(tmp_path, SMALL, lease=0.5)
    held = ledger.take()
    held._released.set()  # no touch any more
    owner = json.loads(held._path.read_text())
    held._path.write_text(json.dumps({**owner, "kernel": "another machine"}))
    ahead = time.time() + 1000
    os.utime(held._path, (ahead, ahead))
    assert ledger.take() is None
    time.sleep(0.3)
    os.utime(held._path, (ahead + 1, ahead + 1))  # a sign of life
    time.sleep(0.3)
    assert ledger.take() is None
    time.sleep(0.3)
    assert ledger.take() is None
    time.sleep(0.3)
    assert ledger.take().run == held.run


def test_a_claim_from_the_future_is_free_at_once_when_its_holder_is_dead(tmp_path):
    ledger = Ledger(tmp_path, SMALL, lease=60)
    dead = ledger.take()
    owner = json.loads(dead._path.read_text())
    dead._path.write_text(json.dumps({**owner, "started": owner["started"] - 1}))
    os.utime(dead._path, (time.time() + 1000,) * 2)
    assert ledger.take().run == dead.run


def test_a_living_holder_keeps_a_claim_from_the_future(tmp_path):
    held = Ledger(tmp_path, SMALL, lease=0.6).take()
    os.utime(held._path, (time.time() + 1000,) * 2)
    time.sleep(0.3)  # two touches
    assert abs(held._path.stat().st_mtime - time.time()) < 1 and held.held()
    assert Ledger(tmp_path, lease=0.6).take() is None


@pytest.mark.parametrize("text", [*GARBAGE, b"{}", b'{"reason": 3}'])
def test_a_failure_that_cannot_be_read_is_one(tmp_path, text):
    ledger = Ledger(tmp_path, SMALL)
    claim = ledger.take()
    claim.fail("the loss is nan")
    claim._failure.write_bytes(text)
    (row, *_) = ledger.table()
    assert row.status.state == "failed"
    assert row.status.reason == f"{claim._failure} cannot be read: try the run again with --retry"
    ledger.retry()
    assert ledger.take().run == claim.run


@pytest.mark.parametrize("text", GARBAGE)
def test_a_product_that_cannot_be_read_is_not_finished(tmp_path, text):
    """Of each kind; what was made of it stays."""
    ledger = Ledger(tmp_path, SMALL)
    while claim := ledger.take():
        finish(claim, reason="finished")
    kinds = [ledger.runs[0], ledger.runs[1], ledger.runs[-1]]
    for run in kinds:
        run.product.write_bytes(text)
    again = Ledger(tmp_path)
    assert [name for name, state in states(again).items() if state != "finished"] == [run.name for run in kinds]
    taken = []
    while claim := again.take():
        taken.append(claim.run)
        finish(claim, reason="finished")
    assert taken == kinds and not again.left()


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A folder in which the first run of SMALL has finished."""
    folder = tmp_path_factory.mktemp("begun")
    finish(Ledger(folder, SMALL).take())
    return folder


@pytest.mark.parametrize(
    "change",
    [
        *GARBAGE,
        b"{}",
        b'{"study": {}, "runs": []}',
        lambda found: found.pop("runs"),
        lambda found: found.update(runs=[{}]),
        lambda found: found.update(runs=3),
        lambda found: found["runs"][0].update(id=["x"]),
        lambda found: found.update(study=[]),
        lambda found: found["study"].update(preset=["demo"]),
        lambda found: found["study"].update(name={}),
        lambda found: found["study"].update(seeds="x"),
        lambda found: found["study"].update(clean=[3]),
        lambda found: found["study"].update(searched=[{"lr": 1}]),
        lambda found: found["study"].update(more=1),
    ],
)
def test_a_damaged_study_is_named_with_what_to_do(begun, change):
    path = begun / "study.1" / "study.json"
    whole = path.read_bytes()
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        found = json.loads(whole)
        change(found)
        path.write_text(json.dumps(found))
    for given in (None, SMALL):
        with pytest.raises(UserError) as raised:
            Ledger(begun, given)
        said = str(raised.value)
        assert said.startswith(f"{path} ") and f"remove {path.parent} and name the study again with --study" in said
    path.write_bytes(whole)


def test_a_study_that_was_removed_is_named_again_and_resumed(begun):
    runs = Ledger(begun).runs
    shutil.rmtree(begun / "study.1")
    with pytest.raises(UserError, match="holds no study: name one with --study"):
        Ledger(begun)
    assert Ledger(begun, SMALL).runs == runs
    assert list(states(Ledger(begun)).values())[:2] == ["finished", "waiting"]


def test_the_first_of_two_versions_may_be_made_again(tmp_path):
    one = replace(SMALL, clean=({"method": "cleanclip", "lr": 1e-3},))
    Ledger(tmp_path, one)
    runs = Ledger(tmp_path, SMALL).runs
    shutil.rmtree(tmp_path / "study.1")
    assert {run.id for run in Ledger(tmp_path, SMALL).runs} == {run.id for run in runs}
    assert len(Ledger(tmp_path).runs) == len(runs)


def test_a_run_is_taken_later_where_there_is_another(tmp_path):
    ledger = Ledger(tmp_path, SMALL)
    finish(ledger.take())
    first = ledger.take()
    first.release()
    ledger.later = first.run.id
    second = ledger.take()
    assert second.run != first.run and ledger.take().run == first.run


def test_a_release_without_room_for_its_word_lets_the_claim_look_old(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path, SMALL, lease=60)
    held = ledger.take()

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(ledgers, "_end", full)
    held.release()
    monkeypatch.undo()
    assert ledger.take().run == held.run


def test_a_claim_is_let_go_where_its_run_cannot_be_looked_at(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path, SMALL, lease=60)

    def broken(run):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(ledgers.Planned, "finished", property(broken))
    monkeypatch.setattr(ledger, "_status", lambda *_: ledgers.Status("waiting"))
    with pytest.raises(OSError, match="input/output"):
        ledger.take()
    monkeypatch.undo()
    assert ledger.take().run == ledger.runs[0]


@pytest.mark.parametrize(
    "line", [b"3", b"[]", b"\xff\xfe", b"[" * 20_000, b'{"step": "x", "top1": [], "asr": 1' + b"0" * 400 + b"}", b"{"]
)
def test_the_view_bears_what_is_no_evaluation(tmp_path, line):
    ledger = Ledger(tmp_path, SMALL)
    finish(ledger.take())
    held, other = ledger.take(), ledger.take()
    finish(other, seconds="long")
    for claim in (held, other):
        claim.run.config.out.mkdir(parents=True, exist_ok=True)
        (claim.run.config.out / "metrics.jsonl").write_bytes(b'{"step": 5, "top1": 0.5}\n' + line + b"\n")
    rows = [row for row in ledger.table() if row.run in (held.run, other.run)]
    seen = (None, None) if line.startswith(b'{"') else (5, 0.5)
    assert [(row.step, row.top1, row.asr) for row in rows] == [(*seen, None)] * 2
    assert rows[1].seconds is None and live.view(ledger).row_count == 3
