# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""FirstWrites: writes to clusters without a place, and zeroes of whole ones, made by native code; Python follows with
the tables.

```
    refcounts ──refill──► reserve ──native write──► links ──collect──► L2 tables (memory) ──writeback──► disk
               (raised)              (answered)             (here)
```

The order on disk is that of every other change: the refcounts of the reserve are raised before it is given away and
written back before any entry; an entry comes into memory after its data was written, so the flush that a write-back
makes before it writes entries has the data. What a crash leaves of reserve and links is clusters counted and not used.

Zeroes are only entries: a cluster that has a place keeps it, and its data (`Allocator`).

Nobody looks at an entry before the links of its table are in it (`Mapping.run`), and who changes entries holds the
guest clusters (`BusyClusters`), which keeps native writes away.

Offered only while one extent map leads here (another one would not learn what native writes have placed), and
while the file below is a plain one that grows when written: storage of a fixed size can not afford a reserve.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from blockgraph import debug
from blockgraph.errors import BlockGraphError
from blockgraph.native import Allocator

if TYPE_CHECKING:
    from blockgraph.formats.qcow2.driver import Qcow2
    from blockgraph.native import ExtentMap
    from blockgraph.node import Node

log = logging.getLogger(__name__)

#: Clusters in the reserve at first; it doubles with each refill.
_LEAST = 16
_MOST = 1024
_MOST_BYTES = 64 << 20

#: Bytes of links that may wait for their tables to be looked at.
_MOST_LINKS = 4 << 20


class FirstWrites:
    """See the module's text, and driver.FirstWrites."""

    def __init__(self, driver: Qcow2) -> None:
        self._driver = driver
        bits = driver.image.cluster_bits
        self._bits = bits
        self._most = max(_LEAST, min(_MOST, _MOST_BYTES >> bits))
        self._want = _LEAST
        self._native = Allocator(bits, driver.image.l2_bits, zeroes=driver.image.header.version >= 3)
        self._extents: ExtentMap | None = None
        self._refilling: asyncio.Task[None] | None = None
        #: it is to have a reserve
        self._writes = False
        #: links by L2 index, packed, in order, that are not in the table yet
        self._links: dict[int, bytearray] = {}
        self._link_bytes = 0
        driver.busy.share(self._native, self.settle)

    @property
    def storage(self) -> Node:
        return self._driver.file.node

    @property
    def reserve(self) -> int:
        """Clusters that are counted and used by nobody."""
        return self._native.reserve

    # Beginning and ending.

    def offered(self) -> bool:
        driver, below = self._driver, self._driver.file.node
        return (
            len(driver.node.maps) <= 1
            and driver.image.damaged is None
            and not debug.enabled
            and below.driver.growable
            and below.driver.fd() is not None
            and not below.read_only
            and below.options.detect_zeroes == "off"
            and below.guard is None
            and not below.bitmaps  # nor disabled ones: native writes make the file longer without a word
        )

    def attach(self, extents: ExtentMap, slot: int, *, writes: bool) -> None:
        if self._extents is None:
            fd = self.storage.driver.fd()
            assert fd is not None
            self._extents = extents
            self._want = _LEAST // 2
            self._writes = False
            self._native.bind(fd, self.storage.driver.memory_alignment, slot)
            extents.start_set_allocator(self._native)
            asyncio.get_running_loop().add_reader(self._native.fileno(), self._told)
        assert self._extents is extents
        if writes and not self._writes:
            self._writes = True
            self._refill_soon()

    async def withdraw(self) -> None:
        extents = self._extents
        if extents is None:
            return
        extents.start_set_allocator(None)
        await extents.settle(extents.start_invalidate(0, extents.size))
        if self._extents is extents:  # nobody was faster
            self._extents = None
            asyncio.get_running_loop().remove_reader(self._native.fileno())
            self._give_back()
            self._collect()

    def _give_back(self) -> None:
        for room in self._native.take_rooms():
            self._driver.refcounts.reclaim.unused(room.host, room.clusters)
            self._driver.node.not_flushed()

    async def settle(self) -> None:
        """Until the first writes that have begun are over."""
        if self._extents is not None:
            await self._extents.settle(self._extents.start_protect(0, 0))

    # The reserve.

    def _told(self) -> None:
        self._native.acknowledge()
        self._refill_soon()

    def found_room(self) -> None:
        """A first write in Python has: after a refill that failed another one may not."""
        if self._extents is not None and self._writes and not self._want:
            self._want = _LEAST // 2
            self._refill_soon()

    def _refill_soon(self) -> None:
        if self._refilling is None:
            # Counted here: a drain waits for it, whether it has begun or not.
            self._driver.node.begin_background()
            self._refilling = asyncio.ensure_future(self._refill())

    async def _refill(self) -> None:
        try:
            await self._driver.writeback.relieve()
            self._collect()
            if self._link_bytes > _MOST_LINKS:
                await self._driver.writeback.run()
            if self._writes and 2 * self._native.reserve < self._want:
                self._want = min(self._most, 2 * self._want)
            while self._extents is not None and self._writes and (missing := self._want - self._native.reserve) > 0:
                room = await self._driver.refcounts.allocate_any(missing)
                self._native.give([room], self._want // 2)
            if self._writes:
                self._native.give([], self._want // 2)  # it tells again, also when nothing was missing
        except BlockGraphError as error:
            # A write will meet it again, and say so; one that does not has the reserve filled (`found_room`).
            log.debug("node '%s': no reserve for first writes: %s", self._driver.node.name, error)
            self._native.give([], 0)
            self._want = 0
        finally:
            self._refilling = None
            if self._extents is None:
                self._give_back()
            self._driver.node.end_background()

    # The tables.

    def apply(self, index: int) -> bytearray | None:
        """Links for the table of an L1 index, packed, which the caller puts in."""
        if self._native.has_links:
            self._collect()
        links = self._links.pop(index, None) if self._links else None
        if links is not None:
            self._link_bytes -= len(links)
        return links

    def waiting(self, index: int) -> bool:
        """There are links for the table of an L1 index."""
        if self._native.has_links:
            self._collect()
        return index in self._links

    def _collect(self) -> None:
        taken, end = self._native.take_links()
        for index, links in taken:
            self._links.setdefault(index, bytearray()).extend(links)
            self._link_bytes += len(links)
        if self._link_bytes > _MOST_LINKS and self._extents is not None:
            self._refill_soon()
        if end:
            # The file may end inside the last of them, and the map lets native writes to all of it through.
            self.storage.driver.reaches(end)

    def behind(self) -> list[int]:
        """L1 indexes of the tables that lack first writes which are over."""
        if self._native.has_links:
            self._collect()
        return list(self._links)

    async def complete(self, behind: list[int]) -> None:
        """Bring these tables up to date, and take them from the list; no more than may wait to be written back.

        Raises:
            IOFailure, CorruptImage: a table can not be read; what was to be put into it waits.
        """
        mapping = self._driver.mapping
        while behind:
            table = await mapping.table(behind[-1])
            if table is not None:  # or the disk has become shorter
                mapping.catch_up(table)
            behind.pop()
            if mapping.tables.crowded:
                return
