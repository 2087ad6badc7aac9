# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""log-writes (alias blklogwrites): a filter that records every write, so that a crash can be replayed at any point.

        qcow2 --> log-writes --file--> disk.qcow2
                      |
                      +------log-----> writes.log     write 7 | write 8 | FLUSH | mark "snapshot taken" | write 9 ...

The log has the format of the kernel's dm-log-writes: xfstests' `replay-log` reads it; `blockgraph.testing.write_log`
replays it and makes crash states from it.

What the log promises: entries stand in the order in which they took effect (replaying all of them gives the disk's
bytes), an entry is there before its request completes, and everything before a FLUSH entry is durable. A write that
completes while a flush is under way is logged after that flush, because the flush may have missed it. A request that
failed is not logged. A write that ends inside the disk's last sector is logged as a whole sector, its length beside it
in the entry's `data_len`, which other readers do not look at. A change of size is logged as a mark,
`blockgraph-truncate SIZE`, which other readers skip.

Options:

    file                        the disk
    log                         where the log goes; it grows, or has room
    log-sector-size             unit of the log and of requests, bytes, a power of two from 512 (default) to 8388608
    log-append                  go on with the log that is there (its sector size counts then) instead of a new one
    log-super-update-interval   entries after which the log's super block is written without a flush (default 4096)

Example:

    [[nodes]]
    node-name = "recorded"
    driver = "log-writes"
    file = {driver = "file", filename = "disk.qcow2"}
    log = {driver = "file", filename = "writes.log"}

`mark(text)` puts a text into the log, `sync_log()` makes all of it readable while the node is open.

Limits: overlapping writes go one after the other, and the log is written by one request at a time. Write-zeroes is
logged as a write of zeroes (sparse, if the log can be). A log that can not be written fails the request, after the
disk was written.
Source: QEMU BlockdevOptionsBlklogwrites.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated

import msgspec

from blockgraph.driver import ChildSpec, Filter
from blockgraph.errors import CorruptImage, OptionError, OutOfRange
from blockgraph.filters.log_format import (
    MAX_SECTOR,
    MIN_SECTOR,
    TRUNCATE_MARK,
    Entry,
    LogFlag,
    Super,
    max_mark,
    pack_entry,
    pack_super,
    sector_size_valid,
    unpack_entry,
    unpack_super,
)
from blockgraph.filters.range_lock import RangeLock
from blockgraph.flags import Flag
from blockgraph.node import Child
from blockgraph.options import NodeOptions, NodeRef
from blockgraph.perm import Role


class LogWritesOptions(NodeOptions, kw_only=True, frozen=True):
    """See the module's text."""

    file: NodeRef
    log: NodeRef
    log_sector_size: int | None = None
    log_append: bool = False
    log_super_update_interval: Annotated[int, msgspec.Meta(ge=1)] = 4096


def _check_sector_size(options: LogWritesOptions, node: str | None = None) -> None:
    size = options.log_sector_size
    if options.log_append and size is not None:
        reason = "can not be given together with log-append: the log has one already"
        raise OptionError(reason, path="log-sector-size", value=size, node=node)
    if size is not None and not sector_size_valid(size):
        reason = f"must be a power of two from {MIN_SECTOR} to {MAX_SECTOR}"
        raise OptionError(reason, path="log-sector-size", value=size, node=node)


