# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Allocation: room for new data, from the moment clusters are taken until the L2 table links them.

```
    guest      |  cluster  |  cluster  |  cluster  |
    request          |=================|                  the holder writes this
    commit     |.....|                 |...........|      then this is filled from the old contents, and all is linked
```

Nobody sees the new clusters before `commit`, and an abort or a crash leaves the old contents. While an allocation is
under way, others for the same guest clusters (also zeroing and discard) wait for it; all others go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from blockgraph.driver import Allocation
from blockgraph.extent import Extent, Status
from blockgraph.formats.qcow2.image import run_all
from blockgraph.native import L2Kind, L2Run, is_zero

if TYPE_CHECKING:
    from blockgraph.formats.qcow2.driver import Qcow2
    from blockgraph.formats.qcow2.mapping import L2Table
    from blockgraph.native import Allocator


class Busy:
    """Guest clusters [first, end) that somebody is changing."""

    __slots__ = ("_free", "end", "first", "held", "racing")

    def __init__(self, first: int, end: int) -> None:
        self.first = first
        self.end = end
        #: end of the clusters that native writes are kept from; None: they are not
        self.held: int | None = None
        #: a native write to one of them may be under way
        self.racing = False
        self._free: asyncio.Event | None = None

    async def wait(self) -> None:
        """Until they are no longer held."""
        if self._free is None:
            self._free = asyncio.Event()
        await self._free.wait()

    def wake(self) -> None:
        """They are no longer held."""
        if self._free is not None:
            self._free.set()


class BusyClusters:
    """Which guest clusters are being changed. A holder takes no second range, so nobody waits in a circle.

    Native first writes (`FirstWrites`) are kept from them too: who takes clusters waits for `settled`, and looks at the
    entries after that.
    """

    def __init__(self) -> None:
        self._held: list[Busy] = []
        self._native: Allocator | None = None
        self._settle: Callable[[], Awaitable[None]]

    def share(self, native: Allocator, settle: Callable[[], Awaitable[None]]) -> None:
        """From now on native writes take part; `settle` waits for those that have begun."""
        self._native = native
        self._settle = settle
        for busy in self._held:
            self._keep(busy, native)

    def _keep(self, busy: Busy, native: Allocator) -> None:
        busy.racing = native.hold(busy.first, busy.end)
        busy.held = busy.end

    def overlapping(self, first: int, end: int) -> Busy | None:
        """Somebody who holds one of the clusters [first, end)."""
        for busy in self._held:
            if busy.first < end and first < busy.end:
                return busy
        return None

    def take(self, first: int, end: int) -> Busy:
        """Hold clusters that nobody holds."""
        busy = Busy(first, end)
        if self._native is not None:
            self._keep(busy, self._native)
        self._held.append(busy)
        return busy

    async def settled(self, busy: Busy) -> None:
        """Until no native write to the clusters is under way; does not suspend when there is none."""
        if busy.racing:
            await self._settle()
            busy.racing = False

    def give(self, busy: Busy) -> None:
        """End `take`."""
        self._held.remove(busy)
        if busy.held is not None and self._native is not None:
            self._native.release(busy.first, busy.held)
        busy.wake()

    @asynccontextmanager
    async def hold(self, first: int, end: int) -> AsyncIterator[None]:
        """Hold clusters, after waiting for whoever holds some of them."""
        while (other := self.overlapping(first, end)) is not None:
            await other.wait()
        busy = self.take(first, end)
        try:
            await self.settled(busy)
            yield
        finally:
            self.give(busy)


class InPlace:
    """Room that the disk has already: commit and abort have nothing to do."""

    __slots__ = ("extent",)

    def __init__(self, extent: Extent) -> None:
        self.extent = extent

    async def commit(self) -> None:
        """The data was written in place."""

    async def abort(self) -> None:
        """The data may have been written in part, as with any write that failed."""


