# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Mapping: where guest clusters live. The L1 table is in memory as a whole (at most 32 MiB), L2 tables in a cache.

```
    guest offset   | L1 index | L2 index | offset in cluster |
                        |          |
     L1 (memory) [.. o ..]   L2 [.. DATA host .. ZERO .. COMPRESSED ..]    decoded natively into runs
```

Changes are made in memory; `writeback` decides what reaches the disk when. Entries are judged when they are used, so
one bad entry spoils one cluster. An entry is turned into a run, and a run into entries, here and nowhere else:
subclusters and a data file (host offset = guest offset, refcount 1) change `run` and `set_run`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from blockgraph.errors import CorruptImage
from blockgraph.formats.qcow2.header import COPIED, MAX_L1_BYTES, OFFSET_MASK
from blockgraph.formats.qcow2.image import Image
from blockgraph.formats.qcow2.moves import Moves, Place, SavedMoves
from blockgraph.formats.qcow2.refcount import Refcounts
from blockgraph.formats.qcow2.runs import RunList, cut
from blockgraph.formats.qcow2.tables import WRITE_BLOCK, Table, TableCache
from blockgraph.native import (
    L2Kind,
    L2Parts,
    L2Run,
    count_links,
    decode_few_l2,
    decode_l2,
    link_l2,
    next_nonzero_u64,
    unpack_links,
)

if TYPE_CHECKING:
    from blockgraph.formats.qcow2.first_writes import FirstWrites

_ENTRY = struct.Struct(">Q")
_ZERO_FLAG = 1
#: A table with more runs than this part of its entries is decoded anew around each request: its runs are short.
_RUNS_PART = 32
#: Entries looked at in such a table, at least.
_WINDOW = 16
#: With more new links at once a table is decoded anew when it is next looked at.
_FEW_LINKS = 8


class L2Table(Table):
    """An L2 table; `runs` is None until decoded, or when it has too many of them (`fragmented`)."""

    __slots__ = ("fragmented", "runs")

    def __init__(self, key: int, host: int, buf: bytearray) -> None:
        super().__init__(key, host, buf)
        self.runs: RunList | None = None
        self.fragmented = False


class SavedL1(NamedTuple):
    """What a write-back has to write of the L1 table: (host offset, bytes) pieces; all of it when it
    goes to a new place, which the header must be pointed to (`moves`)."""

    pieces: list[tuple[int, bytes]]
    blocks: set[int]
    moves: SavedMoves


