# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Refcounts: which host clusters are in use, and the allocation of free ones. 16-bit counts.

```
    refcount table (memory) [.. block .. block ..]      block = one cluster of 16-bit counts, in a cache
```

A refcount block that does not exist yet means that all clusters it would count are free: a new one is put into the
first of these, so it counts itself. When the table is full, a larger one is built in such an unused area together with
the blocks that count it. All in memory; `writeback` brings blocks to disk before the table, a moved table before the
header, and all of it before any entry that refers to a new cluster.

Free clusters are looked for from a hint upwards. Requests for many clusters pass over holes shorter than 1 MiB, which
are left to requests for one cluster (tables, small writes).
"""

from __future__ import annotations

import asyncio
import logging
import struct
import sys
from array import array
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from blockgraph.errors import NoSpace
from blockgraph.formats.qcow2.header import MAX_REFTABLE_BYTES, OFFSET_MASK
from blockgraph.formats.qcow2.image import Image
from blockgraph.formats.qcow2.moves import Moves, Place, SavedMoves
from blockgraph.formats.qcow2.overlaps import Overlaps
from blockgraph.formats.qcow2.reclaim import Reclaim
from blockgraph.formats.qcow2.tables import WRITE_BLOCK, Table, TableCache
from blockgraph.native import free_run_refcount16

log = logging.getLogger(__name__)

_ENTRY = struct.Struct(">Q")
_ONE = b"\0\1"
#: Bytes: a hole at least this long serves any request.
_GOOD_RUN = 1 << 20


class SavedTable(NamedTuple):
    """What a write-back has to write of the refcount table: (host offset, bytes) pieces; `header` its fields there when
    it moved."""

    pieces: list[tuple[int, bytes]]
    blocks: set[int]
    header: bytes | None
    moves: SavedMoves


class Room(NamedTuple):
    """Clusters taken.

    Attributes:
        host: host offset.
        clusters: how many.
        fresh: they read as zeroes: nothing was ever written there.
    """

    host: int
    clusters: int
    fresh: bool


class Refcounts:
    """See the module's text.

    Attributes:
        blocks: refcount blocks by index in the refcount table.
        overlaps: clusters with metadata.
        reclaim: clusters on their way to being free.
    """

    def __init__(self, image: Image, cache_size: int) -> None:
        self._image = image
        self._bits = image.cluster_bits
        self._per_block = image.cluster_size // 2
        self.blocks: TableCache[Table] = TableCache(cache_size, image.cluster_size)
        self.overlaps = Overlaps(image.cluster_bits)
        self.reclaim = Reclaim(image.node, image.cluster_size, self.free)
        self._table = bytearray()
        self._dirty_table: set[int] = set()
        self._moves = Moves()
        self._lock = asyncio.Lock()
        self._hint_one = 0
        self._hint_many = 0
        #: from this host offset on nothing was ever written
        self._fresh = 0

    async def open(self) -> None:
        """Read the refcount table."""
        header = self._image.header
        self._table = await self._image.read(header.reftable_offset, header.reftable_clusters << self._bits)
        growable = self._image.file.node.driver.growable
        self._fresh = self._image.file_end() if growable else 1 << 63

    def table_offsets(self) -> list[int]:
        """Host offsets of all refcount blocks, not judged."""
        count = len(self._table) // 8
        return [entry & OFFSET_MASK for entry in struct.unpack(f">{count}Q", self._table) if entry]

    # Blocks.

    async def count_used(self) -> int:
        """Clusters of the file that are in use. Reads every refcount block."""
        used, clusters = 0, self._image.file_end() >> self._bits
        for index in range(min(self._entries(), -(-clusters // self._per_block))):
            block = await self._block(index)
            if block is not None:
                counts = array("H", block.buf)[: clusters - index * self._per_block]
                used += len(counts) - counts.count(0)
        return used

    def _entries(self) -> int:
        return len(self._table) // 8

    def _entry(self, index: int) -> int:
        """Host offset of a refcount block, judged; 0: there is none."""
        entry: int = _ENTRY.unpack_from(self._table, index * 8)[0] if index < self._entries() else 0
        if entry:
            self._image.check_table(f"refcount table entry {index}", entry)
        return entry

    async def _block(self, index: int) -> Table | None:
        block = self.blocks.get(index)
        while block is None:
            host = self._entry(index)
            if not host:
                return None

            async def read(host: int = host) -> Table:
                await self._image.file.event("refblock_load")
                return Table(index, host, await self._image.read(host, self._image.cluster_size))

            block = await self.blocks.load(index, read)
        return block

    def add_block(self, index: int, host: int) -> Table:
        """A new block, all zeroes, at a host offset that the caller counts."""
        self.overlaps.add(host, 1)
        block = Table(index, host, bytearray(self._image.cluster_size))
        self.blocks.add_new(block)
        _ENTRY.pack_into(self._table, index * 8, host)
        self._dirty_table.add(index * 8 // WRITE_BLOCK)
        return block

    # Allocating.

    async def allocate(self, want: int) -> Room:
        """Take 1 to `want` free clusters in a row; their refcounts are 1.

        Raises:
            NoSpace: the file can not grow, or the refcount table is at its largest.
            CorruptImage: a cluster counted as free holds metadata.
        """
        return await self._reclaiming(self._allocate, want)

    async def allocate_any(self, want: int) -> Room:
        """Take the first free clusters there are, up to `want` in a row, however few that are.

        Raises: as `allocate`.
        """
        return await self._reclaiming(self._allocate_any, want)

    async def _reclaiming(self, allocate: Callable[[int], Awaitable[Room]], want: int) -> Room:
        """Free what is ready before; wait for what others are about to free only when there is no room without."""
        await self.reclaim.release()
        try:
            return await allocate(want)
        except NoSpace:
            if not await self.reclaim.released():
                raise
        await self.reclaim.release()
        return await allocate(want)

    async def _allocate(self, want: int) -> Room:
        async with self._lock:
            if want == 1:
                first, count = await self._find(self._hint_one, 1)
                self._hint_one = first + 1
            else:
                first, count = await self._find(self._hint_many, want)
                self._hint_many = first + count
            return await self._claim(first, count)

    async def _allocate_any(self, want: int) -> Room:
        async with self._lock:
            first, count = await self._find(self._hint_one, want, 1)
            self._hint_one = first + count
            return await self._claim(first, count)

    async def allocate_all(self, want: int) -> int:
        """Take `want` free clusters in a row, neither more nor fewer, for a table; returns their host offset.

        Raises: as `allocate`.
        """
        async with self._lock:
            if want < self._per_block:
                first = 0
                while True:
                    first, count = await self._find(first, want)
                    if count == want:
                        return (await self._claim(first, count)).host
                    first += count
            blocks = self._blocks_for(want)
            while self._first_unused_block() + blocks > self._entries():
                await self._grow(self._first_unused_block() + blocks)
            index = self._first_unused_block()
            await self._check_room(index * self._per_block << self._bits, blocks + want)
            return self._claim_area(index, blocks, want)

    async def _check_room(self, host: int, clusters: int) -> None:
        """Before anything is claimed: no metadata there, and the file can hold it."""
        metadata = self.overlaps.find(host, clusters << self._bits)
        if metadata is not None:
            raise await self._image.damage(f"the refcount of the metadata cluster at {metadata:#x} is 0")
        await self._image.reserve(host + (clusters << self._bits))

    async def _claim(self, first: int, count: int) -> Room:
        """Set refcounts from 0 to 1, inside one block."""
        host = first << self._bits
        await self._check_room(host, count)
        if count > 1:
            await self._image.reach(host + (count << self._bits))
        index, at = divmod(first, self._per_block)
        block = await self._block(index)
        assert block is not None
        block.buf[2 * at : 2 * (at + count)] = _ONE * count
        self.blocks.touch(block, 2 * at, 2 * (at + count))
        room = Room(host, count, host >= self._fresh)
        self._fresh = max(self._fresh, host + (count << self._bits))
        return room

    async def _find(self, first: int, want: int, enough: int | None = None) -> tuple[int, int]:
        """Free clusters from cluster `first` on: the first run that is long enough, inside one block.

        Args:
            enough: clusters that are; default: `want`, or a good run's.
        """
        if enough is None:
            enough = min(want, max(1, _GOOD_RUN >> self._bits))
        index, at = divmod(first, self._per_block)
        while True:
            block = await self._block(index)
            if block is None:
                block = await self._new_block(index)
            found, length = free_run_refcount16(block.buf, enough, at)
            if length == enough:
                return index * self._per_block + found, self._extend(block, found, length, want)
            index, at = index + 1, 0

    def _extend(self, block: Table, at: int, length: int, want: int) -> int:
        """Length of the free run at `at`, of which `length` are known, up to `want`."""
        if length < want:
            counts = bytes(memoryview(block.buf)[2 * (at + length) : 2 * (at + want)])
            length += (len(counts) - len(counts.lstrip(b"\0"))) // 2
        return length

    async def _new_block(self, index: int) -> Table:
        """A block where there was none, in the first cluster that it counts."""
        if index >= self._entries():
            await self._grow(index + 1)
            block = await self._block(index)
            if block is not None:
                return block
        await self._image.file.event("refblock_alloc")
        host = index * self._per_block << self._bits
        await self._check_room(host, 1)
        self._fresh = max(self._fresh, host + self._image.cluster_size)
        block = self.add_block(index, host)
        block.buf[:2] = _ONE
        return block

    # Large areas, and the refcount table itself.

    def _first_unused_block(self) -> int:
        """Index behind the last refcount block."""
        used = self._table.rstrip(b"\0")
        return -(-len(used) // 8)

    def _blocks_for(self, clusters: int) -> int:
        """Blocks that count an area of so many clusters and themselves."""
        blocks = 1
        while blocks * self._per_block < clusters + blocks:
            blocks += 1
        return blocks

    def _claim_area(self, index: int, blocks: int, clusters: int) -> int:
        """Take an area where no refcount block exists: first its blocks, then the clusters asked for.

        Returns: host offset of the latter.
        """
        first = index * self._per_block
        for i in range(blocks):
            block = self.add_block(index + i, (first + i) << self._bits)
            used = min(max(blocks + clusters - i * self._per_block, 0), self._per_block)
            block.buf[: 2 * used] = _ONE * used
        self._fresh = max(self._fresh, (first + blocks + clusters) << self._bits)
        return (first + blocks) << self._bits

    async def _grow(self, entries: int) -> None:
        """A larger refcount table with room for `entries` and for what counts the table itself."""
        await self._image.file.event("reftable_grow")
        old_bytes = len(self._table)
        index = self._entries()
        clusters = -(-max(entries * 8, old_bytes * 3 // 2) >> self._bits)
        while True:
            blocks = self._blocks_for(clusters)
            if (index + blocks) * 8 <= clusters << self._bits:
                break
            clusters += 1
        if clusters << self._bits > MAX_REFTABLE_BYTES:
            raise NoSpace(
                f"the refcount table can not grow beyond {MAX_REFTABLE_BYTES} bytes",
                node=self._image.node.name,
                hint="convert the image to a larger cluster size",
            )
        await self._check_room(index * self._per_block << self._bits, blocks + clusters)
        header = self._image.header
        self._table.extend(bytes((clusters << self._bits) - old_bytes))
        host = self._claim_area(index, blocks, clusters)
        self.overlaps.add(host, clusters)
        self.overlaps.remove(header.reftable_offset, header.reftable_clusters)
        for place in self._moves.move(Place(header.reftable_offset, header.reftable_clusters)):
            self.reclaim.unused(*place)
        header.reftable_offset = host
        header.reftable_clusters = clusters

    # Replacing them all.

    async def replace(self, counts: dict[int, array[int]], relieve: Callable[[], Awaitable[None]]) -> None:
        """Make all refcounts what a walk over the image has found.

        Args:
            counts: by index in the refcount table, one number per cluster; 0 for all others. Completed here by the
                blocks that have to be made.
            relieve: writes back when much is dirty.
        Raises:
            NoSpace: the refcount table has no room.
        """
        missing = [index for index in counts if not self._entry(index)]
        while missing:
            index = missing.pop()
            if index >= self._entries():
                raise NoSpace(
                    "the refcount table is too small for the file",
                    node=self._image.node.name,
                    hint="run 'qemu-img check -r all' on the image",
                )
            cluster = self._free_in(counts)
            if cluster is None:
                new = max(*counts, self._first_unused_block() - 1) + 1
                counts[new] = array("H", bytes(2 * self._per_block))
                missing.append(new)
                cluster = new * self._per_block
            home, at = divmod(cluster, self._per_block)
            counts[home][at] = 1
            await self._image.reserve((cluster + 1) << self._bits)
            self._fresh = max(self._fresh, (cluster + 1) << self._bits)
            self.add_block(index, cluster << self._bits)
        for index in range(self._first_unused_block()):
            block = await self._block(index)
            if block is not None:
                found = array("H", counts.get(index, bytes(2 * self._per_block)))
                if sys.byteorder == "little":
                    found.byteswap()
                if block.buf != found.tobytes():
                    block.buf[:] = found.tobytes()
                    self.blocks.touch(block, 0, len(block.buf))
                await relieve()

    def _free_in(self, counts: dict[int, array[int]]) -> int | None:
        for index, block in counts.items():
            if 0 in block:
                return index * self._per_block + block.index(0)
        return None

    # Freeing.

    async def free(self, host: int, clusters: int) -> None:
        """Drop refcounts by one; those that reach 0 are free at once (see Reclaim for when that is right).

        Raises:
            CorruptImage: a refcount was 0 already; it stays, the others drop.
        """
        first = host >> self._bits
        async with self._lock:
            while clusters:
                index, at = divmod(first, self._per_block)
                count = min(clusters, self._per_block - at)
                await self._drop(index, at, count)
                first += count
                clusters -= count

    async def _drop(self, index: int, at: int, count: int) -> None:
        block = await self._block(index)
        if block is None:
            raise self._image.corrupt(f"the refcount of the cluster {index * self._per_block + at} in use is 0")
        low, high = 2 * at, 2 * (at + count)
        counts = bytes(memoryview(block.buf)[low:high])
        wrong = False
        if counts == _ONE * count:
            block.buf[low:high] = bytes(high - low)
        else:
            old = struct.unpack(f">{count}H", counts)
            wrong = 0 in old
            block.buf[low:high] = struct.pack(f">{count}H", *[max(0, n - 1) for n in old])
        self.blocks.touch(block, low, high)
        first = index * self._per_block + at
        self._hint_one = min(self._hint_one, first)
        self._hint_many = min(self._hint_many, first)
        if wrong:
            raise self._image.corrupt(f"the refcount of a cluster in use near {first << self._bits:#x} is 0")

    # Write-back.

    def save_table(self) -> SavedTable | None:
        """What of the table differs from the disk, as it is now; follow with `settle_table` or `restore_table`."""
        if not self._dirty_table and not self._moves.moved:
            return None
        header = self._image.header
        offset = header.reftable_offset
        if self._moves.moved:
            pieces = [(offset, bytes(self._table))]
        else:
            pieces = [
                (offset + block * WRITE_BLOCK, bytes(self._table[block * WRITE_BLOCK : (block + 1) * WRITE_BLOCK]))
                for block in sorted(self._dirty_table)
            ]
        moved = header.pack_reftable() if self._moves.moved else None
        saved = SavedTable(pieces, self._dirty_table, moved, self._moves.save())
        self._dirty_table = set()
        return saved

    def settle_table(self, saved: SavedTable) -> None:
        """It is on disk, and the header points to it."""
        for place in self._moves.settle(saved.moves):
            self.reclaim.unused(*place)

    def restore_table(self, saved: SavedTable) -> None:
        """It may not be on disk."""
        self._dirty_table |= saved.blocks
        self._moves.restore(saved.moves)
