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

A table's first fault is local, too, and the first of a write if it could not be written then: once entered, the map
knows where it is, and looks itself when something of it was dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockgraph.native import ExtentMap

#: So many faults make a table local, if it stays one of those with the latest faults meanwhile.
_LOCAL = 8
#: Tables whose faults are counted, at most.
_MOST = 1 << 14
#: Every so many faults it is looked anew whether the map is full, and what was in vain is forgotten.
_FAULTS = 256
#: So many look-ups in vain, if they are half of all, are enough: see `came_back`.
_IN_VAIN = 8
#: After so many faults a table that was entered is entered again: the map seems not to find it.
_AGAIN = 64
#: Bytes of an entry in a map.
_WORD = 4


class ScatteredFaults:
    """See the module's text.

    Args:
        extents: the map.
        memory: its bound, bytes.
    """

    def __init__(self, extents: ExtentMap, memory: int) -> None:
        self._extents = extents
        self._memory = memory
        #: faults by table, the latest last
        self._tables: OrderedDict[int, int] = OrderedDict()
        #: faults of tables that were entered, until they are again; for reads, and for writes
        self._entered: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self._most = 0
        self._span_bits = 0
        self._faults = 0
        self._full = False
        #: of reads and of writes
        self._looked_up = [0, 0]
        self._came_back = [0, 0]

    def use_tables(self, entries: int, cluster_bits: int) -> None:
        """The disk's tables have so many entries, each of a cluster."""
        self._span_bits = cluster_bits + entries.bit_length() - 1
        # As many as half of the map would hold.
        self._most = min(self._memory // (2 * _WORD * entries), _MOST)

    def add(self, offset: int, *, write: bool) -> bool:
        """A request missed; whether it is to be looked up alone."""
        if not self._most:
            return False  # there are no tables
        if self._faults % _FAULTS == 0:
            stats = self._extents.stats()
            self._full = stats.evictions > 0 and 2 * stats.bytes > self._memory
            self._looked_up, self._came_back = [0, 0], [0, 0]
        self._faults += 1
        if self.is_local(offset, write=write) or self._came_back[write] >= max(_IN_VAIN, self._looked_up[write] / 2):
            return False
        self._looked_up[write] += 1
        return True

    def is_local(self, offset: int, *, write: bool) -> bool:
        """A fault is there; whether all of its table is to be entered."""
        if not self._full:
            return True
        table = offset >> self._span_bits
        entered = self._entered[write]
        left = entered.get(table, 0)
        if left == 0:
            return True
        entered[table] = left - 1
        count = min(self._tables.pop(table, 0) + 1, _LOCAL)
        self._tables[table] = count
        if len(self._tables) > self._most:
            self._tables.popitem(last=False)
        return count == _LOCAL

    def entered(self, offset: int, *, writable: bool) -> None:
        """All of the table was."""
        if not self._most:
            return  # nothing is looked up alone
        for entered in self._entered if writable else self._entered[:1]:
            if len(entered) >= _MOST:
                entered.clear()
            entered[offset >> self._span_bits] = _AGAIN

    def forget(self) -> None:
        """The map has forgotten everything."""
        for entered in self._entered:
            entered.clear()

    def came_back(self, *, write: bool) -> None:
        """A request was looked up, and has missed all the same."""
        self._came_back[write] += 1
