"""A bounded dictionary for results that are computed once per kind of call."""

from __future__ import annotations

from typing import TypeVar

REMEMBERED = 4096
Key = TypeVar("Key")
Found = TypeVar("Found")


class BoundedCache(dict[Key, Found]):
    """A dictionary that clears itself at 4096 entries, so that a program whose shapes never repeat does not exhaust memory."""

    def __setitem__(self, key: Key, found: Found) -> None:
        if len(self) >= REMEMBERED and key not in self:
            self.clear()
        super().__setitem__(key, found)
