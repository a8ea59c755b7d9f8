"""What is worked out once per kind of call, and kept."""

from __future__ import annotations

from typing import TypeVar

REMEMBERED = 4096
Key = TypeVar("Key")
Found = TypeVar("Found")


class BoundedCache(dict[Key, Found]):
    """A dictionary that starts over when it is full: a program whose shapes never repeat must not fill the memory."""

    def __setitem__(self, key: Key, found: Found) -> None:
        if len(self) >= REMEMBERED:
            self.clear()
        super().__setitem__(key, found)
