# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""patch: the ranges of a disk that changed, one after another in a file; the rest is read from a backing node.

```
    disk       |......AAAA..............BB...........CCCCCCCC....|      what is not in the table: backing, or zeroes
                      │                 │            │
    table      (offset, length) A, B, C, sorted      │
                      ▼    ┌────────────┘   ┌────────┘
    file       header table AAAA BB CCCCCCCC
               0      4096  data
```

An incremental backup of a raw disk is a raw image and patches (blockgraph.chains): no format with tables of clusters is
needed to keep them, and all of a patch can be written in place, since what it holds is known when it begins.

All numbers are little-endian. Extents are multiples of the cluster, but for the end of the disk; none touches the next.

    offset  bytes
    0       8      "BGPATCH" and a zero byte
    8       4      version: 1
    12      4      cluster, bytes, a power of two from 512 to 2 GiB
    16      8      size of the disk, bytes
    24      8      extents in the table
    32      8      where the data begins: the next multiple of 4096 after the table
    40      24     zero
    64      16     BLAKE2b of 16 bytes of the table
    80      16     the same of the 80 bytes above
    96             zero
    4096           the table: 8 bytes offset, 8 bytes length of each extent; zero up to the data
    data           the extents' bytes in the order of the table. What is a hole in the file is zeroes

Options:
    file: the child, required.
    backing: what shows through; omitted: zeroes.

Example:
    [[nodes]]
    node-name = "tuesday"
    driver = "patch"
    file = {driver = "file", filename = "tuesday.patch"}
    backing = {driver = "raw", file = {driver = "file", filename = "monday.raw"}}

Limits: what the table does not have can not be written. `lay_out` fills the table of an empty patch, once.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from bisect import bisect_right
from typing import ClassVar

from msgspec import UNSET, UnsetType

from blockgraph.driver import ChildSpec, Format, Info
from blockgraph.errors import CorruptImage, GraphError
from blockgraph.extent import Extent, Status
from blockgraph.native import Bitmap
from blockgraph.node import Child
from blockgraph.options import NodeOptions, NodeRef
from blockgraph.perm import Role

MAGIC = b"BGPATCH\0"
VERSION = 1

#: Where the table begins, and what the data is aligned to, bytes.
TABLE = 4096

#: Most extents of a patch: its table has 256 MiB.
MAX_EXTENTS = 1 << 24

_HEADER = struct.Struct("<8sIIQQQ24x16s")
_DIGEST = 16
_HEADER_BYTES = _HEADER.size + _DIGEST
_LARGEST = (1 << 63) - 1
_STEP = 1 << 20


