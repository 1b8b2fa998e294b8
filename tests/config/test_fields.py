"""Marks on the fields of flags, and what is collected by them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Annotated, Literal

import numpy as np
import pytest

from fastbd.config.fields import SHARE, Flag, as_told, flags_of, marked, outside, typed
from fastbd.config.flags import IMMATERIAL, TRAINING, CleanConfig
from fastbd.report.export import FLAGS


@dataclass(frozen=True)
class One:
    plain: int = 0
    share: Annotated[float | None, Flag(range=SHARE, reuse=True)] = None
    shares: Annotated[tuple[float, ...], Flag(range=SHARE)] = ()


@dataclass(frozen=True)
class Two(One):
    other: Annotated[str, Flag(reuse=True)] = ""


def test_marks_are_read_from_the_fields_of_a_class_and_of_its_bases():
    assert flags_of(Two)["share"] == Flag(range=SHARE, reuse=True) and flags_of(Two)["plain"] == Flag()
    assert marked("reuse", One) == {"share"} and marked("reuse", One, Two) == {"share", "other"}


def test_a_number_or_one_of_several_may_be_outside_of_a_range_and_words_are_not():
    assert outside(One, "share", 1.5) == SHARE and outside(One, "shares", (0.5, 2.0)) == SHARE
    assert not outside(One, "share", None) and not outside(One, "shares", (0.5,)) and not outside(One, "plain", -1)


def test_a_whole_number_is_taken_for_a_float_and_becomes_one():
    """As a resumed run is compared with its checkpoint, types included."""
    assert type(typed(float, 1)) is float and type(typed(float | None, 1)) is float and type(typed(int, 1)) is int


class Word(StrEnum):
    ONE = "mmcl"


class Number(IntEnum):
    TWO = 2


def test_values_are_plain_ones_of_the_type_itself():
    """As a checkpoint holds them, which is read without classes of anybody's."""
    for hint, value, plain in (
        (str, Word.ONE, "mmcl"), (Literal["mmcl", "ssl"], Word.ONE, "mmcl"), (int, Number.TWO, 2),
        (float, Number.TWO, 2.0), (float, np.float64(0.5), 0.5), (Literal[1, 2], 1, 1),
        (tuple[str, ...], [Word.ONE], ("mmcl",)),
    ):  # fmt: skip
        found = typed(hint, value)
        assert found == plain and type(found) is type(plain)
    for hint, value in ((Literal[1, 2], True), (Literal[1, 2], 2.0), (float, 10**400), (int, True), (str, 7)):
        with pytest.raises(TypeError):
            typed(hint, value)


def test_python_gives_a_flag_as_the_command_line_does():
    assert as_told(str, 7) == "7" and as_told(int | str, 7) == 7 and as_told(str | None, 7) == "7"
    assert as_told(tuple[str, ...], [1, "b"]) == ("1", "b") and as_told(tuple[int, ...] | None, 3) == (3,)
    with pytest.raises(TypeError, match="a list"):
        typed(tuple[int, ...], as_told(tuple[int, ...], {1, 2}))


def test_a_flag_without_marks_makes_another_run():
    """What is forgotten is safe: no other flag than these may change in a study's run, or between its resumptions."""
    assert {"lr", "seed", "data", "tau", "epochs"}.isdisjoint(IMMATERIAL) and "device" in IMMATERIAL
    assert {"lr", "seed"} <= marked("reuse", *TRAINING) and {"batch_size", "tau"}.isdisjoint(marked("reuse", *TRAINING))


def test_columns_of_a_report_have_places_of_their_own():
    places = [flag.column for flag in flags_of(CleanConfig).values() if flag.column]
    assert sorted(places) == list(range(1, len(FLAGS) + 1))