class NewClusters:
    """Room in clusters that no entry refers to yet, or that a zero entry keeps in reserve.

    Args:
        busy: held, given back by commit and abort.
        old: what the entries said, as runs.
        reserved: the clusters belong to the entries already (preallocated zeroes).
        fresh: the clusters read as zeroes.
    """

    __slots__ = ("_busy", "_driver", "_fresh", "_old", "_reserved", "extent")

    def __init__(
        self, driver: Qcow2, extent: Extent, busy: Busy, old: list[L2Run], *, reserved: bool, fresh: bool
    ) -> None:
        self._driver = driver
        self._busy = busy
        self._old = old
        self._reserved = reserved
        self._fresh = fresh
        self.extent = extent

    async def write(self, buf: memoryview) -> None:
        """Write the whole range, and what `commit` would fill in the same request where that is little; then commit."""
        head, tail = self._margins()
        try:
            if (head or tail) and head + len(buf) + tail <= self._driver.image.cluster_size:
                whole = memoryview(bytearray(head + len(buf) + tail))
                filled = await self._old_bytes(self.extent.offset - head, whole[:head])
                filled |= await self._old_bytes(self.extent.offset + len(buf), whole[head + len(buf) :])
                if filled or not self._fresh:
                    whole[head : head + len(buf)] = buf
                    await self._write(self.extent.child_offset - head, whole)
                else:
                    await self._write(self.extent.child_offset, buf)
            else:
                await self._write(self.extent.child_offset, buf)
                await self._fill(head, tail)
        except BaseException:
            await self.abort()
            raise
        await self._link()

    async def commit(self) -> None:
        """Fill the rest of the first and last cluster from the old contents, and link the clusters."""
        try:
            await self._fill(*self._margins())
        except BaseException:
            await self.abort()
            raise
        await self._link()

    async def abort(self) -> None:
        """Give the clusters back."""
        if not self._reserved:
            bits = self._driver.image.cluster_bits
            self._driver.refcounts.reclaim.unused(
                self.extent.child_offset >> bits << bits, self._busy.end - self._busy.first
            )
        self._driver.busy.give(self._busy)

    def _margins(self) -> tuple[int, int]:
        bits = self._driver.image.cluster_bits
        end = self.extent.offset + self.extent.length
        return self.extent.offset - (self._busy.first << bits), (self._busy.end << bits) - end

    async def _fill(self, head: int, tail: int) -> None:
        work = []
        if head:
            work.append(self._copy(self.extent.offset - head, head))
        if tail:
            work.append(self._copy(self.extent.offset + self.extent.length, tail))
        if work:
            await run_all(work)

    async def _copy(self, offset: int, length: int) -> None:
        buf = memoryview(bytearray(length))
        if await self._old_bytes(offset, buf) or not self._fresh:
            await self._write(self.extent.child_offset + offset - self.extent.offset, buf)

    async def _old_bytes(self, offset: int, buf: memoryview) -> bool:
        """Fill `buf`, part of one cluster, with what readers see there; False: zeroes."""
        length = min(len(buf), self._driver.size() - offset)
        if length <= 0:
            return False
        run = self._old[0] if offset >> self._driver.image.cluster_bits == self._busy.first else self._old[-1]
        if run.kind == L2Kind.UNALLOCATED:
            backing = self._driver.cow()
            if backing is None or offset >= backing.node.size():
                return False
            await self._driver.image.file.event("cow_read")
            await backing.pread(offset, buf[:length])
        elif run.kind in (L2Kind.DATA, L2Kind.COMPRESSED):
            await self._driver.image.file.event("cow_read")
            await self._driver.read_old(run, offset, buf[:length])
        else:
            return False
        return not is_zero(buf)

    async def _write(self, host: int, buf: memoryview) -> None:
        await self._driver.image.file.event("cow_write")
        await self._driver.image.file.pwrite(host, buf)

    async def _link(self) -> None:
        driver = self._driver
        bits = driver.image.cluster_bits
        try:
            table = await driver.mapping.table_for_write(self._busy.first >> driver.image.l2_bits)
        except BaseException:
            await self.abort()
            raise
        first = self._busy.first & (driver.image.l2_entries - 1)
        count = self._busy.end - self._busy.first
        host = self.extent.child_offset >> bits << bits
        driver.mapping.set_run(table, L2Run(first, count, L2Kind.DATA, host, True, 0))
        if not self._reserved:
            for run in self._old:
                driver.unlink_run(run)
        driver.busy.give(self._busy)


