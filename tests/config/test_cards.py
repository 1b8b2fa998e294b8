"""Cards: what can be named, which flags go with a name, and what is told where a name is wrong."""

from __future__ import annotations

import dataclasses

import pytest

from fastbd import cli
from fastbd.base.errors import UserError
from fastbd.config import cards
from fastbd.config.fields import flags_of, from_dict, to_dict
from fastbd.config.flags import CleanConfig, PretrainConfig, config_of
from fastbd.config.presets import PRESETS


@pytest.mark.parametrize("kind", ["method", "robust", "objective", "trigger"])
def test_the_code_of_each_card_is_there(kind):
    for name in cards.KINDS[kind]:
        assert callable(cards.load(kind, name)), name


def test_what_is_drawn_together_looks_different():
    markers, colours = ([c.marker for c in cards.METHODS.values()], [c.colour for c in cards.OBJECTIVES.values()])
    assert len(set(markers)) == len(markers) and len(set(colours)) == len(colours) and all((*markers, *colours))


def test_each_flag_with_a_choice_has_a_table():
    choices = {flag.choice for verb in cli.VERBS.values() for flag in flags_of(verb.config).values()}
    assert choices - {""} == cards.KINDS.keys()


def test_outside_code_is_drawn_the_same_each_time_and_as_it_says():
    card = cards.facts("method", "some_pkg.mine:Mine")
    assert card == cards.facts("method", "some_pkg.mine:Mine") and card.title == "some_pkg.mine:Mine"
    assert card.marker in cards.MARKERS and card.colour in cards.COLOURS
    some = [cards.facts("method", f"mine:M{k}") for k in range(100)]
    assert {each.marker for each in some} == set(cards.MARKERS) and {each.colour for each in some} == set(cards.COLOURS)
    cards.remember({"some_pkg.mine:Other": {"title": "Another", "marker": 3}})
    other = cards.facts("method", "some_pkg.mine:Other")
    assert other.title == "Another" and other.marker in cards.MARKERS


def test_a_method_has_its_own_flags_beside_the_shared_ones():
    shared = set(CleanConfig.__dataclass_fields__)
    for name, card in cards.METHODS.items():
        kind = config_of(CleanConfig, name)
        own = set(card.settings.__dataclass_fields__) if card.settings else set()
        assert set(kind.__dataclass_fields__) == shared | own and not shared & own
        assert isinstance(kind(), CleanConfig) and kind is config_of(CleanConfig, name)
    assert config_of(PretrainConfig, "none") is PretrainConfig


def test_the_flags_of_the_method_that_the_preset_has_are_taken():
    assert cli.parse("clean", ["--preset", "par", "--run", "x", "--tau", "1.5"]).tau == 1.5
    assert cli.parse("clean", ["--run", "x", "--method", "finetune", "--method", "par", "--tau", "1.5"]).tau == 1.5
    assert not hasattr(cli.parse("clean", ["--run", "x"]), "tau")


def test_a_flag_of_a_method_has_a_range():
    with pytest.raises(UserError, match="^--tau nan is out of range: give a finite number from 0.$"):
        cli.parse("clean", ["--run", "x", "--method", "par", "--tau", "nan"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tau", "2"], "--tau is a flag of --method par, and this is --method cleanclip: give another --method,"),
        (["--method", "finetune", "--no-frozen-norms"], "--no-frozen-norms is a flag of --method par"),
        (["--method=par", "--cluster_weight=2"], "--cluster_weight is a flag of --method deep_cluster, and this"),
        (["--method", "par", "--flagged", "3"], "--flagged is a flag of --method unlearn, and this is --method par"),
    ],
)
def test_a_flag_of_another_method_is_refused_with_its_owner(flags, said):
    with pytest.raises(UserError) as error:
        cli.parse("clean", ["--run", "x", *flags])
    assert str(error.value).startswith(said)


def test_an_older_config_with_the_flags_of_all_methods_is_read():
    """Up to version 0.1.0 config.json had them all."""
    everything = {"tau": 2.15, "gate": "batch", "flagged": 0, "shrink": 0.95, "clusters": 1000}
    for name in ("cleanclip", "par"):
        kind = config_of(CleanConfig, name)
        config = PRESETS["demo"]().defaults("clean", name)
        assert type(config) is kind
        assert from_dict(kind, everything | to_dict(config)) == config
        assert dataclasses.replace(config, epochs=7).epochs == 7
