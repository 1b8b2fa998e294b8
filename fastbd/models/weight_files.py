"""Files of weights, read without running anything that they say: torch.save's, TorchScript archives, safetensors.

Safetensors are written as well.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbd.base.archive import DamagedArchive, verify
from fastbd.base.errors import UserError
from fastbd.base.files import read_json

HEADER = 100_000_000  # bytes, the most that safetensors allows
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SAFETENSORS = _FLOATS | _INTEGERS
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
_IN_FOLDER = (
    "ckpt_last.pt",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)


class _Inert:
    """Stands for any object of a file that is not a tensor; keeps its attributes, does nothing."""

    state: object = None

    def __init__(self, *arguments: object):
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


# What published programs put beside the weights: CleanCLIP's schedule leaves numbers of numpy 1 or 2 in the optimizer,
# PAR stores its options. The weights need none of it, so nothing of numpy is called.
_KNOWN: list[Callable | tuple[Callable, str]] = [
    (_Inert, "argparse.Namespace"),
    (_Inert, "numpy.dtype"),
    (_Inert, "numpy.core.multiarray.scalar"),
    (_Inert, "numpy._core.multiarray.scalar"),
]


def weights_file(path: Path) -> Path:
    """Return `path`, or the file of weights in that folder: a run's, or that of a model of the Hugging Face Hub."""
    if path.is_dir():
        found = next((path / name for name in _IN_FOLDER if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{path} is a folder without {' or '.join(_IN_FOLDER)}: give the path of a weights file.")
        return found
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}: give the path of a weights file.")
    return path


def read_file(path: Path) -> Mapping[Any, Any]:
    """Return what a file holds: names and tensors, or a checkpoint. UserError where it cannot be read safely."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of Git LFS, not the weights themselves: fetch them with git lfs pull.")
    try:
        tree = _reader(path, head)(path)
    except UserError:
        raise
    except DamagedArchive as error:
        raise UserError(f"{path} is damaged ({error}): fetch it again.") from None
    except pickle.UnpicklingError as error:
        raise _unsafe(path, str(error)) from None
    except Exception as error:  # a damaged file can fail anywhere in the readers
        raise damaged(path, error) from error
    if not isinstance(tree, Mapping):
        raise UserError(f"{path} holds a {type(tree).__name__}, not a state dict: save the model's state_dict().")
    return tree


def damaged(path: Path, error: Exception) -> UserError:
    """Return the error for a file in which a reader has failed."""
    return UserError(f"{path} is damaged or no weights file ({type(error).__name__}): fetch it again.")


def _reader(path: Path, head: bytes):
    if path.name.endswith(".index.json"):
        return _read_sharded
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors
    return _read_torch


def _unsafe(path: Path, message: str) -> UserError:
    found = re.search(r"GLOBAL ([\w.<>]+)", message)
    if found is None:
        return UserError(f"{path} is damaged or no weights file: fetch it again.")
    return UserError(
        f"{path} cannot be loaded safely: it holds a Python object besides tensors, {found[1]}, which could run code; "
        "save the model's state_dict() alone."
    )


def _read_torch(path: Path) -> Mapping:
    """Return what torch.save or TorchScript has written. An archive's members are compared with their checksums; the
    format before 2020 has none, so that of it only what torch.load refuses is found."""
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\3\4" or zipfile.is_zipfile(file)
    if is_archive:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            read = [entry for entry in archive.infolist() if "/code/" not in entry.filename]  # which is compressed
            if sum(entry.file_size for entry in read) > path.stat().st_size:
                raise ValueError("the archive claims to hold more than it is long")
            verify(file, required=False)
            for name in archive.namelist():
                if name.endswith("/constants.pkl"):  # TorchScript writes it, torch.save does not
                    root = name.removesuffix("constants.pkl")
                    return dict(_named_tensors(_TorchScriptUnpickler(archive, root).load()))
    with torch.serialization.safe_globals(_KNOWN):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_sharded(path: Path) -> dict[str, Tensor]:
    """Return the tensors of several files by their index: {"weight_map": {name: file beside it}}."""
    places = read_json(path, "fetch it again")["weight_map"]
    parts = {name: read_file(weights_file(path.parent / Path(name).name)) for name in sorted(set(places.values()))}
    return {name: parts[place][name] for name, place in places.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of safetensors, which has no checksums: damage to its numbers cannot be told.

    Header length (u64), JSON header {name: {dtype, shape, data_offsets}}, data without holes; little-endian.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        size = path.stat().st_size - 8 - length
        if length > HEADER or size < 0:
            raise ValueError("header longer than the file")
        header = json.loads(file.read(length), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        end, tensors = 0, {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, after = entry["data_offsets"]
            if begin != end or after > size:
                raise ValueError("tensors overlap, or lie outside of the file")
            end = after
            file.seek(8 + length + begin)
            tensors[name] = _tensor(path, name, entry, file.read(after - begin))
    if end != size:
        raise ValueError("data that belong to no tensor")
    return tensors


def _tensor(path: Path, name: str, entry: dict, raw: bytes) -> Tensor:
    dtype, shape = _SAFETENSORS.get(entry["dtype"]), entry["shape"]
    if dtype is None:
        raise UserError(f"{path} holds {name} as {entry['dtype']}: save the weights as F32, BF16 or F16.")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError("a tensor whose shape does not fit its data")
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape) if raw else torch.empty(shape, dtype=dtype)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file of safetensors, the widest numbers first, so that all lie at multiples of their size."""
    kinds = {dtype: kind for kind, dtype in _SAFETENSORS.items()}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which older releases of transformers ask for
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name that is there twice")
    return found


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
