from __future__ import annotations

import pickle
import random

import pytest
import torch

from fastbd.base.archive import DamagedArchive, verify
from fastbd.base.errors import UserError
from fastbd.models.weight_files import read_file
from fastbd.training import checkpoint

STATE = {"fastbd": "1", "model": {"w": torch.arange(60.0).view(2, 30), "n": torch.tensor(7)}, "step": 12, "plan": None}
DIRECTORY = 0x10, 38  # MS-DOS's attribute, and its place in an entry of the archive's directory (APPNOTE 4.3.12)


def content(state) -> bytes:
    return pickle.dumps([(key, value.tolist()) for key, value in state["model"].items()] + [state["step"]])


@pytest.mark.filterwarnings("ignore")
def test_a_flipped_bit_changes_nothing_or_is_refused(tmp_path):
    path = tmp_path / "ckpt_last.pt"
    checkpoint.save(path, STATE)
    whole, seen = path.read_bytes(), set()
    for bit in random.Random(0).sample(range(8 * len(whole)), 1000):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        for read in (checkpoint.load, read_file):
            try:
                assert content(read(path)) == content(STATE), bit
                seen.add("same")
            except UserError as error:
                assert str(error).startswith(str(path)), error
                seen.add("refused")
    assert seen == {"same", "refused"}


def test_the_member_is_named_and_the_whole_checkpoints_beside_it(tmp_path):
    for name in ("last", "2", "3", "4"):
        checkpoint.save(checkpoint.path_of(tmp_path, name), STATE)
    for name in ("last", "3"):
        path = checkpoint.path_of(tmp_path, name)
        whole = path.read_bytes()
        path.write_bytes(whole.replace(STATE["model"]["w"].numpy().tobytes(), bytes(240)))
    with pytest.raises(UserError) as caught:
        checkpoint.load(checkpoint.path_of(tmp_path, "last"))
    assert str(caught.value) == (
        f"{tmp_path}/ckpt_last.pt is damaged (member data/0: its content does not have its checksum): "
        "name another with --checkpoint (whole ones there: 4, 2)."
    )
    path, _, wrong = checkpoint.load_newest(tmp_path)
    assert path.name == "ckpt_epoch_004.pt" and wrong.startswith(f"{tmp_path}/ckpt_last.pt is damaged (member data/0")
    for name in ("2", "4"):
        checkpoint.path_of(tmp_path, name).unlink()
    with pytest.raises(UserError, match="has no whole checkpoint of an epoch: move the folder away and start"):
        checkpoint.load_newest(tmp_path)


def test_a_member_that_is_marked_as_a_folder_is_refused(tmp_path):
    """torch.load gives it memory that nothing was written to."""
    path = tmp_path / "weights.pt"
    torch.save(STATE, path)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.rindex(b"PK\1\2", 0, damaged.rindex(b"/data/0")) + DIRECTORY[1]] |= DIRECTORY[0]
    path.write_bytes(damaged)
    with open(path, "rb") as file, pytest.raises(DamagedArchive, match="member data/0: it is marked as a folder"):
        verify(file)


def test_weights_that_were_saved_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "weights.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert content(read_file(tmp_path / "weights.pt")) == content(STATE)
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(tmp_path / "weights.pt")


def test_a_state_of_another_model_is_refused_by_the_name_of_its_first_difference(tmp_path):
    model = torch.nn.Linear(3, 2)
    path = tmp_path / "ckpt_last.pt"
    for state, said in (
        (
            {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)},
            r"weight is of shape \(2, 4\) in the file, of shape \(2, 3\)",
        ),
        ({"weight": torch.zeros(2, 3)}, "bias is missing in the file"),
        ({**model.state_dict(), "more": torch.zeros(1)}, r"more is of shape \(1,\) in the file, missing in"),
    ):
        with pytest.raises(UserError, match=said):
            checkpoint.load_into(model, state, path, "linear")
