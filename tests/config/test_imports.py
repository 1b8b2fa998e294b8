"""Code from outside of the package: what is told of it, and when."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from fastbd.base.errors import UserError
from fastbd.config import cards
from fastbd.config.flags import PretrainConfig
from fastbd.config.imports import check_like, source, told_by_outside_code


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(text) makes the module mine in the current folder; it is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two versions may be of one size, written in one second

    def written(text: str) -> Path:
        Path("mine.py").write_text(text)
        sys.modules.pop("mine", None)
        return tmp_path / "mine.py"

    yield written
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("trigger", "def it(spec, images): ...", "{file}:1, takes (spec, images): it is called with (spec, seed, ids,"),
        (
            "evaluator",
            "\ndef it(towers, data, *, k): ...",
            "{file}:2, takes (towers, data, k): it is called with (towers",
        ),
        ("method", "class it:\n    def __init__(self): ...", "{file}:1, takes (): it is called with (config), let it"),
        ("objective", "it = 5", "in {file}, is of type int: it is called with (config), let it take these."),
    ],
)
def test_what_could_not_be_called_is_refused_where_it_is_loaded(kind, text, said, write):
    file = write(text)
    with pytest.raises(UserError) as error:
        cards.check(kind, "mine:it")
    assert f"the {kind} mine:it, {said.format(file=file)}" in str(error.value)


@pytest.mark.parametrize(
    "text", ["it = print", "def it(*given): ...", "class it:\n    def __init__(self, a, b=1): ..."]
)
def test_what_can_be_called_is_taken_as_it_is(text, write):
    write(text).rename("mine-own.py")
    assert callable(cards.load("model", "mine-own:it"))
    del sys.modules["mine-own"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (":make", "is not spelt MODULE:NAME: name the module, as in my:make."),
        ("mine:", "is not spelt MODULE:NAME"),
        (".mine:make", "is not spelt MODULE:NAME"),
        ("a:b:c", "is not spelt MODULE:NAME"),
        ("mine.py:make", "names a path: name the module, mine:make, in the folder of mine.py."),
        ("./mine.py:make", "names a path: name the module, mine:make, in the folder of mine.py."),
        ("sub/mine:make", "names a path: name the module, mine:make,"),
        ("mine:gone", "cannot be imported (module 'mine' has no attribute 'gone')"),
    ],
)
def test_a_name_that_is_spelt_wrong_is_told_how_it_is_spelt(name, said, write):
    write("make = print\n")
    with pytest.raises(UserError) as error:
        cards.check("objective", name)
    assert str(error.value).startswith(f"the objective {name} {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import sys\nsys.exit(3)", "mine fails with SystemExit: 3, {file}:2"),
        ("def f(): None.x\n\nf()", "mine fails with AttributeError: 'NoneType' object has no attribute 'x', {file}:3"),
        ("def f(:", "mine fails with SyntaxError: "),
    ],
)
def test_a_module_that_fails_is_told_with_its_line(text, said, write):
    file = write(text)
    with pytest.raises(UserError) as error:
        cards.check("objective", "mine:make")
    assert said.format(file=file) in str(error.value)


def raised(code: Callable) -> BaseException:
    with pytest.raises(BaseException) as error:  # noqa: PT011
        code()
    return error.value


def test_an_error_within_outside_code_is_told_with_the_last_line_of_it(write):
    file = write("import json, sys\n\ndef make(text):\n    return json.loads(text)\n\ndef ends():\n    sys.exit()\n")
    make, ends = cards.load("objective", "mine:make"), importlib.import_module("mine").ends
    met = raised(lambda: make("{"))
    assert f"mine, {file}:4, fails with JSONDecodeError: Expecting property" in str(told_by_outside_code(met))
    assert f"mine, {file}:7, fails with SystemExit: mend it there" in str(told_by_outside_code(raised(ends)))
    later = RuntimeError("a step has failed")
    later.__cause__ = met
    assert told_by_outside_code(later) == told_by_outside_code(met)
    assert told_by_outside_code(raised(lambda: 1 / 0)) is None


def test_what_lies_beside_outside_code_or_in_its_package_is_outside_code(write, tmp_path):
    write("from beside import fails\n\ndef make(config):\n    return fails()\n")
    Path("beside.py").write_text("def fails():\n    return 1 / 0\n")
    Path("parts").mkdir()
    Path("parts/__init__.py").write_text("from .inner import make\n")
    Path("parts/inner.py").write_text("def make(config):\n    return 1 / 0\n")
    for name, file, line in (("mine", "beside.py", 2), ("parts", "parts/inner.py", 2)):
        make = cards.load("objective", f"{name}:make")
        said = str(told_by_outside_code(raised(partial(make, None))))
        assert f"{tmp_path / file}:{line}, fails with ZeroDivisionError" in said
    for name in ("beside", "parts", "parts.inner"):
        sys.modules.pop(name, None)


def test_a_package_of_the_current_folder_is_not_taken_for_another_that_is_loaded(write, tmp_path):
    loaded = tmp_path / "other/mine.py"
    loaded.parent.mkdir()
    write("")
    Path("mine.py").rename(loaded)
    sys.path.insert(0, str(loaded.parent))
    importlib.import_module("mine")
    Path("mine").mkdir()
    Path("mine/__init__.py").write_text("def make(config): return 1\n")
    with pytest.raises(UserError, match=r"mine/__init__.py, and another module of that name, .*other/mine.py, is"):
        cards.load("objective", "mine:make")


def test_of_a_module_that_was_imported_before_nobody_knows_what_its_file_held(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "early.py"
    file.write_text("def make(config): return 1\n")
    importlib.import_module("early")
    file.write_text("def make(config): return 2\n")
    assert cards.load("objective", "early:make")(None) == 1 and source("early:make").sha256 == ""
    del sys.modules["early"]


def test_static_methods_and_those_of_classes_are_called_as_others():
    class Known:
        def rows(self, epoch, rows): ...
        def variant(self, epoch): ...

    class Mine(Known):
        @staticmethod
        def rows(epoch, rows): ...
        @classmethod
        def variant(cls, epoch): ...

    for name in ("rows", "variant"):
        check_like(name, getattr(Mine(), name), getattr(Known, name))
    with pytest.raises(UserError, match=r"rows.* takes \(epoch, rows\): it is called with \(epoch, rows, more\)"):
        check_like("rows", Mine().rows, lambda self, epoch, rows, more: None)


SETTINGS = """
from __future__ import annotations
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

