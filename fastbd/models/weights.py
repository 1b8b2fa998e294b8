"""Weights published in other programs' layouts, read without running anything that the file says.

Weights that were trained with nn.GELU (some of open_clip's) have the same names and shapes as those trained with
QuickGELU, which this model computes: a file cannot tell them apart.
"""

from __future__ import annotations

import argparse
import json
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastbd.errors import UserError

_DERIVED = {"input_resolution", "context_length", "vocab_size", "attn_mask"}  # OpenAI stores them; none is learned
_WRAPPERS = {"module", "model", "_orig_mod"}  # components of names left by DDP, PAR's tower classes, torch.compile
_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                "I64": torch.int64, "I32": torch.int32}  # fmt: skip
_STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
             "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
             "BoolStorage": torch.bool}  # fmt: skip


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the weights in `path` into the model, cast to its dtype; on an error the model stays as it was.

    Layouts: OpenAI (TorchScript archive or state dict), open_clip (.pt or .safetensors), CleanCLIP and its forks, PAR,
    and this project's own checkpoints. Raises UserError if the file is not readable, not safe, or of another model.
    """
    path = Path(path)
    weights = {}
    for name, value in _unwrap(_read(path)).items():
        parts = [part for part in str(name).split(".") if part not in _WRAPPERS]
        if isinstance(value, Tensor) and not _DERIVED.intersection(parts):
            weights[".".join(parts)] = value
    if difference := _first_difference(weights, model.state_dict()):
        raise UserError(f"{path} is a checkpoint of another model: {difference}; choose the model it was made with.")
    model.load_state_dict(weights)


def _first_difference(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    for name, tensor in expected.items():
        if name not in weights:
            return f"the file lacks {name}"
        if weights[name].shape != tensor.shape:
            return f"{name} has shape {tuple(weights[name].shape)} in the file, {tuple(tensor.shape)} in the model"
    return next((f"the file holds {name}, which the model lacks" for name in weights if name not in expected), None)


def _unwrap(tree: Mapping) -> Mapping:
    """The state dict inside a checkpoint that also holds an optimizer, an epoch and the like."""
    for key in ("state_dict", "model"):
        if isinstance(tree.get(key), Mapping):
            return _unwrap(tree[key])
    return tree


def _read(path: Path) -> Mapping:
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}: give the path of a weights file.")
    try:
        tree = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} cannot be loaded safely: it is no weights file, or holds Python objects besides tensors, "
            "which could run code; save its state dict alone."
        ) from error
    except Exception as error:  # a damaged file can fail anywhere in the readers
        raise UserError(f"{path} is damaged or no weights file ({type(error).__name__}): fetch it again.") from error
    if not isinstance(tree, Mapping):
        raise UserError(f"{path} holds a {type(tree).__name__}, not a state dict: save the model's state_dict().")
    return tree


def _read_torch(path: Path) -> Mapping:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/constants.pkl"):  # TorchScript writes it, torch.save does not
                    root = name.removesuffix("constants.pkl")
                    return dict(_named_tensors(_TorchScriptUnpickler(archive, root).load()))
    with torch.serialization.safe_globals([argparse.Namespace]):  # PAR stores its options; a plain record
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Header length (u64), JSON header {name: {dtype, shape, data_offsets}}, data; little-endian."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError("header longer than the file")
        header = json.loads(file.read(length))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        raw = data[slice(*entry["data_offsets"])]
        tensors[name] = torch.frombuffer(raw, dtype=_SAFETENSORS[entry["dtype"]]).view(entry["shape"])
    return tensors


class _Inert:
    """Stands for any object of an archive that is not a tensor; keeps its attributes, does nothing."""

    state: object = None

    def __init__(self, *arguments: object):
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


class _TorchScriptUnpickler(pickle.Unpickler):
    """Module tree of a TorchScript archive. torch.jit.load would run the archive's own code; here none is looked up."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(root + "data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        return _STORAGES[name] if module == "torch" else _Inert

    def persistent_load(self, identifier: tuple) -> Tensor:
        _, dtype, key, _, _ = identifier
        return torch.frombuffer(bytearray(self.archive.read(f"{self.root}data/{key}")), dtype=dtype)


def _rebuild_tensor(storage: Tensor, offset: int, shape: tuple, stride: tuple, *_: object) -> Tensor:
    return storage.as_strided(shape, stride, offset)


def _named_tensors(record: _Inert, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    attributes = record.state if isinstance(record.state, dict) else {}
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Inert):
            yield from _named_tensors(value, f"{prefix}{name}.")
