from __future__ import annotations

import errno
import os
import pickle
import resource
import signal
import threading
import weakref

import pytest
import torch
from cleanings import cleaning, start

from fastbd.base import archive
from fastbd.base.errors import UserError
from fastbd.base.signals import Stopped, stoppable
from fastbd.training import checkpoint
from fastbd.training.checkpoint import Snapshot

STATE = {
    "fastbd": "1",
    "model": {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(7)},
    "step": 12,
    "epoch": 1.5,
    "plan": None,
    "about": {"verb": "pretrain", "rows": [1, 2]},
}


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint.save(tmp_path / "ckpt_last.pt", STATE)
    loaded = checkpoint.load(tmp_path / "ckpt_last.pt")
    assert torch.equal(loaded["model"].pop("w"), STATE["model"]["w"]) and loaded["model"].pop("n") == 7
    assert loaded == STATE | {"model": {}}
    assert os.listdir(tmp_path) == ["ckpt_last.pt"]


def test_training_leaves_a_snapshot_alone():
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    state = {"model": {"w": torch.nn.Parameter(weight)}, "steps": [torch.tensor(3.0), 3], "plan": None}
    before, snapshot = weight.clone(), Snapshot(state)
    state["model"]["w"].data.zero_()
    state["steps"][0].add_(1)
    state["steps"].append(4)
    copy = snapshot.wait()
    assert torch.equal(copy["model"]["w"], before) and copy["model"]["w"].stride() == weight.stride()
    assert not copy["model"]["w"].requires_grad and copy["steps"] == [3.0, 3] and copy["plan"] is None


@pytest.mark.gpu
def test_a_snapshot_of_a_gpu_waits_for_nothing_and_takes_its_memory_again():
    weight = torch.randn(64, 32, 3, 3, device="cuda").to(memory_format=torch.channels_last)
    Snapshot({"w": weight, "steps": [torch.ones((), device="cuda"), 3]}).wait()  # a first locking may take long
    pinned = []
    for _ in range(2):
        before = weight.clone()
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            torch.cuda._sleep(100_000_000)
            snapshot = Snapshot({"w": weight, "steps": [torch.ones((), device="cuda"), 3]})
            assert not torch.cuda.current_stream().query()
            weight.add_(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        copy = snapshot.wait()
        assert copy["w"].is_pinned() and copy["w"].stride() == weight.stride() and copy["steps"] == [1.0, 3]
        assert torch.equal(copy["w"], before.cpu())
        torch.cuda.synchronize()
        del copy, snapshot
        torch.cuda.synchronize()  # an event behind the last use is recorded when memory is let go
        pinned.append(torch.cuda.host_memory_stats()["num_host_alloc"])
    assert pinned[0] == pinned[1]


def test_a_checkpoint_is_written_as_soon_as_its_copy_is_whole(study, monkeypatch, tmp_path):
    """Training does not wait for that; and the copy before has been let go."""
    whole, alive = threading.Event(), weakref.WeakSet()

    class Late(Snapshot):
        """Its tensors come only when they are waited for."""

        def __init__(self, state):
            assert not alive
            alive.add(self)
            self.underway = []
            super().__init__(state)

        def _copy(self, state):
            if not isinstance(state, torch.Tensor):
                return super()._copy(state)
            self.underway.append((torch.zeros_like(state), state.detach().clone()))
            return self.underway[-1][0]

        def wait(self):
            assert threading.current_thread() is not threading.main_thread() and whole.wait(60)
            for copy, value in self.underway:
                copy.copy_(value)
            return super().wait()

    monkeypatch.chdir(study)
    start(study)
    monkeypatch.setattr(checkpoint, "Snapshot", Late)
    training = cleaning(tmp_path / "run")
    weight = next(training.opened.model.parameters())
    for step in (1, 2):
        before = weight.detach().clone()
        training.save(step)
        weight.data.add_(1)
        assert checkpoint.load(tmp_path / "run/ckpt_last.pt")["step"] == 0 or whole.is_set()
        whole.set()
    training.folder.wait()
    saved = checkpoint.load(tmp_path / "run/ckpt_last.pt")
    assert saved["step"] == 2 and torch.equal(next(iter(saved["model"].values())), before)


def test_a_signal_while_a_checkpoint_is_read_is_no_damage(tmp_path):
    """The file is one that nobody ever writes to."""
    os.mkfifo(tmp_path / "ckpt_last.pt")

    def stop(signum, frame):
        raise Stopped(signum)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Stopped):
            checkpoint.load(tmp_path / "ckpt_last.pt")
    finally:
        signal.signal(signal.SIGALRM, before)


