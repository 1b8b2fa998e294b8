"""Weights as other programs save them, for tests."""

from __future__ import annotations

import json
import struct

import torch

from fastbd.models import create, read_weights


def load(path, name="tiny-rn", activation="quickgelu"):
    """A model of that name with the weights in `path`, over others that it had before."""
    model = create(name, 2, activation)
    read_weights(path).load_into(model)
    return model


def assert_loads(path, source, name="tiny-rn", atol=0.0):
    """A model takes the weights of `source` from `path`, in its own dtype."""
    state = load(path, name).state_dict()
    for key, tensor in source.state_dict().items():
        assert state[key].dtype == tensor.dtype
        torch.testing.assert_close(state[key], tensor, rtol=0, atol=atol)


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def write_safetensors(path, tensors):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().numpy().tobytes()
        dtype = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    write_raw_safetensors(path, header, data)


def write_raw_safetensors(path, header, data=b""):
    """`header`: an object, or the text itself."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
