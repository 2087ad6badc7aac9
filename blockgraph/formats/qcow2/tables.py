# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Metadata tables of one cluster each (L2 tables, refcount blocks) in memory, written back later.

```
    clean, least recently used first        dirty: stays until it is on disk
    | t3 | t9 | t1 | t4 |   --touch-->      | t7 | t2 |
        ^ dropped when over the limit       --settle--> clean
```

Only clean tables are dropped, so the writer bounds the dirty ones (`crowded`).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, NamedTuple, TypeVar

#: Parts of a table are written in blocks of this many bytes.
WRITE_BLOCK = 4096


class Table:
    """One table, in its on-disk form.

    Attributes:
        key: its index in the table above.
        host: where it lies, host offset.
        buf: its bytes.
        low, high: bytes [low, high) differ from the disk; low >= high: none do.
    """

    __slots__ = ("buf", "high", "host", "key", "low")

    def __init__(self, key: int, host: int, buf: bytearray) -> None:
        self.key = key
        self.host = host
        self.buf = buf
        self.low = len(buf)
        self.high = 0

    @property
    def dirty(self) -> bool:
        """Some bytes differ from the disk."""
        return self.low < self.high


T = TypeVar("T", bound=Table)


class Saved(NamedTuple, Generic[T]):
    """A dirty part of a table as it was when a write-back began: `data` belongs at host offset table.host + start."""

    table: T
    start: int
    data: bytes


class TableCache(Generic[T]):
    """See the module's text.

    Args:
        limit: bytes of tables, clean and dirty, to stay below where dirty ones allow.
        table_size: bytes of one table.
    """

    def __init__(self, limit: int, table_size: int) -> None:
        self._table_size = table_size
        self._most = max(2, limit // table_size)
        self._clean: OrderedDict[int, T] = OrderedDict()
        self._dirty: dict[int, T] = {}
        self._loading: dict[int, asyncio.Event] = {}

    def get(self, key: int) -> T | None:
        """The table, when it is in memory."""
        table = self._clean.get(key)
        if table is not None:
            self._clean.move_to_end(key)
            return table
        return self._dirty.get(key)

    async def load(self, key: int, read: Callable[[], Awaitable[T]]) -> T | None:
        """The table, from memory or by `read`; read once however many ask.

        One that was added meanwhile counts, not what was read: that is old. None: it is not in memory any more, or was
        forgotten, or somebody else could not read it; look again where it lies.
        """
        table = self.get(key)
        if table is not None:
            return table
        loading = self._loading.get(key)
        if loading is not None:
            await loading.wait()
            return self.get(key)
        loading = self._loading[key] = asyncio.Event()
        try:
            table = await read()
            if self._loading.get(key) is not loading:
                return self.get(key)
            self._clean[key] = table
            self._shrink()
            return table
        finally:
            if self._loading.get(key) is loading:
                del self._loading[key]
            loading.set()

    def add_new(self, table: T) -> None:
        """Take in a table that is not on disk yet: all of it is dirty."""
        self.forget(table.key)
        table.low, table.high = 0, len(table.buf)
        self._dirty[table.key] = table
        self._shrink()

    def touch(self, table: T, start: int, end: int) -> None:
        """Bytes [start, end) of the table were changed."""
        table.low = min(table.low, start)
        table.high = max(table.high, end)
        if self._clean.pop(table.key, None) is not None:
            self._dirty[table.key] = table
        assert self._dirty.get(table.key) is table

    def forget(self, key: int) -> None:
        """The table is no longer part of the image."""
        self._loading.pop(key, None)
        self._clean.pop(key, None)
        self._dirty.pop(key, None)

    @property
    def crowded(self) -> bool:
        """Half of the tables that may be in memory, or more, can not be dropped before they are written."""
        return 2 * len(self._dirty) >= self._most

    @property
    def dirty(self) -> bool:
        """A table differs from the disk."""
        return bool(self._dirty)

    @property
    def size(self) -> int:
        """Bytes of the tables in memory."""
        return (len(self._clean) + len(self._dirty)) * self._table_size

    # Write-back.

    def save(self) -> list[Saved[T]]:
        """The dirty parts, as they are now; follow with `settle` or `restore`."""
        saved = []
        for table in self._dirty.values():
            if table.dirty:
                start = table.low - table.low % WRITE_BLOCK
                end = min(table.high + -table.high % WRITE_BLOCK, len(table.buf))
                saved.append(Saved(table, start, bytes(memoryview(table.buf)[start:end])))
                table.low, table.high = len(table.buf), 0
        return saved

    def settle(self, saved: list[Saved[T]]) -> None:
        """These parts are on disk."""
        for table, _, _ in saved:
            if not table.dirty and self._dirty.get(table.key) is table:
                del self._dirty[table.key]
                self._clean[table.key] = table
        self._shrink()

    def restore(self, saved: list[Saved[T]]) -> None:
        """These parts may not be on disk: they are dirty again."""
        for table, start, data in saved:
            table.low = min(table.low, start)
            table.high = max(table.high, start + len(data))

    def _shrink(self) -> None:
        while len(self._clean) > 1 and len(self._clean) + len(self._dirty) > self._most:
            self._clean.popitem(last=False)
