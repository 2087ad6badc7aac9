# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Tables in memory while others of them are being read."""

from __future__ import annotations

import asyncio

import pytest
from helpers.loop import in_loop

from blockgraph.formats.qcow2.tables import Table, TableCache

SIZE = 4096


class Reading:
    """A table that is being read, and for which another task waits."""

    def __init__(self, cache: TableCache[Table]) -> None:
        self.cache = cache
        self.old = Table(5, SIZE, bytearray(SIZE))
        self.go = asyncio.Event()
        self.tasks: list[asyncio.Future[Table | None]] = []

    async def read(self) -> Table:
        """When the test lets it."""
        await self.go.wait()
        return self.old

    async def begin(self) -> None:
        """Both ask."""
        for _ in range(2):
            self.tasks.append(asyncio.ensure_future(self.cache.load(5, self.read)))
            await asyncio.sleep(0)

    async def end(self) -> list[Table | None]:
        """What they get."""
        self.go.set()
        return await asyncio.gather(*self.tasks)


@in_loop
async def test_table_is_read_once_for_all() -> None:
    reading = Reading(TableCache(8 * SIZE, SIZE))
    await reading.begin()
    assert await reading.end() == [reading.old] * 2
    assert reading.cache.get(5) is reading.old


@pytest.mark.parametrize("again", [False, True], ids=["before", "before-and-being-read-again"])
@in_loop
async def test_table_made_while_the_old_one_was_read_stays(again: bool) -> None:
    """As when it is copied for a write, while somebody looks at what it was copied from."""
    cache: TableCache[Table] = TableCache(8 * SIZE, SIZE)
    reading, new = Reading(cache), Table(5, 2 * SIZE, bytearray(SIZE))
    await reading.begin()
    if again:
        cache.forget(5)
        await reading.begin()
    cache.add_new(new)
    assert await reading.end() == [new] * len(reading.tasks)
    assert cache.get(5) is new
    assert [saved.table for saved in cache.save()] == [new]


@in_loop
async def test_table_forgotten_while_it_was_read_does_not_come_back() -> None:
    cache: TableCache[Table] = TableCache(8 * SIZE, SIZE)
    reading = Reading(cache)
    await reading.begin()
    cache.forget(5)
    assert await reading.end() == [None, None]
    assert cache.get(5) is None
