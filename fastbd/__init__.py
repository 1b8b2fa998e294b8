"""Plant a backdoor in a CLIP-style model, pre-train, clean, and see whether it went away.

The verbs of the command line as functions, for scripts and notebooks. They take the same flags by the same names, say
the same while they work, and return what was made; a mistake is a fastbd.UserError with a sentence that tells it.

    trained = fastbd.pretrain(objective="mmcl_ssl", epochs=2)
    cleaned = fastbd.clean(trained, method="cleanclip")
    print(cleaned.metrics[-1]["top1"], cleaned.metrics[-1]["asr"])
    model = fastbd.load(cleaned).model
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbd.base.errors import UserError

if TYPE_CHECKING:
    import torch

    from fastbd.base.evaluation import Evaluation
    from fastbd.base.run_folder import Run
    from fastbd.evals.loaded import Loaded

__all__ = ["UserError", "clean", "evaluate", "export", "load", "pretrain", "sweep"]
__version__ = "0.1.0"


def pretrain(**flags: Any) -> Run:
    """Pre-train as `fastbd pretrain` does with these flags, such as objective="mmcl"; returns the run, read back."""
    from fastbd.commands import pretrain

    return _trained(pretrain, "pretrain", flags)


def clean(run: Run | Path | str | None = None, **flags: Any) -> Run:
    """Clean a run's model as `fastbd clean` does with these flags, such as method="par"; returns the cleaning run.

    Without `run`, flags are resume=FOLDER, the cleaning to go on with.
    """
    from fastbd.commands import clean

    return _trained(clean, "clean", {"run": run, **flags})


def evaluate(run: Run | Path | str, **flags: Any) -> list[Evaluation]:
    """Evaluate a run's model as `fastbd evaluate` does; returns the rows that were added to its metrics.jsonl."""
    from fastbd.commands import evaluate

    return evaluate.measured(_settings("evaluate", {"run": run, **flags}))


def export(run: Run | Path | str, **flags: Any) -> Path:
    """Write a run's model for another program as `fastbd export` does; returns the path that was written."""
    from fastbd.commands import export

    settings = _settings("export", {"run": run, **flags})
    export.run(settings)
    return settings.out.absolute()


def sweep(study: Path | str | None = None, **flags: Any) -> list[Run]:
    """Run a study as `fastbd sweep` does with these flags; returns its runs that have a folder."""
    from fastbd.base.run_folder import find
    from fastbd.commands import sweep

    settings = _settings("sweep", {"study": study, **flags})
    folder = sweep.open_ledger(settings).folder
    if sweep.run(settings) > 1:
        raise KeyboardInterrupt(f"stopped; go on with fastbd.sweep(out={str(folder)!r})")
    return find([folder.absolute() / "runs"])


def load(run: Run | Path | str, checkpoint: str | int | None = None, device: torch.device | str = "auto") -> Loaded:
    """Return a run's model in eval mode on a device, with its image transform and its tokenizer.

    `checkpoint` is last, or the number of an epoch.
    """
    from fastbd.base.dist import join
    from fastbd.commands.evaluate import open_model
    from fastbd.evals.loaded import Loaded

    asked = _settings("evaluate", {"run": run, "checkpoint": checkpoint, "device": device})
    _, model = open_model(asked.run, asked.checkpoint, join(asked.device).device)
    return Loaded(model.eval())


def _trained(command: Any, verb: str, flags: dict[str, Any]) -> Run:
    from fastbd.base.run_folder import read

    code, folder = command.train(_settings(verb, flags))
    if code:
        raise KeyboardInterrupt(f"stopped; go on with fastbd.{verb}(resume={str(folder)!r})")
    return read(folder.absolute())  # it stays this run where the working directory changes


def _settings(verb: str, flags: dict[str, Any]) -> Any:
    """Return the verb's flags as its command line would have them, with the same defaults and checks.

    None leaves a flag out.
    """
    from fastbd import cli

    return cli.settings_of(verb, {name: _plain(value) for name, value in flags.items() if value is not None})


def _plain(value: Any) -> Any:
    """Return a value as flags have it: the folder of a run, a path, a device's name, the numbers of an array."""
    import torch

    from fastbd.base.run_folder import Run

    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    if isinstance(value, Run):
        return value.path
    if isinstance(value, PathLike):
        return Path(value)
    if isinstance(value, torch.device):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else value  # of NumPy or torch
