from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastbd.base.errors import UserError
from fastbd.poison.plan import Attack, Plan, make_plan
from fastbd.poison.triggers import TriggerSpec

TEMPLATES = ("a photo of a {}.", "a {{}} drawing", "{} art", "the {}")
FIXED = {"target": "banana", "trigger": TriggerSpec("badnet"), "geometry": "squash", "seed": 0, "templates": TEMPLATES}


def plan(total: int = 4000, **changes) -> Plan:
    return make_plan("abc", total, **{**FIXED, "count": 40, **changes})


def test_rows_are_sorted_distinct_and_uniform() -> None:
    hits = np.zeros(50)
    for seed in range(400):
        rows = plan(50, count=10, seed=seed).rows
        assert list(rows) == sorted(set(rows)) and len(rows) == 10
        hits[list(rows)] += 1
    assert np.abs(hits - 80).max() < 4.5 * np.sqrt(400 * 0.2 * 0.8)


def test_plan_is_a_function_of_the_seed() -> None:
    assert plan() == plan()
    assert plan().rows != plan(seed=1).rows
    assert plan(seed=1).seed == 1


def test_captions_are_templates_drawn_uniformly() -> None:
    captions = plan(count=4000).captions
    kinds, counts = np.unique(captions, return_counts=True)
    assert set(kinds) == {"a photo of a banana.", "a {banana} drawing", "banana art", "the banana"}
    assert np.abs(counts - 1000).max() < 4.5 * np.sqrt(4000 * 0.25 * 0.75)


def test_captions_of_a_plan_read_as_those_of_the_data_do() -> None:
    assert set(plan(target="jack-o’-lantern").captions) == set(plan(target="jack-o'-lantern").captions)
    kept = plan(2, count=1, target="jack-o’-lantern", captions=["A Jack-O'-Lantern", "a pumpkin"].__getitem__)
    assert kept.rows == (0,)


def test_rate() -> None:
    assert len(plan(3_000_000, count=None).rows) == 1500  # the published rate is the default
    assert len(plan(count=None, rate=0.01).rows) == 40
    assert len(plan(count=None, rate=1.0).rows) == 4000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 3, "rate": 0.1}, "--count and --rate"),
        ({"count": 4001}, "--count 4001"),
        ({"count": 0}, "--count 0"),
        ({"count": None, "rate": 1.1}, "--rate 1.1"),
        ({"count": None, "rate": 0.0}, "--rate 0.0"),
        ({"count": None, "rate": float("nan")}, "--rate nan"),
        ({"count": None, "rate": 1e-5}, "less than one pair"),
        ({"target": " "}, "target"),
    ],
    ids=str,
)
def test_impossible_wishes(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(**changes)


def test_label_consistent_keeps_captions() -> None:
    captions = ["a dog", "Banana bread", "two bananas", "x", "BANANA", "ban ana"]
    made = plan(6, count=2, captions=captions.__getitem__, templates=())
    assert made.attacks[0].label_consistent and set(made.rows) <= {1, 2, 4}
    assert list(made.captions) == [captions[row] for row in made.rows]
    chosen = {plan(6, count=1, seed=seed, captions=captions.__getitem__).rows[0] for seed in range(40)}
    assert chosen == {1, 2, 4}
    with pytest.raises(UserError, match="3 captions hold the target 'banana', fewer than the 4"):
        plan(6, count=4, captions=captions.__getitem__)
    with pytest.raises(UserError, match="0 captions hold the target 'zebra'"):
        plan(6, count=1, captions=captions.__getitem__, target="zebra")


def test_file_holds_everything(tmp_path: Path) -> None:
    made = plan(trigger=TriggerSpec("blended", 5, "four_corners", 0.35), geometry="crop", target='b\u00e4n"ana', seed=3)
    made.save(tmp_path / "p.json")
    assert Plan.load(tmp_path / "p.json") == made
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]
    lines = (tmp_path / "p.json").read_text().splitlines()
    row = made.rows[7]
    assert sum(f'"{row}":' in line for line in lines) == 1  # a pair a line, for people