def test_the_random_state_goes_on_where_it_was(tmp_path):
    torch.manual_seed(5)
    checkpoint.save(tmp_path / "a.pt", {"fastbd": "1", "random": checkpoint.random_state()})
    drawn = torch.rand(4)
    checkpoint.set_random_state(checkpoint.load(tmp_path / "a.pt")["random"])
    assert torch.equal(torch.rand(4), drawn)


def test_a_full_disk_leaves_the_old_checkpoint_and_says_what_to_do(tmp_path, capfd):
    """A process that may write 100 kB to a file stands for a disk that fills while a checkpoint is written."""
    path = tmp_path / "ckpt_last.pt"
    checkpoint.save(path, STATE)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError) as said:
            checkpoint.save(path, {"fastbd": "1", "model": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(said.value).startswith(f"the checkpoint {path} could not be written (File too large; ")
    assert "make room, then go on with --resume" in str(said.value) and "\n" not in str(said.value)
    assert capfd.readouterr() == ("", "")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["ckpt_last.pt"]


def test_an_interrupted_write_leaves_nothing_behind(tmp_path):
    class Fails:
        def __reduce__(self):
            raise ValueError

    with pytest.raises(ValueError):
        checkpoint.save(tmp_path / "ckpt_last.pt", {"model": torch.zeros(9), "last": Fails()})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_while_a_checkpoint_is_written_is_answered_after_it(signum, tmp_path):
    class Signals:
        def __reduce__(self):
            signal.raise_signal(signum)
            return list, ()

    path = tmp_path / "ckpt_last.pt"
    with pytest.raises(Stopped), stoppable():
        checkpoint.save(path, {"model": torch.zeros(9), "last": Signals()})
    with open(path, "rb") as file:
        archive.verify(file)
    assert os.listdir(tmp_path) == ["ckpt_last.pt"]


def test_a_folder_that_is_not_there_is_named_with_one_like_it(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*runs/mcl: give that of a run\.$"):
        checkpoint.load(tmp_path / "runs/mcl/ckpt_last.pt")
    for name in ("par", "mmcl"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").touch()
    with pytest.raises(UserError, match=r"there is no folder .*runs/mcl: give that of a run, such as .*runs/mmcl\.$"):
        checkpoint.load(tmp_path / "runs/mcl/ckpt_last.pt")


def test_a_missing_checkpoint_is_named_with_those_that_are_there(tmp_path):
    checkpoint.save(tmp_path / "ckpt_epoch_002.pt", STATE)
    with pytest.raises(UserError, match=r"no checkpoint .*ckpt_epoch_007\.pt; checkpoints there: ckpt_epoch_002\.pt"):
        checkpoint.load(checkpoint.path_of(tmp_path, "7"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_checkpoint_is_the_users_business(tmp_path):
    path = tmp_path / "ckpt_last.pt"
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    damaged = [b"", b"path,caption\n", bytes(100), *(whole[:n] for n in range(0, len(whole), 97))]
    damaged += [bytes([b]) + whole[1:9] for b in range(256)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"ckpt_last\.pt is (damaged|not a checkpoint)"):
            checkpoint.load(path)


def test_weights_alone_are_no_checkpoint(tmp_path):
    for other in ({"w": torch.zeros(2)}, [1, 2]):
        torch.save(other, tmp_path / "weights.pt")
        with pytest.raises(UserError, match=r"weights\.pt is not a checkpoint of fastbd.*--weights"):
            checkpoint.load(tmp_path / "weights.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_a_checkpoint_says_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-run"),)

    path, attack = tmp_path / "ckpt_last.pt", {"fastbd": "1", "model": Attack()}
    for write in (lambda: path.write_bytes(pickle.dumps(attack)), lambda: torch.save(attack, path)):
        write()
        with pytest.raises(UserError):
            checkpoint.load(path)
        assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(("which", "name"), [("last", "ckpt_last.pt"), ("3", "ckpt_epoch_003.pt")])
def test_names(tmp_path, which, name):
    assert checkpoint.path_of(tmp_path, which) == tmp_path / name


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError(), PermissionError(13, "no")])
def test_a_disk_or_a_memory_that_fails_is_no_damage(tmp_path, monkeypatch, error):
    """Else a run would be resumed from an older checkpoint, which takes the place of the newer one."""
    for name in ("ckpt_last.pt", "ckpt_epoch_001.pt"):
        checkpoint.save(tmp_path / name, STATE)

    def fail(file):
        raise error

    monkeypatch.setattr(checkpoint.archive, "verify", fail)
    for read in (lambda: checkpoint.load(tmp_path / "ckpt_last.pt"), lambda: checkpoint.load_newest(tmp_path)):
        with pytest.raises(UserError, match=r"ckpt_last\.pt cannot be read .*run this again") as refused:
            read()
        assert refused.value.__cause__ is error
