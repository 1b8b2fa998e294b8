"""Code from outside of the package: how MODULE:NAME is imported, of which file it is, and where it fails."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastbd.base.errors import UserError, chain


class Source(NamedTuple):
    """The file of a module that was imported, as it was then."""

    file: str
    sha256: str
    """Empty where it was imported before this package asked for it, and nobody knows what the file held then."""
    spec: Any
    """The module's own, of which importlib.reload makes another."""


_sources: dict[str, Source] = {}
"""By the names of the modules."""


def imported(kind: str, code: str) -> Any:
    """Return what MODULE:NAME stands for. UserError where that is not to be had, or would be another folder's."""
    _check_spelling(kind, code)
    module, _, attribute = code.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # python -m has it there already, a script has not
    importlib.invalidate_caches()  # the file may have been written a moment ago
    file = Path(here, *module.split("."))
    _check_place(kind, code, file / "__init__.py" if file.is_dir() else file.with_suffix(".py"))
    earlier = sys.modules.get(module)
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            said = f"there is no module {error.name} in {here}, nor is one installed"
        else:
            said = f"{module} imports {error.name}, which is not installed"
    except (Exception, SystemExit) as error:  # a script may end itself
        lines = [(f.f_code.co_filename, n) for f, n in traceback.walk_tb(error.__traceback__) if _is_of_module(f)]
        said = f"{module} fails with {_said(error)}" + (", {}:{}".format(*lines[-1]) if lines else "")
    else:
        _keep_source(module, loaded, earlier is loaded)
        if hasattr(loaded, attribute):
            return getattr(loaded, attribute)
        said = f"module '{module}' has no attribute '{attribute}'"
    raise UserError(f"the {kind} {code} cannot be imported ({said}): put that right, or name another {kind}.")


def _is_of_module(frame: Any) -> bool:
    """Whether a frame runs the lines of a module as it is imported."""
    return frame.f_code.co_name == "<module>"


def _said(error: BaseException) -> str:
    """Return an error's type and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _check_spelling(kind: str, code: str) -> None:
    """Raise a UserError where the name is not spelt MODULE:NAME."""
    module, _, attribute = code.rpartition(":")
    if module.endswith(".py") or "/" in module:
        file = Path(module)
        raise UserError(
            f"the {kind} {code} names a path: name the module, {file.stem}:{attribute}, in the folder of {file.name}."
        )
    if not re.fullmatch(r"[^:.]+(\.[^:.]+)*:\w+", code):
        raise UserError(f"the {kind} {code} is not spelt MODULE:NAME: name the module, as in my:{attribute or 'make'}.")


def _check_place(kind: str, code: str, file: Path) -> None:
    """Raise a UserError where the file is there, and this process has a module of its name from elsewhere."""
    loaded = getattr(sys.modules.get(code.partition(":")[0]), "__file__", None)
    if loaded and file.is_file() and not os.path.samefile(loaded, file):
        raise UserError(
            f"the {kind} {code} is in {file}, and another module of that name, {loaded}, is loaded in this process: "
            "give the file another name, or start another process."
        )


def _keep_source(module: str, loaded: Any, before: bool) -> None:
    """Keep what the module's file holds, where it was loaded, or reloaded, since this was asked last.

    `before`: others had imported it already.
    """
    file, spec = getattr(loaded, "__file__", None), getattr(loaded, "__spec__", None)
    if file and (module not in _sources or _sources[module].spec is not spec):
        unknown = before and module not in _sources
        _sources[module] = Source(file, "" if unknown else _digest(file), spec)


def _digest(file: str) -> str:
    """Return the SHA-256 of a file; of nothing where it is gone."""
    return hashlib.sha256(Path(file).read_bytes() if os.path.isfile(file) else b"").hexdigest()


def source(code: str) -> Source | None:
    """Return the file that MODULE:NAME was imported from; None where this process has not, or where it has no file."""
    return _sources.get(code.partition(":")[0])


def check_unedited(code: str) -> None:
    """Raise a UserError where the file of MODULE:NAME is not what this process has imported."""
    found = source(code)
    if found and found.sha256 and _digest(found.file) != found.sha256:
        raise UserError(
            f"{found.file} has been edited since this process loaded it: start another process, or importlib.reload it."
        )


def told_by_outside_code(error: BaseException) -> str | None:
    """Return a sentence about an error that outside code raised, or met in what it called; None for any other.

    Modules that lie beside one that was named are outside code, too, as are the parts of its package.
    """
    for one in chain(error):
        lines = [(frame.f_globals.get("__name__", ""), frame, n) for frame, n in traceback.walk_tb(one.__traceback__)]
        if own := [line for line in lines if _is_ours(line[0], line[1].f_code.co_filename)]:
            module, frame, number = own[-1]
            return (
                f"{module}, {frame.f_code.co_filename}:{number}, fails with {_said(one)}: mend it there; the functions "
                "of fastbd, called from Python, show the whole traceback."
            )
    return None


def _is_ours(module: str, file: str) -> bool:
    """Whether a module was named, lies beside one that was, or is part of its package."""
    packages = {name.partition(".")[0] for name in _sources}
    folders = {os.path.dirname(each.file) for each in _sources.values()}
    return module.partition(".")[0] in packages or os.path.dirname(file) in folders


def check_call(what: str, code: Any, *given: str, **named: str) -> None:
    """Raise a UserError where the code, which `what` names, cannot be called with arguments of these names."""
    if not callable(code):
        found = f"is of type {type(code).__name__}"
    elif taken := _misfit(code, given, named):
        found = f"takes {taken}"
    else:
        return
    raise UserError(
        f"{what}{_place(code)} {found}: it is called with ({', '.join([*given, *named])}), let it take these."
    )


def check_like(what: str, code: Any, like: Callable) -> None:
    """Raise a UserError where a method of an object, which `what` names, cannot be called as `like` of a class is."""
    _, *known = inspect.signature(like).parameters.values()
    named = {each.name: each.name for each in known if each.kind is each.KEYWORD_ONLY}
    check_call(what, code, *(each.name for each in known if each.name not in named), **named)


def _misfit(code: Callable, given: tuple[str, ...], named: dict[str, str]) -> str | None:
    """Return the parameters of code that cannot be called with these arguments; None where it can."""
    try:
        signature = inspect.signature(code)
    except (TypeError, ValueError):  # code in C does not tell
        return None
    try:
        signature.bind(*given, **named)
    except TypeError:
        return f"({', '.join(signature.parameters)})"
    return None


def _place(code: Any) -> str:
    """Return ", FILE:LINE," of a function or a class; nothing of what has no lines."""
    try:
        return f", {inspect.getsourcefile(code)}:{inspect.getsourcelines(code)[1]},"
    except (OSError, TypeError):
        return ""
