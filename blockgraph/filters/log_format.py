# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The on-disk format of a write log: that of the kernel's dm-log-writes, xfstests' replay-log, QEMU's blklogwrites.

    sector 0                super: magic, version, number of entries, sector size
    then, for each entry    1 sector: first sector, number of sectors, flags, length of a mark's text, the text
                            its data, whole sectors; none for a discard

All numbers little-endian; sectors are the log's own, a power of two from 512 bytes on.
Source: linux drivers/md/dm-log-writes.c, Documentation/admin-guide/device-mapper/log-writes.rst.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

from blockgraph.errors import CorruptImage

MAGIC = 0x6A736677736872
VERSION = 1
MIN_SECTOR = 512
MAX_SECTOR = 1 << 23

_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")

#: A mark with this text and a number records a change of size, which the format has no entry for.
TRUNCATE_MARK = b"blockgraph-truncate "


class LogFlag(enum.IntFlag):
    """What an entry is. None of FLUSH, DISCARD, MARK: a write."""

    NONE = 0
    FLUSH = 1  #: every entry before it is durable
    FUA = 2  #: durable by itself
    DISCARD = 4  #: has no data
    MARK = 8  #: a text put there by the user
    METADATA = 16  #: a hint of the file system


class Super(NamedTuple):
    """The first sector.

    Attributes:
        entries: number of entries that are complete.
        sector_size: bytes.
    """

    entries: int
    sector_size: int


class Entry(NamedTuple):
    """The first sector of an entry.

    Attributes:
        sector, sectors: the range of the disk, in sectors of the log.
        flags: what the entry is.
        mark: text of a mark.
        odd_length: bytes of a write that ends inside its last sector; 0: it fills it. Stored as the length of private
            data, which a write does not have otherwise.
    """

    sector: int
    sectors: int
    flags: LogFlag
    mark: bytes = b""
    odd_length: int = 0

    @property
    def data_sectors(self) -> int:
        """Sectors of data that follow."""
        return 0 if self.flags & LogFlag.DISCARD else self.sectors


def sector_size_valid(size: int) -> bool:
    """A power of two in the allowed range."""
    return MIN_SECTOR <= size <= MAX_SECTOR and not size & (size - 1)


def max_mark(sector_size: int) -> int:
    """Longest text of a mark, bytes."""
    return sector_size - _ENTRY.size - 1


def pack_super(log: Super) -> bytes:
    """One sector."""
    return _SUPER.pack(MAGIC, VERSION, log.entries, log.sector_size).ljust(log.sector_size, b"\0")


def unpack_super(raw: bytes | memoryview) -> Super:
    """The super block in the first MIN_SECTOR bytes.

    Raises:
        CorruptImage: this is no write log, or one of another version.
    """
    if len(raw) < _SUPER.size:
        raise CorruptImage("not a write log: too short")
    magic, version, entries, sector_size = _SUPER.unpack_from(raw)
    if magic != MAGIC:
        raise CorruptImage(f"not a write log: magic {magic:#x}")
    if version != VERSION:
        raise CorruptImage(f"write log of version {version}, only {VERSION} is known")
    if not sector_size_valid(sector_size):
        raise CorruptImage(f"write log with a sector size of {sector_size} bytes")
    return Super(entries, sector_size)


def pack_entry(entry: Entry, sector_size: int) -> bytes:
    """One sector."""
    head = _ENTRY.pack(entry.sector, entry.sectors, entry.flags, len(entry.mark) or entry.odd_length)
    return (head + entry.mark).ljust(sector_size, b"\0")


def unpack_entry(raw: bytes | memoryview) -> Entry:
    """The entry whose first sector is `raw`.

    Raises:
        CorruptImage: unknown flags, or a mark that does not fit.
    """
    sector, sectors, bits, length = _ENTRY.unpack_from(raw)
    if bits & ~sum(LogFlag):
        raise CorruptImage(f"write log entry with unknown flags {bits:#x}")
    flags = LogFlag(bits)
    if not flags & LogFlag.MARK:
        return Entry(sector, sectors, flags, odd_length=length)
    if length > len(raw) - _ENTRY.size:
        raise CorruptImage(f"write log mark of {length} bytes does not fit its sector")
    return Entry(sector, sectors, flags, bytes(raw[_ENTRY.size : _ENTRY.size + length]))
