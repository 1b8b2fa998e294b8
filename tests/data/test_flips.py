"""Files with damage are refused, read as before, or known by their checksums."""

from __future__ import annotations

from collections import Counter

import flips
import numpy as np
import pytest
from containers import without_checksums

from fastbd.base.errors import UserError
from fastbd.data.beton import Beton
from fastbd.data.rows import read_rows, write_rows
from fastbd.poison.plan import make_plan
from fastbd.poison.triggers import TriggerSpec


@pytest.mark.parametrize(("views", "labelled"), [(0, False), (2, True)])
@pytest.mark.parametrize("checksums", [True, False])
def test_damage_is_harmless_told_or_found(tmp_path, views, labelled, checksums):
    path = flips.write(tmp_path / "whole.beton", views, labelled)
    if not checksums:
        path = without_checksums(path, tmp_path / "old.beton")
    raw, whole, rng = path.read_bytes(), flips.read(path), np.random.default_rng(0)
    assert whole[2] == checksums
    places, ends = flips.tables_and_values(raw), Counter()
    for _ in range(60):
        ends[flips.outcome(tmp_path / "damaged.beton", flips.mutated(raw, places, rng), whole)] += 1
    assert set(ends) <= {"same", "sentence"} | (set() if checksums else {"other content"}), ends
    assert ends["sentence"] > 5


def test_a_label_with_a_high_bit_is_refused_at_once(tmp_path):
    path = flips.write(tmp_path / "a.beton", 0, True)
    data = Beton(path)
    at = data._metadata["label"].ctypes.data - data._bytes.ctypes.data
    raw = bytearray(path.read_bytes())
    raw[at + 3] ^= 0x40
    assert flips.outcome(path, bytes(raw), ("", "", True)) == "sentence"


@pytest.mark.parametrize("what", ["caption", "tokens", "text_views", "jpeg"])
def test_the_fingerprint_covers_the_content(tmp_path, what):
    def write(name: str, **changed):
        values = dict(
            jpeg=b"\xff" * 40,
            width=3,
            height=3,
            tokens=np.arange(77),
            text_views=np.ones((2, 77)),
            caption="a cat",
            row_id=0,
        )
        with flips.BetonWriter(tmp_path / name, 1, 2, False) as writer:
            writer.add(**values | changed)
        return Beton(tmp_path / name).fingerprint

    views = np.ones((2, 77))
    views[1, 5] = 2
    other = {
        "caption": "a car",
        "tokens": np.arange(77) + (np.arange(77) == 9),
        "text_views": views,
        "jpeg": b"\xff" * 39 + b"\xfe",
    }[what]
    first, same, changed = write("a.beton"), write("b.beton"), write("c.beton", **{what: other})
    assert first == same != changed
    plan = make_plan(
        first,
        1,
        target="cat",
        trigger=TriggerSpec("badnet", patch_size=1),
        geometry="crop",
        seed=0,
        templates=("a {}",),
        count=1,
    )
    write_rows(tmp_path / "kept.rows", np.arange(1), first, "all")
    plan.check(same, 1, "b.beton")
    assert read_rows(tmp_path / "kept.rows", same, 1).tolist() == [0]
    with pytest.raises(UserError, match="made for other data than c.beton"):
        plan.check(changed, 1, "c.beton")
    with pytest.raises(UserError, match="kept.rows was made for other data"):
        read_rows(tmp_path / "kept.rows", changed, 1)