class Mapping:
    """See the module's text.

    Args:
        cache_size: bound on L2 tables in memory, bytes. Decoded runs take at most about as much again.

    Attributes:
        tables: L2 tables by L1 index.
        l1_changes: how often an entry of the L1 table has changed.
    """

    def __init__(self, image: Image, refcounts: Refcounts, cache_size: int) -> None:
        self._image = image
        self._refcounts = refcounts
        self._bits = image.cluster_bits
        self._version = image.header.version
        self._host_bits = OFFSET_MASK & ~(image.cluster_size - 1)
        self.tables: TableCache[L2Table] = TableCache(cache_size, image.cluster_size)
        self._l1 = bytearray()
        self.l1_changes = 0
        self._dirty_l1: set[int] = set()
        self._moves = Moves()
        #: clusters that native writes have placed come from there
        self.first_writes: FirstWrites | None = None

    async def open(self) -> None:
        """Read the L1 table."""
        header = self._image.header
        if header.l1_size:
            self._l1 = await self._image.read(header.l1_offset, header.l1_size * 8)

    # Looking.

    @property
    def l1_size(self) -> int:
        """Entries of the L1 table."""
        return len(self._l1) // 8

    def is_own(self, index: int) -> bool:
        """An L1 entry refers to an L2 table that may be changed in place."""
        return index < self.l1_size and bool(self._l1[index * 8] & 0x80)

    def has_table(self, index: int) -> bool:
        """An L1 entry refers to an L2 table."""
        return index < self.l1_size and self._host(index) != 0

    def _host(self, index: int) -> int:
        """Host offset in an L1 entry, not judged."""
        entry: int = _ENTRY.unpack_from(self._l1, index * 8)[0]
        return entry & OFFSET_MASK

    def l1_entry(self, index: int) -> int:
        """Host offset of an L2 table on disk, judged; 0: there is none.

        Raises:
            CorruptImage: the entry breaks the specification.
        """
        if index >= self.l1_size:
            return 0
        entry = _ENTRY.unpack_from(self._l1, index * 8)[0]
        host: int = entry & OFFSET_MASK
        if host:
            self._image.check_table(f"L1 entry {index}", host)
        if entry & ~(OFFSET_MASK | COPIED):
            raise self._image.corrupt(f"L1 entry {index} is {entry:#x}: reserved bits are set")
        return host

    def parts(self, runs: Sequence[tuple[int, int]]) -> L2Parts:
        """The entries of tables on disk that say where runs (offset, end) are."""
        return L2Parts(runs, self._l1, self._bits, self._image.file_end())

    def l1_offsets(self) -> list[int]:
        """Host offsets of all L2 tables, ordered by L1 index, not judged."""
        count = len(self._l1) // 8
        entries = struct.unpack(f">{count}Q", self._l1)
        return [entry & OFFSET_MASK for entry in entries if entry]

    def next_table(self, index: int) -> int:
        """L1 index of the first L2 table from `index` on; the number of entries when there is none."""
        if index >= self.l1_size:
            return self.l1_size
        found = next_nonzero_u64(self._l1, index)
        return self.l1_size if found is None else found

    async def table(self, index: int) -> L2Table | None:
        """The L2 table of an L1 entry; None: its range is unallocated."""
        table = self.tables.get(index)
        while table is None:
            host = self.l1_entry(index)
            if not host:
                return None
            table = await self._load(index, host)
        return table

    async def _load(self, index: int, host: int) -> L2Table | None:
        """None: look again."""

        async def read() -> L2Table:
            await self._image.file.event("l2_load")
            return L2Table(index, host, await self._image.read(host, self._image.cluster_size))

        return await self.tables.load(index, read)

    def run(self, table: L2Table, index: int, want: int) -> L2Run:
        """The run that entry `index` belongs to; it may begin before it and end before or after `want` entries.

        Raises:
            CorruptImage: the entry breaks the specification.
        """
        if self.first_writes is not None:
            self.catch_up(table)
        if table.runs is None and not table.fragmented:
            most = self._image.l2_entries // _RUNS_PART + _WINDOW
            runs = decode_few_l2(table.buf, self._bits, self._version, most=most)
            if runs is None:
                table.fragmented = True
            else:
                table.runs = RunList(runs, self._bits)
        if table.runs is not None:
            run = table.runs.find(index)
        else:
            run = self._run_from(table, index, min(max(want, _WINDOW), self._image.l2_entries - index))
        return self._judge(table, run, index) if run.kind >= L2Kind.ZERO_ALLOCATED else run

    def _run_from(self, table: L2Table, index: int, most: int) -> L2Run:
        """The run that begins at `index`, up to `most` entries.

        In a fragmented table it mostly is one plain data cluster, or a few unallocated ones, which take less time here
        than a native call.
        """
        entry = _ENTRY.unpack_from(table.buf, index * 8)[0]
        if entry == 0:
            kind, step = L2Kind.UNALLOCATED, 0
        elif entry & ~self._host_bits == COPIED and entry != COPIED:
            kind, step = L2Kind.DATA, self._image.cluster_size
        else:
            return decode_l2(table.buf, self._bits, self._version, start=index, end=index + most)[0]
        count, after = 1, entry + step
        for (other,) in _ENTRY.iter_unpack(memoryview(table.buf)[(index + 1) * 8 : (index + most) * 8]):
            if other != after:
                break
            count += 1
            after += step
        return L2Run(index, count, kind, entry & self._host_bits, entry != 0, 0)

    def _judge(self, table: L2Table, run: L2Run, index: int) -> L2Run:
        """The part of the run, around `index`, that lies inside the file."""
        if run.kind == L2Kind.INVALID:
            raise self._bad_entry(table, index, "breaks the format")
        if run.host_offset < self._image.cluster_size:
            raise self._bad_entry(table, index, "points into the header")
        end = self._image.file_end()
        if run.kind == L2Kind.COMPRESSED:
            # Its last sector may reach past the file's end.
            if run.host_offset >= end or run.host_offset + run.compressed_length > end + self._image.cluster_size:
                raise self._bad_entry(table, index, "points outside the file")
        elif run.host_offset + (run.clusters << self._bits) > end:
            inside = max(0, end - run.host_offset) >> self._bits
            if run.first + inside <= index:
                raise self._bad_entry(table, index, "points outside the file")
            return run._replace(clusters=inside)
        return run

    def _bad_entry(self, table: L2Table, index: int, why: str) -> CorruptImage:
        entry = _ENTRY.unpack_from(table.buf, index * 8)[0]
        guest = ((table.key << self._image.l2_bits) + index) << self._bits
        return self._image.corrupt(f"L2 entry {index} of table {table.key} is {entry:#x}, which {why}", guest)

    def runs(self, table: L2Table, start: int, end: int) -> list[L2Run]:
        """Entries [start, end) as runs.

        Raises:
            CorruptImage: one of them breaks the specification.
        """
        found = []
        while start < end:
            run = self.run(table, start, end - start)
            stop = min(end, run.first + run.clusters)
            found.append(cut(run, start, stop, self._bits))
            start = stop
        return found

    # Changing, in memory.

    async def table_for_write(self, index: int) -> L2Table:
        """The L2 table of an L1 entry, made when there is none, copied when it is not only ours.

        Raises:
            NoSpace: no cluster for a new table.
        """
        while True:
            if self._l1[index * 8] & 0x80:
                table = await self.table(index)
                if table is not None:
                    return table
                raise self._image.corrupt(f"L1 entry {index} has the copied flag and no table")
            host = self.l1_entry(index)
            if host:
                await self._copy_table(index, host)
            else:
                await self._image.file.event("l2_alloc_write")
                new = (await self._refcounts.allocate(1)).host
                if self._host(index):  # somebody else was faster
                    self._refcounts.reclaim.unused(new, 1)
                    continue
                self._link(L2Table(index, new, bytearray(self._image.cluster_size)))

    async def _copy_table(self, index: int, host: int) -> None:
        """Give the entry a table of its own, unless somebody else was faster: look again."""
        old = await self._load(index, host)
        if old is None:
            return
        new = (await self._refcounts.allocate(1)).host
        if self._host(index) != host:
            self._refcounts.reclaim.unused(new, 1)
            return
        self._link(L2Table(index, new, bytearray(old.buf)))
        self._refcounts.overlaps.remove(host)
        self._refcounts.reclaim.unlink(host, 1)

    def _link(self, table: L2Table) -> None:
        self._refcounts.overlaps.add(table.host, 1)
        self.tables.add_new(table)
        self._set_l1(table.key, table.host | COPIED)

    def _set_l1(self, index: int, entry: int) -> None:
        _ENTRY.pack_into(self._l1, index * 8, entry)
        self.l1_changes += 1
        self._dirty_l1.add(index * 8 // WRITE_BLOCK)

    def set_run(self, table: L2Table, run: L2Run) -> None:
        """Make the table's entries what `run` says: UNALLOCATED, ZERO, ZERO_ALLOCATED or DATA; the last two copied."""
        start, end = run.first * 8, (run.first + run.clusters) * 8
        if run.kind in (L2Kind.DATA, L2Kind.ZERO_ALLOCATED):
            first = run.host_offset | COPIED | (_ZERO_FLAG if run.kind == L2Kind.ZERO_ALLOCATED else 0)
            step = self._image.cluster_size
            entries = struct.pack(f">{run.clusters}Q", *range(first, first + run.clusters * step, step))
        else:
            entries = _ENTRY.pack(_ZERO_FLAG if run.kind == L2Kind.ZERO else 0) * run.clusters
        table.buf[start:end] = entries
        self.tables.touch(table, start, end)
        guest = ((table.key << self._image.l2_bits) + run.first) << self._bits
        self._image.node.revoke(guest, run.clusters << self._bits)
        if table.runs is not None:
            table.runs.replace(run)
            self._bound_runs(table)

    def catch_up(self, table: L2Table) -> None:
        """Put in what native code has placed, or made zero. The maps know already.

        Raises:
            CorruptImage: an entry is not what it was when that was done.
        """
        links = None if self.first_writes is None else self.first_writes.apply(table.key)
        if not links:
            return
        try:
            low, high = link_l2(table.buf, self._bits, links)
        except ValueError as error:
            table.runs = None
            self.tables.touch(table, 0, len(table.buf))
            raise self._image.corrupt(f"L2 table {table.key} has changed under native writes") from error
        if count_links(links) > _FEW_LINKS:
            table.runs = None
        elif table.runs is not None:
            for guest, host, clusters, zero in unpack_links(links):
                first = (guest >> self._bits) & (self._image.l2_entries - 1)
                kind = L2Kind.ZERO_ALLOCATED if zero else L2Kind.DATA
                table.runs.replace(L2Run(first, clusters, kind, host, True, 0))
        self.tables.touch(table, low * 8, high * 8)
        self._bound_runs(table)

    def is_behind(self, index: int) -> bool:
        """The table lacks what native writes have placed; it gets that when it is looked at."""
        return self.first_writes is not None and self.first_writes.waiting(index)

    def _bound_runs(self, table: L2Table) -> None:
        if table.runs is not None and len(table.runs) > self._image.l2_entries // _RUNS_PART + _WINDOW:
            table.runs = None
            table.fragmented = True

    async def drop_tables(self, first: int) -> None:
        """Unlink the L2 tables from L1 index `first` on; their clusters have been unlinked before."""
        index = self.next_table(first)
        while index < self.l1_size:
            host = self._host(index)
            self.tables.forget(index)
            self._set_l1(index, 0)
            self._refcounts.overlaps.remove(host)
            self._refcounts.reclaim.unlink(host, 1)
            index = self.next_table(index + 1)

    async def grow_l1(self, entries: int) -> None:
        """Have at least `entries` L1 entries: in place where its clusters have room, else in a new place.

        Raises:
            NoSpace: no room, or the table would be too large.
        """
        header = self._image.header
        if entries <= self.l1_size:
            return
        assert entries * 8 <= MAX_L1_BYTES
        old = self.l1_size
        clusters = -(-old * 8 >> self._bits)
        if entries * 8 > clusters << self._bits:
            await self._image.file.event("l1_grow_alloc_table")
            needed = -(-entries * 8 >> self._bits)
            host = await self._refcounts.allocate_all(needed)
            self._refcounts.overlaps.add(host, needed)
            if clusters:
                self._refcounts.overlaps.remove(header.l1_offset, clusters)
            for place in self._moves.move(Place(header.l1_offset, clusters) if clusters else None):
                self._refcounts.reclaim.unused(*place)
            header.l1_offset = host
        self._l1.extend(bytes((entries - old) * 8))
        header.l1_size = entries
        self._dirty_l1.update(range(old * 8 // WRITE_BLOCK, -(-entries * 8 // WRITE_BLOCK)))

    # Write-back.

    @property
    def l1_dirty(self) -> bool:
        """The L1 table differs from the disk."""
        return bool(self._dirty_l1) or self._moves.moved

    def save_l1(self) -> SavedL1 | None:
        """What differs from the disk, as it is now; follow with `settle_l1` or `restore_l1`."""
        if not self.l1_dirty:
            return None
        offset = self._image.header.l1_offset
        room = -(-len(self._l1) >> self._bits) << self._bits
        if self._moves.moved:
            pieces = [(offset, bytes(self._l1).ljust(room, b"\0"))]
        else:
            pieces = []
            for block in sorted(self._dirty_l1):
                start = block * WRITE_BLOCK
                data = bytes(self._l1[start : start + WRITE_BLOCK])
                pieces.append((offset + start, data.ljust(min(WRITE_BLOCK, room - start), b"\0")))
        saved = SavedL1(pieces, self._dirty_l1, self._moves.save())
        self._dirty_l1 = set()
        return saved

    def settle_l1(self, saved: SavedL1) -> None:
        """It is on disk, and the header points to it."""
        for place in self._moves.settle(saved.moves):
            self._refcounts.reclaim.unused(*place)

    def restore_l1(self, saved: SavedL1) -> None:
        """It may not be on disk."""
        self._dirty_l1 |= saved.blocks
        self._moves.restore(saved.moves)
