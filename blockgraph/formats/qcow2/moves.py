# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Moves: where a table has been that goes to a new place when it grows, while the header on disk may lead there.

```
    place 1 ──move──► place 2 ──write-back fails──► header: 1 or 2 ──move──► place 3 ──write-back──► 1 and 2 are free
```
"""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """Clusters in a row: host offset, and how many."""

    host: int
    clusters: int


class SavedMoves(NamedTuple):
    """For a write-back: the header is to be `moved`, and these places are free then."""

    moved: bool
    left: list[Place]


class Moves:
    """See the module's text.

    Attributes:
        moved: the header on disk may not lead to where the table is.
    """

    def __init__(self) -> None:
        self.moved = False
        self._left: list[Place] = []
        #: a write-back has failed: it may lead there all the same
        self._doubtful = False

    def move(self, old: Place | None) -> list[Place]:
        """The table goes away from a place, if it had one. Returns it when nothing leads there: it is free at once."""
        unused = self.moved and not self._doubtful
        self.moved, self._doubtful = True, False
        if old is None:
            return []
        if unused:
            return [old]
        self._left.append(old)
        return []

    def save(self) -> SavedMoves:
        """What a write-back has to know; follow with `settle` or `restore`."""
        saved = SavedMoves(self.moved, self._left)
        self.moved, self._left = False, []
        return saved

    def settle(self, saved: SavedMoves) -> list[Place]:
        """The header is on disk. Returns what is free now."""
        self._doubtful = False
        return saved.left

    def restore(self, saved: SavedMoves) -> None:
        """The header may be on disk, or not."""
        self._doubtful = saved.moved and not self.moved
        self.moved = self.moved or saved.moved
        self._left = saved.left + self._left
