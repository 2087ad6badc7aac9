# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""WriteBack: how metadata changed in memory reaches the disk, so that the image is consistent whatever of the writes
between two flushes a crash leaves out.

```
    refcount blocks │ refcount table │ (header) │ data   │ L2 tables │ L1 entries │ (header)
      and data      │                │          │ durable│           │            │
                  flush            flush      flush    flush       flush        flush ──► old clusters may be freed
```

Steps with nothing to write, and their flush, are left out. An entry is thus on disk only after what it refers to, and
after the refcount that keeps others away; a crash leaves at worst clusters that are counted and not used (leaks).

All parts are copied when a write-back begins, so requests go on changing the tables meanwhile, and nothing that came
later can slip into a step without the steps before it.
"""

from __future__ import annotations

import asyncio

from blockgraph.formats.qcow2.header import REFTABLE, SIZE_AND_L1
from blockgraph.formats.qcow2.image import Image, run_all
from blockgraph.formats.qcow2.mapping import L2Table, Mapping, SavedL1
from blockgraph.formats.qcow2.refcount import Refcounts, SavedTable
from blockgraph.formats.qcow2.tables import Saved, T, Table


class WriteBack:
    """See the module's text."""

    def __init__(self, image: Image, refcounts: Refcounts, mapping: Mapping) -> None:
        self._image = image
        self._refcounts = refcounts
        self._mapping = mapping
        self._lock = asyncio.Lock()
        self._begun = 0
        self._done = 0
        self._header = image.header.pack_size_and_l1()

    async def run(self) -> None:
        """Make durable: all data written to the file and all metadata changed before the call.

        Raises:
            IOFailure: some of it is not durable; the metadata stays in memory and is written by a later run.
        Cancelled: goes on in the background; draining the node waits for it.
        """
        if self._pending():
            await self._image.node.touched()
        task = asyncio.ensure_future(self._counted(self._begun))
        task.add_done_callback(_look)
        await asyncio.shield(task)

    def _pending(self) -> bool:
        refcounts, mapping, places = self._refcounts, self._mapping, self._mapping.first_writes
        return bool(
            refcounts.blocks.dirty
            or mapping.tables.dirty
            or mapping.l1_dirty
            or refcounts.reclaim.pending
            or (places is not None and places.behind())
        )

    async def relieve(self) -> None:
        """Write back when so much is dirty, or waits to be freed, that no more should be added."""
        if self._refcounts.blocks.crowded or self._mapping.tables.crowded or self._refcounts.reclaim.many:
            await self.run()

    async def _counted(self, begun: int) -> None:
        self._image.node.begin_background()
        try:
            async with self._lock:
                if self._done > begun:
                    return  # one that began after we were called has done it
                self._begun += 1
                number = self._begun
                await self._run()
                self._done = number
        finally:
            self._image.node.end_background()

    async def _run(self) -> None:
        places = self._mapping.first_writes
        behind = [] if places is None else places.behind()
        while places is not None and behind:
            await places.complete(behind)
            if behind:
                await self._write()
        await self._write()

    async def _write(self) -> None:
        refcounts, mapping, reclaim = self._refcounts, self._mapping, self._refcounts.reclaim
        blocks = refcounts.blocks.save()
        table = refcounts.save_table()
        l2 = mapping.tables.save()
        l1 = mapping.save_l1()
        header = self._image.header.pack_size_and_l1()
        freed = reclaim.save()
        try:
            await self._write_counts(blocks, table)
            await self._image.file.flush()
            await self._write_mapping(l2, l1, header)
        except BaseException:
            refcounts.blocks.restore(blocks)
            mapping.tables.restore(l2)
            reclaim.restore(freed)
            if table is not None:
                refcounts.restore_table(table)
            if l1 is not None:
                mapping.restore_l1(l1)
            raise
        refcounts.blocks.settle(blocks)
        mapping.tables.settle(l2)
        if table is not None:
            refcounts.settle_table(table)
        if l1 is not None:
            mapping.settle_l1(l1)
        reclaim.settle(freed)
        if await reclaim.release():
            # What dropped to 0 may reach the disk at any time; now, so that nothing is left behind.
            await self._write_counts_only()

    async def _write_counts(self, blocks: list[Saved[Table]], table: SavedTable | None) -> None:
        image = self._image
        if blocks:
            await image.file.event("refblock_update_part")
            await self._write_tables(blocks)
        if table is not None:
            await image.file.flush()
            await image.file.event("reftable_update")
            await run_all([image.write(offset, data) for offset, data in table.pieces])
            if table.header is not None:
                await image.file.flush()
                await image.file.event("refblock_alloc_switch_table")
                await image.write(REFTABLE, table.header)

    async def _write_mapping(self, l2: list[Saved[L2Table]], l1: SavedL1 | None, header: bytes) -> None:
        image = self._image
        if l2:
            await image.file.event("l2_update")
            await self._write_tables(l2)
        if l1 is not None:
            if l2:
                await image.file.flush()
            await image.file.event("l1_update")
            await run_all([image.write(offset, data) for offset, data in l1.pieces])
        if header != self._header:
            if l2 or l1 is not None:
                await image.file.flush()
            await image.file.event("l1_grow_activate_table")
            await image.write(SIZE_AND_L1, header)
        elif not l2 and l1 is None:
            return
        await image.file.flush()
        self._header = header

    async def _write_counts_only(self) -> None:
        blocks = self._refcounts.blocks.save()
        try:
            await self._write_tables(blocks)
        except BaseException:
            self._refcounts.blocks.restore(blocks)
            raise
        self._refcounts.blocks.settle(blocks)

    async def _write_tables(self, saved: list[Saved[T]]) -> None:
        image = self._image
        if saved:
            await run_all([image.write(table.host + start, data) for table, start, data in saved])

    async def close(self) -> None:
        """Write everything back; no request is in flight.

        Raises: as `run`.
        """
        while True:
            waiting = self._refcounts.reclaim.pending
            await self.run()
            if not waiting:
                return


def _look(task: asyncio.Future[None]) -> None:
    """A failure that nobody waits for any more: the next run finds it again."""
    if not task.cancelled():
        task.exception()