async def allocate(driver: Qcow2, offset: int, length: int) -> Allocation:
    """Room for new data from guest `offset`, of at most `length` bytes, inside one L2 table.

    Raises:
        NoSpace, CorruptImage, IOFailure: nothing has changed.
    """
    image, mapping = driver.image, driver.mapping
    image.check_writable()
    await driver.writeback.relieve()
    bits = image.cluster_bits
    first = offset >> bits
    start = first & (image.l2_entries - 1)
    end = first - start + min(image.l2_entries, start + ((offset + length - 1) >> bits) - first + 1)
    while True:
        other = driver.busy.overlapping(first, first + 1)
        if other is not None:
            await other.wait()
            continue
        table = await mapping.table_for_write(first >> image.l2_bits)
        other = driver.busy.overlapping(first, end)
        if other is None:
            break
        if other.first > first:
            end = other.first
    run = mapping.run(table, start, end - first)
    if run.kind == L2Kind.DATA and run.copied:
        return _in_place(driver, run, start, offset, length)
    # Held from here on, so that the entries stay as they are while clusters are looked for.
    busy = driver.busy.take(first, end)
    try:
        if busy.held is not None:
            # A native write may have been faster.
            await driver.busy.settled(busy)
            table = await mapping.table_for_write(first >> image.l2_bits)
            run = mapping.run(table, start, end - first)
        if run.kind != L2Kind.DATA or not run.copied:
            return await _take(driver, table, run, busy, offset, length)
    except BaseException:
        driver.busy.give(busy)
        raise
    driver.busy.give(busy)
    return _in_place(driver, run, start, offset, length)


def _in_place(driver: Qcow2, run: L2Run, start: int, offset: int, length: int) -> InPlace:
    """Room in the DATA run that L2 entry `start` belongs to."""
    host = run.host_offset + (start - run.first << driver.image.cluster_bits)
    extent = _extent(driver, offset, length, host, run.first + run.clusters)
    driver.check_overlap(extent.child_offset, extent.length)
    return InPlace(extent)


async def _take(driver: Qcow2, table: L2Table, run: L2Run, busy: Busy, offset: int, length: int) -> NewClusters:
    bits = driver.image.cluster_bits
    start = busy.first & (driver.image.l2_entries - 1)
    if run.kind == L2Kind.ZERO_ALLOCATED and run.copied:
        busy.end = min(busy.end, busy.first + run.first + run.clusters - start)
        host = run.host_offset + (start - run.first << bits)
        extent = _extent(driver, offset, length, host, start + busy.end - busy.first)
        driver.check_overlap(host, busy.end - busy.first << bits)
        return NewClusters(driver, extent, busy, [run], reserved=True, fresh=False)
    old = []
    for run in driver.mapping.runs(table, start, start + busy.end - busy.first):
        if run.copied and run.kind in (L2Kind.DATA, L2Kind.ZERO_ALLOCATED):
            break
        old.append(run)
    want = sum(run.clusters for run in old)
    await driver.image.file.event("cluster_alloc")
    room = await driver.refcounts.allocate(want)
    if driver.first_writes is not None:
        driver.first_writes.found_room()
    busy.end = busy.first + room.clusters
    _shorten(old, room.clusters, bits)
    extent = _extent(driver, offset, length, room.host, start + room.clusters)
    return NewClusters(driver, extent, busy, old, reserved=False, fresh=room.fresh)


def _shorten(runs: list[L2Run], clusters: int, bits: int) -> None:
    """Keep the runs' first clusters."""
    kept = 0
    for i, run in enumerate(runs):
        if kept + run.clusters >= clusters:
            runs[i] = run._replace(clusters=clusters - kept)
            del runs[i + 1 :]
            return
        kept += run.clusters


def _extent(driver: Qcow2, offset: int, length: int, host: int, end: int) -> Extent:
    """The writable extent from guest `offset` up to L2 index `end`; its first cluster is at `host`."""
    bits = driver.image.cluster_bits
    table = offset >> bits + driver.image.l2_bits << bits + driver.image.l2_bits
    length = min(length, table + (end << bits) - offset)
    inside = offset & (driver.image.cluster_size - 1)
    return Extent(offset, length, Status.DATA, driver.image.file, host + inside, True)
