# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""ScatteredFaults: which requests that an extent map knows nothing of are better off when only they are looked up.

A fault enters all that a driver's table says, for what is near will be wanted next. Where a fragmented disk needs more
memory than its map may have, and is used here and there, that drives out as much as it brings, and costs hundreds of
times what it takes to look up a single cluster.

```
    tables    | 17 |      | 4  |       | 90 |         faults here and there: each is looked up alone
              |   | | |        |            |         as many in one table as make it local: all of it is entered
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockgraph.native import ExtentMap

#: So many faults make a table local, if others have not made it one of those that were not asked about for long.
_LOCAL = 8
#: After so many faults it is looked anew whether the map is full,
_FAULTS = 256
#: and when so many requests had to be done in Python although they were looked up, half of all, none is until then.
_FUTILE = 8
#: Bytes of an entry in a map.
_WORD = 4


class ScatteredFaults:
    """See the module's text.

    Args:
        extents: the map.
    """

    def __init__(self, extents: ExtentMap) -> None:
        self._extents = extents
        #: faults by table, those asked about last at the end
        self._tables: dict[int, int] = {}
        self._most = 0
        self._span_bits = 0
        self._faults = 0
        self._full = False
        self._looked_up = self._came_back = 0

    def use_tables(self, entries: int, cluster_bits: int) -> None:
        """The disk's tables have so many entries, each of a cluster."""
        self._span_bits = cluster_bits + entries.bit_length() - 1
        self._most = self._extents.stats().limit // (2 * _WORD * entries)

    def add(self, offset: int) -> bool:
        """A request missed; whether it is to be looked up alone."""
        if not self._most:
            return False  # there are no tables
        if self._faults % _FAULTS == 0:
            stats = self._extents.stats()
            self._full = stats.evictions > 0 and 2 * stats.bytes > stats.limit
            self._looked_up = self._came_back = 0
        self._faults += 1
        if not self._full or (self._came_back >= _FUTILE and 2 * self._came_back >= self._looked_up):
            return False
        table = offset >> self._span_bits
        count = min(self._tables.pop(table, 0) + 1, _LOCAL)
        self._tables[table] = count
        if len(self._tables) > self._most:
            del self._tables[next(iter(self._tables))]
        if count == _LOCAL:
            return False
        self._looked_up += 1
        return True

    def came_back(self) -> None:
        """A request was looked up, and has missed all the same."""
        self._came_back += 1
