from __future__ import annotations

import collections
import fractions
import json
import pickle
import resource
import struct
import zipfile

import numpy as np
import pytest
import torch
from saved import assert_loads, load, write_raw_safetensors, write_safetensors

from fastbd.base.errors import UserError
from fastbd.models import create, read_weights
from fastbd.models.weight_files import read_file


@pytest.fixture(scope="module")
def source():
    return create("tiny-rn", 1)


SMALL = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([5], dtype=torch.int64)}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_archive(source, tmp_path):
    model = create("tiny-rn", 3).eval()
    model.load_state_dict(source.state_dict())
    model.register_buffer("input_resolution", torch.tensor(32))
    example = {"encode_image": torch.zeros(2, 3, 32, 32)}
    archive = torch.jit.trace_module(model, example, check_trace=False).half()
    archive.save(tmp_path / "weights.pt")
    assert_loads(tmp_path / "weights.pt", source, atol=2e-3)
    assert read_weights(tmp_path / "weights.pt").origin == ("quickgelu", "as in OpenAI's layout", None)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_safetensors_by_their_name_or_by_what_they_are(name, source, tmp_path):
    write_safetensors(tmp_path / name, source.state_dict())
    assert_loads(tmp_path / name, source)


def test_safetensors_of_every_kind(tmp_path):
    kinds = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
    header, data, made = {}, b"", {}
    for kind, dtype in kinds.items():
        made[kind] = torch.tensor([[0, 1, 1]], dtype=dtype)
        raw = made[kind].view(torch.uint8).numpy().tobytes()
        header[kind] = {"dtype": kind, "shape": [1, 3], "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    header["empty"] = {"dtype": "F32", "shape": [0, 4], "data_offsets": [len(data), len(data)]}
    header["scalar"] = {"dtype": "U8", "shape": [], "data_offsets": [len(data), len(data) + 1]}
    write_raw_safetensors(tmp_path / "x.safetensors", header, data + b"\x07")
    read = read_file(tmp_path / "x.safetensors")
    assert read.pop("empty").shape == (0, 4) and read.pop("scalar").item() == 7
    assert read.keys() == made.keys() and all(read[k].dtype == made[k].dtype for k in made)
    assert all(torch.equal(read[k], made[k]) for k in made)


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HOSTILE = {
    "overlap": {"a": entry(0, 8), "b": entry(4, 12)},
    "same place": {"a": entry(0, 8), "b": entry(0, 8)},
    "hole": {"a": entry(0, 4, (1,)), "b": entry(8, 16)},
    "behind the end": {"a": entry(0, 8), "b": entry(8, 8 + 2**40, (2**38,))},
    "before the beginning": {"a": entry(-8, 0)},
    "backwards": {"a": entry(0, 16, (4,)), "b": entry(16, 8)},
    "data of no tensor": {"a": entry(0, 8)},
    "too large a shape": {"a": entry(0, 16, (2**62, 2**62))},
    "negative shape": {"a": entry(0, 16, (-2, -2))},
    "shape of nothing": {"a": entry(0, 0, (0, 2**80)), "b": entry(0, 16, (4,))},
    "shape of strings": {"a": entry(0, 16, ("4",))},
    "offsets of strings": {"a": entry("0", "16", (4,))},
    "fractions": {"a": entry(0.0, 16.0, (4.0,))},
    "three offsets": {"a": entry(0, 16, (4,)) | {"data_offsets": [0, 8, 16]}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 16]}},
    "not a table": [1, 2],
    "tensor that is a number": {"a": 3},
    "name that is there twice": f'{{"a": {json.dumps(entry(0, 8))}, "a": {json.dumps(entry(8, 16))}}}',
    "no JSON": "{" * 40,
    "deep": '{"a":' + "[" * 100_000,
    "no text": "\udcff".encode("utf-8", "surrogatepass").decode("latin1"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_safetensors_with_a_hostile_header(case, tmp_path):
    write_raw_safetensors(tmp_path / "x.safetensors", HOSTILE[case], bytes(16))
    with pytest.raises(UserError, match=r"^.*x.safetensors is damaged or no weights file \(\w+\): fetch it again\.$"):
        read_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("length", [0, 2**31, 2**63, 2**64 - 1])
def test_safetensors_whose_header_claims_a_length(length, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" + bytes(16))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="x.safetensors is damaged"):
        read_file(tmp_path / "x.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_safetensors_of_a_type_that_is_not_read(tmp_path):
    write_raw_safetensors(tmp_path / "x.safetensors", {"a": entry(0, 16, (16,), "F8_E4M3")}, bytes(16))
    with pytest.raises(UserError, match="x.safetensors holds a as F8_E4M3: save the weights as F32, BF16 or F16"):
        read_file(tmp_path / "x.safetensors")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")  # creates the file, if it is run


def test_malicious_pickle_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights.pt cannot be loaded safely: .*, _?io\.open, which could run code"):
        read_file(tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


class Model(torch.nn.Linear):
    pass


@pytest.mark.parametrize(
    ("foreign", "named"),
    [
        (fractions.Fraction(1, 3), "fractions.Fraction"),
        (collections.deque(), "collections.deque"),
        (Model(1, 1), f"{__name__}.Model"),
        (np.zeros(2), np.zeros(2).__reduce__()[0].__module__ + "._reconstruct"),
        (Payload("x"), "open"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_refused_is_named(foreign, named, zipped, tmp_path):
    tree = {"state_dict": SMALL, "extra": foreign}
    torch.save(tree, tmp_path / "weights.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as raised:
        read_file(tmp_path / "weights.pt")
    assert f"{named}, which could run code; save the model's state_dict() alone." in str(raised.value)
    assert "\n" not in str(raised.value)


def test_numpys_numbers_are_not_made(tmp_path):
    """They stand where nothing is read, so that a file cannot hand numpy anything."""
    torch.save(SMALL | {"lr": np.float64(0.5), "kind": np.dtype("float32")}, tmp_path / "weights.pt")
    read = read_file(tmp_path / "weights.pt")
    assert not isinstance(read["lr"], np.generic) and not isinstance(read["kind"], np.dtype)
    assert torch.equal(read["a.weight"], SMALL["a.weight"])


def test_malicious_torchscript_archive_is_not_run(tmp_path):
    with zipfile.ZipFile(tmp_path / "weights.pt", "w") as archive:
        archive.writestr("x/constants.pkl", pickle.dumps(()))
        archive.writestr("x/data.pkl", pickle.dumps(Payload(tmp_path / "ran"), protocol=2))
    with pytest.raises(UserError, match="weights.pt"):
        load(tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


def test_an_archive_that_grows(tmp_path):
    with zipfile.ZipFile(tmp_path / "weights.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10_000_000))
    with pytest.raises(UserError, match="weights.pt is damaged"):
        read_file(tmp_path / "weights.pt")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"", b"hello, this is no weights file", b"\xff" * 64, b"\x80\x02.", b"{}"])
def test_files_that_hold_no_weights(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        load(tmp_path / name)


def test_a_pointer_of_git_lfs(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 353976522\n"
    (tmp_path / "weights.pt").write_text(pointer)
    with pytest.raises(UserError, match="weights.pt is a pointer of Git LFS, .*git lfs pull"):
        read_file(tmp_path / "weights.pt")


def test_truncated_files(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    write_safetensors(tmp_path / "weights.safetensors", source.state_dict())
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for left in (len(whole) - 10_000, len(whole) // 2, 100, 8, 1):
            path.write_bytes(whole[:left])
            with pytest.raises(UserError, match=path.name):
                load(path)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="There is no checkpoint"):
        load(tmp_path / "weights.pt")


def test_a_checkpoint_that_holds_itself(tmp_path):
    tree = {}
    tree["model"] = tree
    torch.save(tree, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="weights.pt"):
        load(tmp_path / "weights.pt")


def mutations(whole, count, seed):
    """Copies with one to three bytes changed, or a part cut out or doubled."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        changed = bytearray(whole)
        at = int(draw.integers(len(whole)))
        match draw.integers(4):
            case 0:
                del changed[at : at + int(draw.integers(1, 64))]
            case 1:
                changed[at:at] = changed[at : at + int(draw.integers(1, 64))]
            case _:
                for place in draw.integers(len(whole), size=draw.integers(1, 4)):
                    changed[place] = draw.integers(256)
        yield bytes(changed)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_mutated_files_load_or_are_refused(kind, tmp_path):
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    if kind == "safetensors":
        write_safetensors(path, SMALL)
    else:
        tree = {"state_dict": SMALL, "lr": np.float64(0.5)}
        torch.save(tree, path, _use_new_zipfile_serialization=kind == "zip")
    refused = 0
    for changed in mutations(path.read_bytes(), 300, seed=0):
        path.write_bytes(changed)
        try:
            read_weights(path)
        except UserError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert 30 < refused < 300
