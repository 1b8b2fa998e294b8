"""Single flipped bits in what a run has written: each is found, or changes nothing.

Without a checksum a changed digit of a .jsonl file, of result.json or of env.json cannot be told from another number,
nor a changed number of safetensors. What decides how a run is resumed, config.json and plan.json, is compared with its
checkpoint; of config.json some settings may change, such as the device and the places of files.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from soak import small
from soak.tally import SAME, SENTENCE, UNTOLD, Tally, main

from fastbd import cli
from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.base.run_folder import find, read_config
from fastbd.models.weight_files import read_file
from fastbd.training import checkpoint, resume

WORLD = World(0, 1, torch.device("cpu"))
SUITE_SHARE = 0.005
FLIPS, RESUMES = 1000, 20
RUN = (
    "pretrain --data train.beton --plan train.poison.json --eval-data val.beton --model tiny-rn --templates demo "
    "--batch-size 24 --epochs 2 --save-every 1 --device cpu --out run"
)


def inject(share: float, seed: int, folder: Path) -> Iterator[Tally]:
    """Yield the ends of flips in each kind of file of a small run in `folder`."""
    drawn, whole = random.Random(seed), _run(folder)
    flips = max(1, round(share * FLIPS))
    for name, how, read, other in (
        ("ckpt_last.pt", "loaded", lambda run: _numbers(checkpoint.load(run / "ckpt_last.pt")), "other content"),
        ("weights.pt", "loaded", lambda run: _numbers(read_file(run / "weights.pt")), "other content"),
        ("plan.json", "compared by --resume", _resumed, "other content"),
        ("config.json", "compared by --resume", _resumed, UNTOLD),
        ("env.json", "read by report", _reported, UNTOLD),
        ("metrics.jsonl", "read by report", _reported, UNTOLD),
        ("log.jsonl", "read by report", _reported, UNTOLD),
        ("result.json", "read by report", _reported, UNTOLD),
    ):
        tally, expected = Tally(f"a flipped bit in {name}", f"one random bit, then the file is {how}"), read(whole)
        for _ in range(flips):
            _once(tally, drawn, whole / name, read, expected, other)
        yield tally
    tally = Tally(
        "a flipped bit in the last checkpoint, then --resume",
        "one random bit; the end, compared with the undisturbed one",
    )
    for k in range(max(1, round(share * RESUMES))):
        run = shutil.copytree(whole, folder / f"resumed-{k}")
        _flip(drawn, run / "ckpt_last.pt")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            code = cli.main(["pretrain", "--resume", str(run)])
        same = code == 0 and _end(run) == _end(whole)
        tally.count(SAME if same else SENTENCE if code == 2 else "another end", said.getvalue())
        shutil.rmtree(run)
    yield tally


def _once(
    tally: Tally, drawn: random.Random, path: Path, read: Callable[[Path], object], expected: object, other: str
) -> None:
    """Flip a bit of the file and count what `read` makes of its folder; content that is not `expected` is `other`."""
    content, run = path.read_bytes(), path.parent
    bit = _flip(drawn, path)
    try:
        got = read(run)
        tally.count(SAME if got == expected else other, f"{path.name}, bit {bit}")
    except UserError as error:
        named = str(run) in str(error) and "\n" not in str(error)
        tally.count(SENTENCE if named else "a sentence without the file", f"bit {bit}: {error}")
    except Exception as error:  # the fault that is looked for
        tally.count("traceback", f"{path.name}, bit {bit}: {error!r}")
    finally:
        path.write_bytes(content)


def _flip(drawn: random.Random, path: Path) -> int:
    content = bytearray(path.read_bytes())
    bit = drawn.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return bit


def _resumed(run: Path) -> tuple:
    """Return the settings and the step of the run that is resumed, as the command line reads its folder."""
    settings = cli.parse("pretrain", ["--resume", str(run)])
    return settings, read_config(run), resume.resumed(settings, WORLD)["step"]


def _reported(run: Path) -> list:
    """Return the run as report reads it."""
    return find([run])


def _numbers(state: dict) -> bytes:
    tensors = state["model"] | state.get("method", {})
    return pickle.dumps([(name, value.numpy().tobytes()) for name, value in tensors.items()] + [state.get("step")])


def _end(run: Path) -> bytes:
    return _numbers(checkpoint.load(run / "ckpt_last.pt"))


def _run(folder: Path) -> Path:
    """Return a run with its weights beside it."""
    small.write_data(folder)
    small.fastbd(folder, RUN)
    torch.save({"model": checkpoint.load(folder / "run/ckpt_last.pt")["model"]}, folder / "run/weights.pt")
    return folder / "run"


if __name__ == "__main__":
    main("flips_states", inject)