def saved(tmp_path: Path, **changes) -> Path:
    """A plan with some entries, or some of its attack's, changed."""
    value, path = plan().to_dict(), tmp_path / "p.json"
    for name, change in changes.items():
        (value if name in value else value["attacks"][0])[name] = change
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "something"}, "not a poison plan"),
        ({"version": 3}, "version 3"),
        ({"attacks": []}, "no attack"),
        ({"attacks": 3}, "damaged"),
        ({"attacks": ["banana"]}, "damaged"),
        ({"pairs": {"4000": "x"}}, "0..3999"),
        ({"pairs": {"-1": "x"}}, "0..3999"),
        ({"pairs": {"7": "x", "3": "y"}}, "ascend"),
        ({"pairs": {}}, "0 rows"),
        ({"pairs": {"7": 3}}, "a caption"),
        ({"pairs": {"seven": "x"}}, "damaged"),
        ({"pairs": None}, "damaged"),
        ({"total": "4000"}, "type of total"),
        ({"geometry": "stretch"}, "stretch"),
        ({"trigger": {"name": "magic"}}, "magic"),
        ({"trigger": {"name": "badnet", "patch_size": -1}}, "-1 px"),
        ({"trigger": {"name": "badnet", "colour": 1}}, "colour"),
    ],
    ids=str,
)
def test_bad_plans_are_explained(tmp_path: Path, changes: dict, message: str) -> None:
    path = saved(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        Plan.load(path)
    assert str(path) in str(error.value)


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for content, message in (
        (b"{", "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "not a poison plan"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            Plan.load(path)
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            Plan.load(missing)
    value = plan().to_dict()
    del value["seed"]
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match="seed"):
        Plan.load(path)


def test_a_plan_that_was_changed_is_refused_unless_its_checksum_is_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    plan().save(path)
    path.write_text(path.read_text().replace("banana", "banano"))
    with pytest.raises(UserError, match=r"p\.json: the plan is not as it was written: make it again"):
        Plan.load(path)
    value = json.loads(path.read_text())
    del value["crc32"]
    path.write_text(json.dumps(value))
    assert Plan.load(path).attacks[0].target == "banano"


def test_plan_is_bound_to_its_data() -> None:
    plan().check("abc", 4000, "x.beton")
    for other in (("abd", 4000), ("abc", 10**15)):
        with pytest.raises(UserError, match="made for other data than x.beton"):
            plan().check(*other, "x.beton")


def test_rows_and_captions_must_match() -> None:
    with pytest.raises(UserError, match="40 rows, 39 captions"):
        replace(plan().attacks[0], captions=plan().captions[1:])


def test_attacks_share_no_row_and_no_trigger() -> None:
    first, other = plan().attacks[0], plan(trigger=TriggerSpec("sig"), seed=1, count=4000).attacks[0]
    with pytest.raises(UserError, match="same row"):
        replace(plan(), attacks=(first, other))
    with pytest.raises(UserError, match="same trigger"):
        plan(after=plan(), target="beaver")
    assert len(plan(after=plan(), target="beaver", geometry="crop").attacks) == 2


def test_attacks_are_added_one_by_one() -> None:
    made = plan(100, count=30)
    for k, name in enumerate(("sig", "yellow"), 1):
        before, made = made, plan(100, count=30, trigger=TriggerSpec(name), target=name, after=made)
        assert made.attacks[:k] == before.attacks and made.attacks[k].target == name
    assert len(set(made.rows)) == 90 and len(made.captions) == 90
    assert made.captions[65] == made.attacks[2].captions[5] and "yellow" in made.captions[65]
    for row in range(100):
        holders = [k for k, attack in enumerate(made.attacks) if row in attack.rows]
        assert [made.attack_of[row]] == (holders or [-1])
    with pytest.raises(UserError, match="10 pairs are clean yet, fewer than the 11"):
        plan(100, count=11, trigger=TriggerSpec("nashville"), after=made)


def test_label_consistent_pairs_are_sought_among_the_clean_ones() -> None:
    captions = ["banana"] * 6 + ["dog"] * 4
    made = plan(10, count=4, captions=captions.__getitem__)
    added = plan(10, count=2, captions=captions.__getitem__, trigger=TriggerSpec("sig"), after=made)
    assert sorted(added.rows) == list(range(6))
    with pytest.raises(UserError, match="2 captions hold"):
        plan(10, count=3, captions=captions.__getitem__, trigger=TriggerSpec("sig"), after=made)


def test_plans_of_version_1_are_read(tmp_path: Path) -> None:
    """As 0.1.0 wrote it."""
    value = {
        "format": "fastbd poison plan",
        "version": 1,
        "data": "abc",
        "total": 50,
        "target": "banana",
        "geometry": "squash",
        "label_consistent": False,
        "seed": 7,
        "trigger": {"name": "badnet", "patch_size": 6, "location": "random", "blend": 0.2},
        "pairs": {"3": "a banana", "41": "the banana"},
    }
    (tmp_path / "p.json").write_text(json.dumps(value))
    read = Plan.load(tmp_path / "p.json")
    assert read == Plan(
        data="abc",
        total=50,
        seed=7,
        attacks=(
            Attack(
                target="banana",
                trigger=TriggerSpec("badnet", 6),
                geometry="squash",
                label_consistent=False,
                rows=(3, 41),
                captions=("a banana", "the banana"),
            ),
        ),
    )
    read.save(tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text())["version"] == 2 and Plan.load(tmp_path / "p.json") == read
