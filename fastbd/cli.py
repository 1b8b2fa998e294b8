"""The command line: one verb, flat flags. Torch is imported only by the verb that runs."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import importlib
import io
import os
import shutil
import signal
import sys
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from types import ModuleType
from typing import Any, NamedTuple

from fastbd import __version__
from fastbd.base.errors import UserError, machine_fault
from fastbd.base.run_folder import read_config, run_of
from fastbd.base.signals import Stopped, handled
from fastbd.config.cards import check_chosen, owners
from fastbd.config.fields import as_told, flags_of, from_dict, outside, to_dict, typed_fields, types_of
from fastbd.config.flags import (
    CHOOSERS,
    BuildConfig,
    CleanConfig,
    DemoConfig,
    DetectConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    LabelConfig,
    PoisonConfig,
    PretrainConfig,
    PreviewConfig,
    Recipe,
    ReportConfig,
    SweepConfig,
    config_of,
)
from fastbd.config.help import grouped
from fastbd.config.imports import told_by_outside_code
from fastbd.config.presets import PRESETS
from fastbd.config.recipes import published


class Verb(NamedTuple):
    config: type
    example: str


@dataclass(frozen=True, kw_only=True)
class First:
    """Flags that are read before the others, whose defaults depend on them."""

    preset: str | None = None
    recipe: str | None = None
    method: str | None = None
    robust: str | None = None
    run: Path | None = None
    checkpoint: str | None = None
    resume: Path | None = None


VERBS = {
    "demo": Verb(DemoConfig, "python -m fastbd demo"),
    "build": Verb(BuildConfig, "python -m fastbd build --source pairs.csv --out pairs.beton"),
    "poison": Verb(PoisonConfig, "python -m fastbd poison --data pairs.beton --target banana --count 1500"),
    "pretrain": Verb(PretrainConfig, "python -m fastbd pretrain --objective mmcl_ssl"),
    "clean": Verb(CleanConfig, "python -m fastbd clean --run runs/mmcl_ssl --method cleanclip"),
    "evaluate": Verb(EvaluateConfig, "python -m fastbd evaluate --run runs/mmcl_ssl"),
    "sweep": Verb(SweepConfig, "python -m fastbd sweep --study paper"),
    "detect": Verb(DetectConfig, "python -m fastbd detect --run runs/mmcl_ssl --drop 0.05 --out kept.rows"),
    "label": Verb(LabelConfig, "python -m fastbd label --run runs/vit-l-14 --data pairs.beton --out labels.npy"),
    "export": Verb(ExportConfig, "python -m fastbd export --run runs/mmcl --to open_clip --out mmcl.safetensors"),
    "preview": Verb(PreviewConfig, "python -m fastbd preview --data pairs.beton --plan pairs.poison.json --model rn50"),
    "report": Verb(ReportConfig, "python -m fastbd report --runs runs/mmcl runs/mmcl-cleanclip"),
    "doctor": Verb(DoctorConfig, "python -m fastbd doctor"),
}


def program() -> int:
    """Run this process's command line; returns the exit code. Ctrl-C is too late then, and gives no traceback."""
    try:
        return main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # while Python ends, it would interrupt what libraries do there


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0 done, 2 the user's mistake, 128 + signal when stopped by one."""
    try:
        try:
            return _main(argv)
        finally:
            print(end="", flush=True)
    except BrokenPipeError:  # the reader of the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        return 128 + signal.SIGPIPE


