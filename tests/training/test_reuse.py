from __future__ import annotations

import weakref

from fastbd.training.reuse import Kept


class Thing:
    pass


def test_the_latest_of_a_kind_is_kept_and_an_older_one_goes_first():
    kept, alive = Kept(), []

    def make() -> Thing:
        assert not [ref for ref in alive if ref() is not None]  # two never lie in memory side by side
        thing = Thing()
        alive.append(weakref.ref(thing))
        return thing

    first = kept.get("a", 1, make)
    assert kept.get("a", 1, make) is first and kept.held("b", 1) is None
    del first
    second = kept.get("a", 2, make)
    assert len(alive) == 2 and kept.held("a", 2) is second
    assert kept.held("a", 1) is None and kept.held("a", 2) is None  # asked for with another key, it is gone


def test_what_refers_to_itself_is_let_go_at_once():
    kept, thing = Kept(), Thing()
    thing.itself, gone = thing, weakref.ref(thing)
    kept.put("a", 1, thing)
    del thing
    kept.drop("a", "b")
    assert gone() is None and kept.held("a", 1) is None
