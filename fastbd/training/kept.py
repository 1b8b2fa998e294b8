"""What runs of one process that follow one another open and make only once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import Any


class Kept:
    """The latest of each kind, with a key that says what it depends on. An older one goes before a new one is made."""

    def __init__(self):
        self._kept: dict[str, tuple[Hashable, Any]] = {}

    def held(self, kind: str, key: Hashable) -> Any | None:
        """It, or None where there is none with this key; one with another key is dropped."""
        if kind in self._kept and self._kept[kind][0] != key:
            self.drop(kind)
        return self._kept[kind][1] if kind in self._kept else None

    def drop(self, *kinds: str) -> None:
        """Let go of those that there are, and of their memory at once: models and steps refer to themselves."""
        if [kind for kind in kinds if self._kept.pop(kind, None)]:
            gc.collect()

    def clear(self) -> None:
        """Let go of all."""
        self.drop(*list(self._kept))

    def put(self, kind: str, key: Hashable, thing: Any) -> Any:
        self._kept[kind] = key, thing
        return thing

    def get(self, kind: str, key: Hashable, make: Callable[[], Any]) -> Any:
        """It, made where there is none with this key."""
        found = self.held(kind, key)
        return self.put(kind, key, make()) if found is None else found
