from __future__ import annotations

import argparse
import json
import pickle
import struct
import zipfile

import pytest
import torch

from fastbd.errors import UserError
from fastbd.models import create, load_weights


@pytest.fixture(scope="module")
def source():
    model = create("tiny-rn", 1)
    model.visual.bn1.running_mean.fill_(0.5)  # buffers are weights too
    return model


def assert_loads(path, source, atol=0.0):
    model = create("tiny-rn", 2)
    load_weights(model, path)
    state = model.state_dict()
    for name, tensor in source.state_dict().items():
        assert state[name].dtype == tensor.dtype
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=atol)


def write_safetensors(path, tensors):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().numpy().tobytes()
        dtype = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


LAYOUTS = {
    "state dict": lambda state: state,
    "own": lambda state: {"model": state, "step": 3, "optimizer": {"state": {}}},
    "open_clip": lambda state: {"epoch": 3, "name": "x", "state_dict": prefixed(state, "module.")},
    "CleanCLIP": lambda state: {"epoch": 3, "state_dict": prefixed(state, "module."), "optimizer": {"state": {}}},
    "PAR": lambda state: {"state_dict": prefixed(state, "module."), "args": argparse.Namespace(lr=3e-6)},
    "PAR tower class": lambda state: {n.replace("visual.", "visual.model."): t for n, t in state.items()},
    "compiled": lambda state: {"model": prefixed(state, "_orig_mod.")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_torch_save(layout, source, tmp_path):
    torch.save(LAYOUTS[layout](source.state_dict()), tmp_path / "weights.pt")
    assert_loads(tmp_path / "weights.pt", source)


def test_openai_state_dict_is_cast_from_half_and_its_sizes_are_dropped(source, tmp_path):
    state = {name: t.half() if t.is_floating_point() else t for name, t in source.state_dict().items()}
    sizes = {"input_resolution": 32, "context_length": 77, "vocab_size": 49_408}
    torch.save(state | {name: torch.tensor(size) for name, size in sizes.items()}, tmp_path / "weights.pt")
    assert_loads(tmp_path / "weights.pt", source, atol=2e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_archive(source, tmp_path):
    model = create("tiny-rn", 3).eval()
    model.load_state_dict(source.state_dict())
    model.register_buffer("input_resolution", torch.tensor(32))
    example = {"encode_image": torch.zeros(2, 3, 32, 32)}
    archive = torch.jit.trace_module(model, example, check_trace=False).half()
    archive.save(tmp_path / "weights.pt")
    assert_loads(tmp_path / "weights.pt", source, atol=2e-3)


def test_safetensors(source, tmp_path):
    write_safetensors(tmp_path / "weights.safetensors", source.state_dict())
    assert_loads(tmp_path / "weights.safetensors", source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("ln_final.bias"), "the file lacks ln_final.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "the file holds extra, which the model lacks"),
        (lambda state: state.update({"ln_final.bias": torch.zeros(3)}),
         r"ln_final.bias has shape \(3,\) in the file, \(32,\) in the model"),
    ],
)  # fmt: skip
def test_another_model_is_named_and_changes_nothing(change, message, source, tmp_path):
    state = dict(source.state_dict())
    change(state)
    torch.save(state, tmp_path / "weights.pt")
    model = create("tiny-rn", 2)
    before = model.token_embedding.weight.clone()
    with pytest.raises(UserError, match=f"weights.pt is a checkpoint of another model: {message};"):
        load_weights(model, tmp_path / "weights.pt")
    assert torch.equal(model.token_embedding.weight, before)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")  # creates the file, if it is run


def test_malicious_pickle_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="weights.pt cannot be loaded safely"):
        load_weights(create("tiny-rn", 2), tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


def test_malicious_torchscript_archive_is_not_run(tmp_path):
    with zipfile.ZipFile(tmp_path / "weights.pt", "w") as archive:
        archive.writestr("x/constants.pkl", pickle.dumps(()))
        archive.writestr("x/data.pkl", pickle.dumps(Payload(tmp_path / "ran"), protocol=2))
    with pytest.raises(UserError, match="weights.pt"):
        load_weights(create("tiny-rn", 2), tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello, this is no weights file", b"\xff" * 64])
def test_files_that_hold_no_weights(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        load_weights(create("tiny-rn", 2), tmp_path / name)


def test_truncated_files(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    write_safetensors(tmp_path / "weights.safetensors", source.state_dict())
    for path in sorted(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[:-10_000])
        with pytest.raises(UserError, match=path.name):
            load_weights(create("tiny-rn", 2), path)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="There is no checkpoint"):
        load_weights(create("tiny-rn", 2), tmp_path / "weights.pt")
