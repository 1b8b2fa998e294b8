"""Marks on the fields of flags, and what is collected by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastbd.config.fields import SHARE, Flag, flags_of, marked, outside, typed
from fastbd.config.flags import IMMATERIAL, TRAINING, CleanConfig
from fastbd.report.write import FLAGS


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


def test_a_flag_without_marks_makes_another_run():
    """What is forgotten is safe: no other flag than these may change in a study's run, or between its resumptions."""
    assert {"lr", "seed", "data", "tau", "epochs"}.isdisjoint(IMMATERIAL) and "device" in IMMATERIAL
    assert {"lr", "seed"} <= marked("reuse", *TRAINING) and {"batch_size", "tau"}.isdisjoint(marked("reuse", *TRAINING))


def test_columns_of_a_report_have_places_of_their_own():
    places = [flag.column for flag in flags_of(CleanConfig).values() if flag.column]
    assert sorted(places) == list(range(1, len(FLAGS) + 1))