class Gate(Enum):
    SHUT = 0

class Mine:
    def __init__(self, config): ...

    @dataclass(frozen=True)
    class Settings:
        fine: Literal["a", "b"] | None = None
        several: tuple[int, ...] = (1, 2)
        where: Path = Path()
        own: {}
"""


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("list[int] = field(default_factory=list)", "have the field 'own' of type list[int], which no flag can have"),
        (
            "Gate = Gate.SHUT",
            "have the field 'own' of type mine.Gate, which no flag can have: make it int, float, bool",
        ),
        ("tuple[int, str] = (1, 'a')", "have the field 'own' of type tuple[int, str], which no flag can have"),
        ("Any = None", "have the field 'own' of type Any, which no flag can have"),
        ("float | dict = 1.0", "have the field 'own' of type float | dict, which no flag can have"),
        ("int = field(default=3, init=False)", "have the field 'own' with init=False, which no flag could set"),
        ("int = 'many'", "have the default 'many' for 'own': it must be a whole number."),
        ("Gone = 1", "have a type that is not there (name 'Gone' is not defined): import it."),
    ],
)
def test_settings_that_no_flag_could_have_are_refused_with_the_field(own, said, write):
    write(SETTINGS.format(own))
    with pytest.raises(UserError) as error:
        cards.card("method", "mine:Mine")
    assert f"the Settings of mine:Mine {said}" in str(error.value)


def test_settings_of_all_types_of_flags_are_taken(write):
    write(SETTINGS.format("bool | str | tuple[float, ...] = field(default_factory=lambda: (0.5,))"))
    assert cards.card("method", "mine:Mine").settings


def test_the_code_that_a_name_meant_is_recorded_and_another_is_refused_in_the_same_process(write):
    file = write("def make(config): return 1\n")
    config = PretrainConfig(objective="mine:make")
    cards.check_chosen(config)
    was = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text("def make(config): return 2\n")
    with pytest.raises(UserError, match=r"mine.py has been edited since this process loaded it: start another process"):
        cards.check_chosen(config)
    assert cards.recorded({"mine:make": "objective", "mmcl": "objective"})["mine:make"]["sha256"] == was
    importlib.reload(sys.modules["mine"])
    cards.check_chosen(config)
    assert cards.load("objective", "mine:make")(config) == 2
    told = cards.recorded({"mine:make": "objective"})
    assert told["mine:make"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest() != was
    cards.remember(told)
    assert cards.facts("objective", "mine:make").title == "mine:make"
