import os
import pickle
import resource
import signal

import pytest
import torch

from fastbd import checkpoint
from fastbd.errors import UserError


def test_round_trip(tmp_path):
    state = {"model": {"w": torch.randn(3)}, "step": 7, "random": checkpoint.random_state()}
    checkpoint.save(tmp_path / "ckpt_last.pt", state)
    loaded = checkpoint.load(checkpoint.path_of(tmp_path, "last"))
    assert torch.equal(loaded["model"]["w"], state["model"]["w"]) and loaded["step"] == 7
    expected = torch.rand(4)
    checkpoint.set_random_state(loaded["random"])
    assert torch.equal(torch.rand(4), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt_last.pt"]


def test_a_write_that_fails_keeps_the_old_checkpoint(tmp_path):
    """A limit on the file size stands for a full disk: the same failing write."""
    path = tmp_path / "ckpt_last.pt"
    checkpoint.save(path, {"step": 1})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match="ckpt_last.pt could not be written.*make room.*--resume"):
            checkpoint.save(path, {"step": 2, "big": torch.randn(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.load(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt_last.pt"]


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_what_is_no_checkpoint_is_refused_and_nothing_in_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt_last.pt").write_bytes(b"not a checkpoint")
    torch.save({"step": _Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Evil()))
    for name in ("ckpt_last.pt", "evil.pt", "plain.pt"):
        with pytest.raises(UserError, match=f"{name} is no checkpoint"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "evil").exists()
    with pytest.raises(UserError, match="checkpoints there: ckpt_last.pt"):
        checkpoint.load(checkpoint.path_of(tmp_path, "3"))