class LogWrites(Filter):
    """See the module's text."""

    name = "log-writes"
    aliases = ("blklogwrites",)
    children = {"file": ChildSpec(Role.FILTERED | Role.PRIMARY), "log": ChildSpec(Role.METADATA)}
    Options = LogWritesOptions
    options: LogWritesOptions

    log: Child

    # Control path.

    @classmethod
    def known_size(cls, options: NodeOptions, sizes: Mapping[str, int]) -> int | None:
        assert isinstance(options, LogWritesOptions)
        _check_sector_size(options)
        return super().known_size(options, sizes)

    async def open(self) -> None:
        self._ranges = RangeLock()
        self._appending = asyncio.Lock()
        self._flushing = asyncio.Lock()
        self._flush_end: asyncio.Event | None = None
        self._sector_size = self.options.log_sector_size or MIN_SECTOR
        self._entries = 0
        self._next_sector = 1
        self._super_entries: int | None = None  # as stored; None: nothing of this log is stored yet
        self._found_end = not self.options.log_append
        _check_sector_size(self.options, self.node.name)

    async def _find_end(self) -> None:
        """Walk the entries of the log that is there; an empty node is a new log."""
        if not self.log.node.size():
            return
        self._entries, self._sector_size = unpack_super(await self._read_log(0, MIN_SECTOR))
        self._super_entries = self._entries
        room = self.log.node.size() // self._sector_size
        for index in range(self._entries):
            if self._next_sector >= room:
                raise CorruptImage(
                    f"write log ends before entry {index} of {self._entries}", node=self.log.node.name, op="open"
                )
            entry = unpack_entry(await self._read_log(self._next_sector * self._sector_size, MIN_SECTOR))
            self._next_sector += 1 + entry.data_sectors

    async def _read_log(self, offset: int, length: int) -> memoryview:
        buf = memoryview(bytearray(length))
        await self.log.pread(offset, buf)
        return buf

    async def attached(self) -> None:
        await super().attached()
        if not self._found_end:
            await self._find_end()
            self._found_end = True
        self.request_alignment = max(type(self).request_alignment, self._sector_size)

    async def close(self) -> None:
        await self.sync_log()

    # The log.

    async def sync_log(self) -> None:
        """Let the stored log be complete up to here; before, it is complete up to the last flush, at least.

        Raises: IOFailure: the log could not be written.
        """
        if self._super_entries is not None and self._super_entries != self._entries:
            await self._store_super()

    async def mark(self, text: str) -> None:
        """Put a text into the log, after everything that has completed.

        Raises:
            OutOfRange: longer than fits into a sector.
            IOFailure: the log could not be written.
        """
        raw = text.encode()
        longest = max_mark(self._sector_size)
        if len(raw) > longest:
            raise OutOfRange(f"mark of {len(raw)} bytes, at most {longest} fit", node=self.node.name, op="mark")
        async with self._appending:
            await self._append(Entry(0, 0, LogFlag.MARK, raw))
            await self._store_super()

    async def _logged(self, offset: int, length: int, flags: LogFlag, data: memoryview | None) -> None:
        """Log a request that has just been done."""
        while self._flush_end is not None:
            await self._flush_end.wait()
        size = self._sector_size
        entry = Entry(offset // size, -(-length // size), flags, odd_length=length if length % size else 0)
        async with self._appending:
            await self._append(entry, data)

    async def _append(self, entry: Entry, data: memoryview | None = None) -> None:
        """Write an entry at the end; without data, zeroes. The caller holds `_appending`."""
        size = self._sector_size
        if self._super_entries is None:
            await self._store_super()  # a log of an earlier run must not be taken for this one
        at = self._next_sector * size
        await self.log.pwrite(at, memoryview(pack_entry(entry, size)))
        if data is not None:
            await self.log.pwrite(at + size, data)
            if entry.odd_length:
                await self.log.pwrite(at + size + len(data), memoryview(bytes(-len(data) % size)))
        elif entry.data_sectors:
            await self.log.pwrite_zeroes(at + size, entry.data_sectors * size, Flag.MAY_UNMAP)
        self._next_sector += 1 + entry.data_sectors
        self._entries += 1
        assert self._super_entries is not None
        if self._entries - self._super_entries >= self.options.log_super_update_interval:
            await self._store_super()

    async def _store_super(self) -> None:
        """Make the log durable up to here. The entries come first: the super block must not count what is not there."""
        if self._super_entries is not None:
            await self.log.flush()
        entries = self._entries
        await self.log.pwrite(0, memoryview(pack_super(Super(entries, self._sector_size))))
        await self.log.flush()
        self._super_entries = entries

    # Data path.

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        fua = LogFlag.FUA if flags & Flag.FUA else LogFlag.NONE
        async with self._ranges.hold(offset, len(buf)):
            await super().pwrite(offset, buf, flags)
            await self._logged(offset, len(buf), fua, buf)

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        fua = LogFlag.FUA if flags & Flag.FUA else LogFlag.NONE
        async with self._ranges.hold(offset, length):
            await super().pwrite_zeroes(offset, length, flags)
            await self._logged(offset, length, fua, None)

    async def discard(self, offset: int, length: int) -> None:
        async with self._ranges.hold(offset, length):
            await super().discard(offset, length)
            await self._logged(offset, length, LogFlag.DISCARD, None)

    async def flush(self) -> None:
        async with self._flushing:
            self._flush_end = asyncio.Event()
            try:
                await self.file.flush()
                async with self._appending:
                    await self._append(Entry(0, 0, LogFlag.FLUSH))
                    await self._store_super()
            finally:
                self._flush_end.set()
                self._flush_end = None

    async def truncate(self, size: int) -> None:
        await super().truncate(size)
        async with self._appending:
            await self._append(Entry(0, 0, LogFlag.MARK, TRUNCATE_MARK + str(size).encode()))
