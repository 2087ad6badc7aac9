# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Image: what every part of the driver shares, geometry and the file below.

Host offsets are bytes in the child `file`; guest offsets are bytes in the node.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

from blockgraph.errors import BlockGraphError, CorruptImage, NoSpace, Unsupported
from blockgraph.flags import Flag
from blockgraph.formats.qcow2.header import INCOMPATIBLE, Header, Incompatible
from blockgraph.node import Child, Node

log = logging.getLogger(__name__)

#: Requests in flight at once for the parts of one write-back.
_PARALLEL = 16


class Image:
    """An open image.

    Attributes:
        node: the qcow2 node.
        file: edge to the file.
        header: as on disk, or as the next write-back makes it (offsets of tables, sizes).
        cluster_bits, cluster_size: of a cluster, bytes.
        l2_bits, l2_entries: entries of an L2 table.
        damaged: why nothing may be written any more; None while all is well.
    """

    def __init__(self, node: Node, file: Child, header: Header) -> None:
        self.node = node
        self.file = file
        self.header = header
        self.cluster_bits = header.cluster_bits
        self.cluster_size = 1 << header.cluster_bits
        self.l2_bits = header.cluster_bits - 3
        self.l2_entries = 1 << self.l2_bits
        self.damaged: str | None = None

    def file_end(self) -> int:
        """Size of the file rounded up to a cluster, bytes."""
        return -(-self.file.node.size() >> self.cluster_bits) << self.cluster_bits

    def whole_end(self) -> int:
        """Size of the file rounded down to a cluster, bytes: up to there native code may write.

        Behind the file's end it would make it longer than Python knows.
        """
        return self.file.node.size() >> self.cluster_bits << self.cluster_bits

    def corrupt(self, reason: str, offset: int | None = None) -> CorruptImage:
        """The error for metadata that contradicts itself.

        Args:
            offset: guest offset concerned.
        """
        return CorruptImage(
            reason, node=self.node.name, offset=offset, hint="run 'qemu-img check' on the image while it is not in use"
        )

    async def damage(self, reason: str) -> CorruptImage:
        """Metadata that a write depends on is wrong: refuse every later write, in this process and, with version 3,
        in all others, by the corrupt bit. Returns the error to raise."""
        error = self.corrupt(reason)
        if self.damaged is None:
            self.damaged = reason
            self.node.revoke(0, self.header.size)
            log.error("node '%s': image is corrupt, no more writes: %s", self.node.name, reason)
            if self.header.version >= 3:
                self.header.incompatible |= Incompatible.CORRUPT
                await self.write(INCOMPATIBLE, self.header.incompatible.to_bytes(8, "big"))
        return error

    def check_writable(self) -> None:
        """Refuse a change of metadata after `damage`."""
        if self.damaged is not None:
            raise self.corrupt(f"is corrupt and no longer written: {self.damaged}")

    def check_table(self, what: str, offset: int) -> None:
        """Judge the host offset of a table.

        Raises:
            CorruptImage: naming `what`.
        """
        if offset & (self.cluster_size - 1):
            raise self.corrupt(f"{what} points to {offset:#x}, which is not at a cluster's start")
        if not self.cluster_size <= offset < self.file_end():
            raise self.corrupt(f"{what} points to {offset:#x}, which is outside the file")

    async def read(self, offset: int, length: int) -> bytearray:
        """Host bytes; zeroes past the end of the file."""
        buf = bytearray(length)
        await self.file.pread(offset, memoryview(buf))
        return buf

    async def write(self, offset: int, data: bytes) -> None:
        """Write host bytes."""
        await self.file.pwrite(offset, memoryview(data))

    async def reserve(self, end: int) -> None:
        """Make the file reach `end` where it does not grow by being written.

        Raises:
            NoSpace: it can not.
        """
        below = self.file.node
        if below.driver.growable or end <= below.size():
            return
        try:
            await self.file.truncate(end)
        except Unsupported:
            raise NoSpace(
                f"the image needs {end} bytes, its storage has {below.size()} and can not grow",
                node=self.node.name,
                errno=errno.ENOSPC,
                hint="make the storage larger",
            ) from None

    async def reach(self, end: int) -> None:
        """Make the file reach `end`, a cluster's, which is new, if it is one that is better not made longer by many
        writes: with O_DIRECT they go one after the other, as long as the device takes for each (ext4: 9,000 a second,
        and 23,000 inside the file). A file that can not be made longer stays: the write will say why.
        """
        below = self.file.node
        align = below.driver.request_alignment
        if below.driver.growable and align > 1 and self.cluster_size % align == 0 and end > below.size():
            with contextlib.suppress(BlockGraphError):
                await self.file.pwrite_zeroes(end - self.cluster_size, self.cluster_size, Flag.NO_FALLBACK)


async def run_all(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run independent I/O, some of it at once; all of it has ended when this returns or raises the first failure."""
    if len(work) == 1:
        await work[0]
        return
    for start in range(0, len(work), _PARALLEL):
        results = await asyncio.gather(*work[start : start + _PARALLEL], return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                for rest in work[start + _PARALLEL :]:
                    rest.close()
                raise result
