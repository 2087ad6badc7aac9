# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The bitmaps of an image as they are stored: header extension and directory, parsed, judged and packed.

```
    header extension ──► directory | entry, name | entry, name | ...          size, in bytes, of all entries
                                       │
                                       └──► table | cluster | ones | zeroes | cluster | ...      one entry per cluster
                                                       │                         │                of bits
                                                       ▼                         ▼
                                             bits: uint8[cluster_size], bit 0 lowest, a bit per granule
```

Source: qcow2 specification (QEMU, docs/interop/qcow2), "Bitmaps extension" and "Bitmaps".
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from blockgraph.graph.bitmaps import MAX_GRANULARITY, MAX_NAME, MIN_GRANULARITY

#: Bounds, the same as QEMU's: bitmaps in an image; bytes of the directory, of the bits of one bitmap.
MAX_BITMAPS = 65535
MAX_DIRECTORY = 1024 * MAX_BITMAPS
MAX_BITS = 512 << 20

_EXTENSION = struct.Struct(">IIQQ")
_ENTRY = struct.Struct(">QIIBBHI")
#: Where the flags lie in an entry. It begins at a multiple of 8 bytes, so no sector's end cuts them.
FLAGS_AT = 12
#: The only type that is defined.
DIRTY_TRACKING = 1

#: A table entry: all bits of the cluster are set.
ONES = 1
TABLE_OFFSET = 0x00FF_FFFF_FFFF_FE00
TABLE_RESERVED = 0xFF00_0000_0000_01FE


class Flags(enum.IntFlag):
    """Flags of an entry."""

    IN_USE = 1
    AUTO = 2
    EXTRA_DATA_COMPATIBLE = 4


_DEFINED = 7


@dataclass(frozen=True)
class DirectoryPlace:
    """The header extension.

    Attributes:
        count: bitmaps.
        size: bytes of the directory.
        offset: host offset of the directory.
    """

    count: int
    size: int
    offset: int

    def pack(self) -> bytes:
        """The extension's data."""
        return _EXTENSION.pack(self.count, 0, self.size, self.offset)


EXTENSION_LENGTH = _EXTENSION.size


def parse_extension(data: bytes, cluster_size: int, file_size: int) -> DirectoryPlace:
    """Judge the header extension.

    Raises:
        ValueError: what is wrong with it.
    """
    if len(data) != _EXTENSION.size:
        raise ValueError(f"the header extension has {len(data)} bytes, not {_EXTENSION.size}")
    count, reserved, size, offset = _EXTENSION.unpack(data)
    if not 1 <= count <= MAX_BITMAPS:
        raise ValueError(f"nb_bitmaps is {count}, not 1 to {MAX_BITMAPS}")
    if reserved:
        raise ValueError(f"a reserved field of the header extension is {reserved:#x}")
    if not count * _ENTRY.size <= size <= MAX_DIRECTORY:
        raise ValueError(f"bitmap_directory_size is {size}: no directory of {count} bitmaps")
    if offset & (cluster_size - 1) or offset < cluster_size:
        raise ValueError(f"bitmap_directory_offset is {offset:#x}, which is no cluster behind the header")
    if offset + size > file_size:
        raise ValueError(f"bitmap_directory_offset is {offset:#x}: the directory passes the end of the file")
    return DirectoryPlace(count, size, offset)


@dataclass(frozen=True)
class Entry:
    """An entry of the directory, fields as in the specification; `name` and `extra` are bytes."""

    table_offset: int
    table_size: int
    flags: int
    granularity_bits: int
    name: bytes
    type: int = DIRTY_TRACKING
    extra: bytes = b""

    @property
    def in_use(self) -> bool:
        """The stored form is out of date."""
        return bool(self.flags & Flags.IN_USE)

    @property
    def granularity(self) -> int:
        """Bytes per bit."""
        return 1 << self.granularity_bits

    @property
    def text(self) -> str:
        """The name, as bitmaps in memory have it."""
        return self.name.decode("utf-8", "surrogateescape")

    @property
    def foreign(self) -> str | None:
        """Why this code must leave the bitmap alone, although the specification allows it (now or later)."""
        if self.type != DIRTY_TRACKING:
            return f"is of the unknown type {self.type}"
        if self.flags & ~_DEFINED:
            return f"has the unknown flags {self.flags & ~_DEFINED:#x}"
        if self.extra and not self.flags & Flags.EXTRA_DATA_COMPATIBLE:
            return "has extra data that have to be understood"
        if self.granularity_bits > 63 or not MIN_GRANULARITY <= self.granularity <= MAX_GRANULARITY:
            return f"has the granularity 2^{self.granularity_bits}"
        if len(self.name) > MAX_NAME:
            return f"has a name of {len(self.name)} bytes"
        return None

    @property
    def packed_size(self) -> int:
        """Bytes in the directory."""
        return _ENTRY.size + -(-(len(self.name) + len(self.extra)) // 8) * 8

    def pack(self) -> bytes:
        """As in the directory."""
        head = _ENTRY.pack(
            self.table_offset,
            self.table_size,
            self.flags,
            self.type,
            self.granularity_bits,
            len(self.name),
            len(self.extra),
        )
        return (head + self.extra + self.name).ljust(self.packed_size, b"\0")

    def marked(self) -> Entry:
        """As it has to be before the disk, or the bitmap, changes. A foreign bitmap has no part in that unless it has
        to follow all changes."""
        if self.foreign is not None and not self.flags & Flags.AUTO:
            return self
        return replace(self, flags=self.flags | Flags.IN_USE)


def parse_directory(raw: bytes, count: int) -> list[Entry]:
    """Take a directory apart.

    Raises:
        ValueError: its entries do not fill it exactly, are not `count`, or a name is empty, has a zero byte or comes
            twice.
    """
    entries: list[Entry] = []
    names: set[bytes] = set()
    at = 0
    while at < len(raw):
        number = len(entries)
        if number == count:
            raise ValueError(f"the directory has more than the {count} bitmaps that the header names")
        if at + _ENTRY.size > len(raw):
            raise ValueError(f"the directory ends inside entry {number}")
        offset, size, flags, kind, bits, name_size, extra_size = _ENTRY.unpack_from(raw, at)
        name_at = at + _ENTRY.size + extra_size
        end = at + _ENTRY.size + -(-(extra_size + name_size) // 8) * 8
        if end > len(raw):
            raise ValueError(f"the directory ends inside entry {number}")
        name = raw[name_at : name_at + name_size]
        if not name or b"\0" in name:
            raise ValueError(f"entry {number} has no proper name: {name[:40]!r}")
        if name in names:
            raise ValueError(f"two bitmaps have the name {name[:40]!r}")
        names.add(name)
        entries.append(Entry(offset, size, flags, bits, name, kind, raw[at + _ENTRY.size : name_at]))
        at = end
    if len(entries) < count:
        raise ValueError(f"the directory has {len(entries)} bitmaps, the header names {count}")
    return entries


def pack_directory(entries: Sequence[Entry]) -> bytes:
    """The directory of these entries."""
    return b"".join([entry.pack() for entry in entries])


def table_size(disk: int, granularity: int, cluster_size: int) -> int:
    """Entries in the table of a bitmap."""
    return -(-disk // (granularity * 8 * cluster_size))