def digest(data: bytes | memoryview) -> bytes:
    """BLAKE2b of 16 bytes."""
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def header(size: int, cluster: int, table: bytes, data: int) -> bytes:
    """The first TABLE bytes of a patch, whose data begin at `data`."""
    fixed = _HEADER.pack(MAGIC, VERSION, cluster, size, len(table) // 16, data, digest(table))
    return (fixed + digest(fixed)).ljust(TABLE, b"\0")


def data_place(table: int) -> int:
    """Where the data of a patch begin whose table has so many bytes."""
    return TABLE + table + -table % TABLE


def empty_patch(size: int, cluster: int) -> bytes:
    """A patch of a disk of `size` bytes that changes nothing."""
    return header(size, cluster, b"", TABLE)


class PatchOptions(NodeOptions, kw_only=True, frozen=True):
    """See the module's text."""

    file: NodeRef
    backing: NodeRef | UnsetType | None = UNSET


class Patch(Format):
    """See the module's text."""

    name = "patch"
    children: ClassVar = {
        "file": ChildSpec(Role.DATA | Role.METADATA | Role.PRIMARY),
        "backing": ChildSpec(Role.COW, required=False),
    }
    Options: ClassVar[type[NodeOptions]] = PatchOptions
    revokes = True
    options: PatchOptions

    file: Child

    async def open(self) -> None:
        self._starts = array("Q")
        self._ends = array("Q")
        self._places = array("Q")
        fixed = await self._read(0, _HEADER_BYTES, "its header")
        magic, version, cluster, size, count, data, table_digest = _HEADER.unpack_from(fixed)
        if magic != MAGIC:
            raise self._corrupt("is not a patch: its magic is missing")
        if version != VERSION:
            raise self._corrupt(f"has version {version}; only {VERSION} is known")
        if digest(fixed[: _HEADER.size]) != fixed[_HEADER.size :]:
            raise self._corrupt("has a header that does not have its checksum")
        if not 512 <= cluster <= 2 << 30 or cluster & (cluster - 1) or size > _LARGEST:
            raise self._corrupt(f"has cluster {cluster} or size {size} out of range")
        if count > MAX_EXTENTS or data != data_place(16 * count):
            raise self._corrupt(f"has {count} extents with data at {data}, which can not be")
        self._size: int = size
        self._cluster: int = cluster
        table = await self._read(TABLE, 16 * count, "its table")
        if digest(table) != table_digest:
            raise self._corrupt("has a table that does not have its checksum")
        behind = TABLE + len(table)
        for place, end, what in ((_HEADER_BYTES, TABLE, "its header"), (behind, data, "its table")):
            length = end - place
            if any(await self._read(place, length, what)):
                raise self._corrupt(f"has other bytes than zeroes in the {length} at {place}, where nothing is kept")
        self._take(table, data)

    async def _read(self, offset: int, length: int, what: str) -> bytes:
        if offset + length > self.file.node.size():
            raise self._corrupt(f"ends inside {what}")
        buf = bytearray(length)
        for at in range(0, length, _STEP):
            await self.file.pread(offset + at, memoryview(buf)[at : at + _STEP])
        return bytes(buf)

    def _corrupt(self, reason: str) -> CorruptImage:
        return CorruptImage(reason, node=self.node.name, op="open", hint="use another backup")

    def _take(self, table: bytes, place: int) -> None:
        """Fill the arrays: runs sorted, and where each lies in the file."""
        numbers = array("Q", table)
        if sys.byteorder == "big":
            numbers.byteswap()
        starts, lengths = numbers[0::2], numbers[1::2]
        ends, places, last = array("Q"), array("Q"), -1
        for start, length in zip(starts, lengths, strict=True):
            end = start + length
            whole = end % self._cluster == 0 or end == self._size
            if start <= last or not length or start % self._cluster or end > self._size or not whole:
                raise self._corrupt(f"has an extent of {length} bytes at {start} that is out of order or range")
            ends.append(end)
            places.append(place)
            place, last = place + length, end
        if place > self.file.node.size():
            raise self._corrupt(f"has {self.file.node.size()} bytes in its file, but {place} belong to it")
        self._starts, self._ends, self._places = starts, ends, places

    async def lay_out(self, bits: Bitmap) -> None:
        """The table of this empty patch has what is set in `bits`, of the same size. Drained: nothing was written yet.

        Raises:
            GraphError: more extents than a patch can have.
            IOFailure: it could not be written.
        """
        assert not self._starts, "a patch is laid out once"
        assert bits.size == self._size
        numbers = array("Q")
        for offset, length in bits.dirty_extents():
            numbers.extend((offset, length))
        if len(numbers) > 2 * MAX_EXTENTS:
            raise GraphError(
                f"{len(numbers) // 2} ranges have changed, a patch can have {MAX_EXTENTS}",
                node=self.node.name,
                hint="back up as qcow2, or make a full backup",
            )
        if sys.byteorder == "big":
            numbers.byteswap()
        table = numbers.tobytes()
        self._cluster = bits.granularity
        data = data_place(len(table))
        await self.file.truncate(data + bits.count())
        await self.file.pwrite(0, memoryview(header(self._size, self._cluster, table, data)))
        for at in range(0, len(table), _STEP):
            await self.file.pwrite(TABLE + at, memoryview(table)[at : at + _STEP])
        self._take(table, data)

    def extents(self) -> list[tuple[int, int]]:
        """Runs (offset, length) that the patch has, ascending."""
        return [(start, end - start) for start, end in zip(self._starts, self._ends, strict=True)]

    # Facts.

    def size(self) -> int:
        return self._size

    def info(self) -> Info:
        return Info(self._cluster)

    # Data path.

    async def map(self, offset: int, length: int) -> Extent:
        index = bisect_right(self._starts, offset) - 1
        if index >= 0 and offset < self._ends[index]:
            start, place = self._starts[index], self._places[index]
            return Extent(start, self._ends[index] - start, Status.DATA, self.file, place, not self.node.read_only)
        start = self._ends[index] if index >= 0 else 0
        end = self._starts[index + 1] if index + 1 < len(self._starts) else max(self._size, offset + length)
        return Extent(start, end - start, Status.UNALLOCATED)