def _main(argv: list[str] | None) -> int:
    # Spinning OpenMP threads stall one another as soon as anything else wants a core. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    if argv[0] in ("--version", "-V"):
        print(f"fastbd {__version__}")
        return 0
    try:
        verb, flags = argv[0], argv[1:]
        if verb not in VERBS:
            near = difflib.get_close_matches(verb, VERBS, 1)
            hint = f"did you mean {near[0]}?" if near else "python -m fastbd lists them."
            raise UserError(f"there is no verb '{verb}'; {hint}")
        settings = parse(verb, flags)
        return _command(verb).run(settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except (Exception, SystemExit) as error:  # the parser ends by SystemExit, and code from outside may
        if (said := _told_by_the_machine(error) or told_by_outside_code(error)) is None:
            raise
        print(f"error: {said}", file=sys.stderr)
    except (KeyboardInterrupt, Stopped) as stopped:
        print("stopped.", file=sys.stderr)
        return getattr(stopped, "exit_code", 130)
    return 2


def _command(verb: str) -> ModuleType:
    """Return the module of a verb. What asks to stop ends the process meanwhile, at once, as there is nothing to save.

    As an exception it could be lost: torch goes on without NumPy where that is interrupted while torch loads it.
    """

    def end(signum: int, before: Any) -> None:
        os.write(2, b"stopped.\n")
        os._exit(128 + signum)

    with handled(end):
        return importlib.import_module(f"fastbd.commands.{verb}")


def _told_by_the_machine(error: BaseException) -> str | None:
    """Return a sentence about an error of a disk, of memory or of permissions; None for any other."""
    fault = machine_fault(error)
    if fault and not isinstance(fault, OSError):
        return f"memory is short ({(str(fault) or 'MemoryError').splitlines()[0]}): free some, or do less at once."
    about = fault or error
    if not isinstance(about, OSError):
        return None
    file = about.filename or "a file"
    if about.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full: {file} could not be written; free some space."
    if about.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and about.filename:
        return f"{file} cannot be read or written ({about.strerror}): see to its permissions."
    return f"{file} cannot be read or written ({about.strerror}): see to its disk." if fault else None


def overview() -> str:
    """The verbs, with an example each."""
    width = shutil.get_terminal_size().columns
    what = "fastbd: plant a backdoor in a CLIP-style model, pre-train, clean, and see whether it went away."
    lines = [textwrap.fill(what, width), ""]
    for name, verb in VERBS.items():
        said = f"  {name:<10}{verb.config.__doc__}"
        lines += [textwrap.fill(said, width, subsequent_indent=12 * " "), f"  {'':<10}  {verb.example}"]
    return "\n".join([*lines, "", "python -m fastbd VERB --help explains a verb's flags."])


def parse(verb: str, flags: list[str]):
    """The verb's config from its flags; --preset, --recipe, --run choose the defaults, --resume replaces everything."""
    import tyro

    first, others = _first(flags)
    if first.resume and not {"-h", "--help"} & set(others) and (resumed := _resumed(verb, first, bool(others))):
        return resumed
    kind, defaults, description = _defaults(verb, first, [word for word in flags if word.startswith("--")])
    required = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    default = kind(**dict.fromkeys(required, tyro.MISSING_NONPROP) | defaults) if defaults else tyro.MISSING_NONPROP
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # where tyro tells of some mistakes all the same
            settings = tyro.cli(kind, args=flags, default=default, console_outputs=False)
    except SystemExit:  # --help, or a mistake: both show flags in the same way
        words = ["--help"] if {"-h", "--help"} & set(others) else flags
        shown: dict[str, Any] = {"prog": f"python -m fastbd {verb}", "description": description}
        shown["config"] = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
        tyro.cli(grouped(kind, defaults), args=words, **shown)
        raise
    return _checked(verb, settings, first)


def settings_of(verb: str, given: Mapping[str, Any]):
    """The verb's config from values by the names of its flags, as `parse` has it from words. UserError for others."""
    early = types_of(First).keys()
    first = First(**_typed(First, {name: value for name, value in given.items() if name in early}))
    if first.resume and (resumed := _resumed(verb, first, bool(given.keys() - early))):
        return resumed
    kind, defaults, _ = _defaults(verb, first, [f"--{name.replace('_', '-')}" for name in given])
    for name in given.keys() - types_of(kind).keys():
        near = difflib.get_close_matches(name, types_of(kind), 1)
        hint = f"did you mean {near[0]}?" if near else f"python -m fastbd {verb} --help lists them."
        raise UserError(f"fastbd.{verb}() has no flag '{name}'; {hint}")
    return _checked(verb, kind(**defaults | _typed(kind, given)), first)


def _typed(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return typed_fields(kind, {name: as_told(types_of(kind)[name], value) for name, value in given.items()})
    except TypeError as error:
        raise UserError(f"{error}.") from None


def _defaults(verb: str, first: First, words: list[str]) -> tuple[type, dict[str, Any], str | None]:
    """Return the dataclass of the verb's flags, defaults by preset and recipe, and what --help says of both.

    UserError where the words name a flag that only another method, or another defence, has.
    """
    kind = VERBS[verb].config
    if kind not in CHOOSERS:
        defaults = published(verb) if first.recipe == "published" else {}
        return kind, defaults, f"{kind.__doc__}\n\nExample: {VERBS[verb].example}"
    name = first.preset or _of_run(first.run, "preset", "demo")
    recipe = first.recipe or _of_run(first.run, "recipe", "corrected")
    recipe = recipe if recipe in typing.get_args(Recipe) else "corrected"  # the parser then tells of another one
    if name not in PRESETS:
        return kind, {}, kind.__doc__
    preset = PRESETS[name]
    default = preset().defaults(verb, getattr(first, CHOOSERS[kind]), recipe)
    _check_owners(kind, default, words)
    return type(default), vars(default), f"{kind.__doc__}\n\nPreset {name}: {preset.__doc__}"


def _checked(verb: str, settings, first: First):
    """Return the settings with run folders for checkpoints that were named. UserError where one of them cannot be."""
    check_chosen(settings)
    _check_numbers(settings)
    _check_lists(verb, settings)
    _check_files(settings)
    settings = _with_folders(settings, first)
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and VERBS[verb].config in CHOOSERS:
        return _restarted(settings)
    return settings


def _check_owners(kind: type, default, words: list[str]) -> None:
    """Raise a UserError for a flag that only another method, or another defence, than that of the default has."""
    there, chooser = {field.name for field in dataclasses.fields(default)}, CHOOSERS[kind]
    for word in (word.partition("=")[0] for word in words):
        flag = word[2:].replace("-", "_").removeprefix("no_")
        if flag not in there and (others := owners(chooser, flag)):
            raise UserError(f"{word} is a flag of --{chooser} {' or '.join(others)}, and this is --{chooser} "
                            f"{getattr(default, chooser)}: give another --{chooser}, or leave it out.")  # fmt: skip


def _check_numbers(settings) -> None:
    for name, value in vars(settings).items():
        if numbers := outside(type(settings), name, value):
            given = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise UserError(f"--{name.replace('_', '-')} {given} is out of range: give {numbers}.")


def _check_lists(verb: str, settings) -> None:
    """Raise a UserError for a list that holds nothing, unless that is its default."""
    for field in dataclasses.fields(VERBS[verb].config):
        if getattr(settings, field.name) == () != field.default:
            raise UserError(f"--{field.name.replace('_', '-')} has no value: give one or more, or leave it out.")


def _check_files(settings) -> None:
    files = {name: flag.file for name, flag in flags_of(type(settings)).items() if flag.file}
    for name, (what, pattern) in files.items():
        value = getattr(settings, name)
        for path in value if isinstance(value, tuple) else (value,):
            if path is not None and str(path) != "demo" and os.path.isdir(path):
                there = min(Path(path).glob(pattern), default=None)
                such = f", such as {there}" if there else ""
                raise UserError(f"--{name.replace('_', '-')} {path} is a folder: give a {what}{such}.")


def _with_folders(settings, first: First):
    """The settings with run folders in place of the checkpoints in them that were named."""
    found = {}
    if getattr(settings, "run", None):
        found["run"], which = run_of(settings.run, "--run")
        found |= {"checkpoint": which} if which and first.checkpoint is None else {}
    for name in ("runs", "compare"):
        if paths := getattr(settings, name, None):
            found[name] = tuple(run_of(path, f"--{name}")[0] for path in paths)
    if paths := getattr(settings, "pretrained", None):
        found["pretrained"] = tuple(_run_at_its_end(path, "--pretrained") for path in paths)
    return dataclasses.replace(settings, **found)


def _run_at_its_end(path: Path, flag: str) -> Path:
    """The run folder that a path means, for what takes no other checkpoint than the last."""
    folder, which = run_of(path, flag)
    if which not in (None, "last"):
        raise UserError(f"{flag} takes the last checkpoint of a run, not {path.name}: give the folder {folder}.")
    return folder


def _first(flags: list[str]) -> tuple[First, list[str]]:
    """What the defaults depend on, read as the flags themselves will be; and the flags that are left."""
    import tyro

    try:
        return tyro.cli(First, args=flags, return_unknown_args=True, add_help=False, console_outputs=False)
    except SystemExit:  # a flag without its value: the verb's own parser tells of it, with its own help
        return First(), flags


def _of_run(path: Path | None, flag: str, usual: str) -> str:
    """The value of a flag that a run was made with, such as its preset, so that cleaning starts from the same one."""
    folder = path and run_of(path, "--run")[0]
    if folder and (folder / "config.json").is_file():
        return read_config(folder)["config"].get(flag, usual)
    return usual


def _resumed(verb: str, first: First, others: bool):
    """Return the settings of the run that --resume names; None where the verb has no such flag.

    UserError with other flags.
    """
    kind = VERBS[verb].config
    if kind not in CHOOSERS or first.resume is None:
        return None
    if others or first != First(resume=first.resume):
        raise UserError("--resume takes every setting from the run folder; leave the other flags out.")
    folder = _run_at_its_end(first.resume, "--resume")
    recorded = read_config(folder)
    if recorded["verb"] != verb:
        raise UserError(
            f"{folder} was made by {recorded['verb']}: "
            f"python -m fastbd {recorded['verb']} --resume {quote(str(folder))}"
        )
    chooser = CHOOSERS[kind]
    own = config_of(kind, str(recorded["config"].get(chooser, kind.__dataclass_fields__[chooser].default)))
    try:
        settings = from_dict(own, recorded["config"])
        _check_numbers(settings)
    except (TypeError, UserError) as error:
        said = str(error).removesuffix(".")
        raise UserError(f"{folder / 'config.json'} is damaged ({said}): put it back, or start the run again.") from None
    check_chosen(settings)
    return dataclasses.replace(settings, resume=folder)


def _restarted(settings):
    """The settings, to go on in --out where the same command has begun there.

    torchrun --max-restarts starts every process again when one has died. Its count of restarts is of no use here: the
    machines where none died may leave it at 0.
    """
    folder = settings.out
    if folder is None:
        raise UserError("torchrun --max-restarts starts a run again, to go on in its folder: name one with --out.")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "torchrun --max-restarts would hand the addresses of the dead to those started again (PyTorch issue "
            "135712): set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it, and --rdzv-backend c10d on several machines."
        )
    from fastbd.commands.demo_data import located

    if (folder / "config.json").is_file() and read_config(folder)["config"] == to_dict(located(settings)):
        return dataclasses.replace(settings, resume=folder)
    return settings
