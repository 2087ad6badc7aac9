# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Drivers with one bug each, and the check of the conformance kit that has to find it."""

from __future__ import annotations

import asyncio
from typing import Any

from blockgraph.driver import Driver, Filter, Info
from blockgraph.errors import Unsupported
from blockgraph.extent import BlockStatus, Extent, Status
from blockgraph.flags import Flag
from blockgraph.options import NodeOptions, NodeRef
from blockgraph.protocols.memory import Memory


class Good(Memory):
    """memory under a name of its own: the kit has to let it pass."""

    name = "good"


class GoodFilterOptions(NodeOptions, kw_only=True, frozen=True):
    file: NodeRef


class GoodFilter(Filter):
    """Two lines: the kit has to let it pass."""

    name = "good-filter"
    Options = GoodFilterOptions


class TailUnread(Memory):
    """Leaves the last byte of long odd reads as it was."""

    async def pread(self, offset: int, buf: memoryview) -> None:
        await super().pread(offset, buf[:-1] if len(buf) > 4096 and len(buf) % 2 else buf)


class SeamMissed(Memory):
    """A write that starts in the last byte of a cluster lands one byte too far."""

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        if offset % 65536 == 65535 and len(buf) > 1:
            offset, buf = offset + 1, buf[:-1]
        await super().pwrite(offset, buf, flags)


class LostUpdate(Memory):
    """Reads a sector, waits, and writes all of it back: two neighbours at once, and one is lost."""

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        start = offset - offset % 512
        end = min(self.size(), offset + len(buf) + -(offset + len(buf)) % 512)
        whole = memoryview(bytearray(end - start))
        await super().pread(start, whole)
        await asyncio.sleep(0)
        whole[offset - start : offset - start + len(buf)] = buf
        await super().pwrite(start, whole, flags)


class ZeroTooMuch(Memory):
    """Write-zeroes rounds out to sectors."""

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        start = offset - offset % 512
        end = min(self.size(), offset + length + -(offset + length) % 512)
        await super().pwrite_zeroes(start, end - start, flags)


class ZeroHalf(Memory):
    """Write-zeroes without fallback refuses after it has done half of the work."""

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        if flags & Flag.NO_FALLBACK and length > 1:
            await super().pwrite_zeroes(offset, length // 2, flags)
            raise self.unsupported("pwrite_zeroes")
        await super().pwrite_zeroes(offset, length, flags)


class ZeroForgetsUnmap(Memory):
    """Write-zeroes that may unmap does nothing."""

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        if not flags & Flag.MAY_UNMAP:
            await super().pwrite_zeroes(offset, length, flags)


class DiscardGarbage(Memory):
    """Discarded ranges read as something nobody wrote."""

    async def discard(self, offset: int, length: int) -> None:
        await super().pwrite(offset, memoryview(bytes((offset + i) * 7 % 256 for i in range(length))))


class DiscardNeighbour(Memory):
    """Discard rounds out to sectors."""

    async def discard(self, offset: int, length: int) -> None:
        start = offset - offset % 512
        await super().discard(start, min(self.size(), offset + length + -(offset + length) % 512) - start)


class StatusLies(Memory):
    """Block status says that everything from 64 KiB on is zeroes."""

    async def storage_status(self, offset: int, length: int) -> tuple[int, Status]:
        if offset >= 65536:
            return length, Status.ZERO
        return await super().storage_status(offset, min(length, 65536 - offset))


class StatusTooLong(Memory):
    """Block status answers for more than was asked."""

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        status = await super().block_status(offset, length)
        return status._replace(length=status.length + 1)


class StatusCrumbs(Memory):
    """Block status answers byte by byte."""

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        return (await super().block_status(offset, length))._replace(length=1)


class MapElsewhere(GoodFilter):
    """map points one sector too far."""

    async def map(self, offset: int, length: int) -> Extent:
        return (await super().map(offset, length))._replace(child_offset=512)


class MapCrumbs(GoodFilter):
    """map answers byte by byte."""

    async def map(self, offset: int, length: int) -> Extent:
        return (await super().map(offset, length)).clip(offset, 1)


class MapBehind(GoodFilter):
    """map answers for the range after the one asked for."""

    async def map(self, offset: int, length: int) -> Extent:
        extent = await super().map(offset, length)
        return extent._replace(offset=offset + 1, child_offset=offset + 1)


class MapWritable(GoodFilter):
    """Inverts what is written and read, but lets writers of its map pass it by."""

    transparent = False

    async def pread(self, offset: int, buf: memoryview) -> None:
        await super().pread(offset, buf)
        buf[:] = bytes(byte ^ 0xFF for byte in buf)

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        await super().pwrite(offset, memoryview(bytes(byte ^ 0xFF for byte in buf)), flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        raise self.unsupported("pwrite_zeroes")

    async def discard(self, offset: int, length: int) -> None:
        raise self.unsupported("discard")

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        return BlockStatus(offset, length, True, False, 0, self.node)

    async def map(self, offset: int, length: int) -> Extent:
        return Extent(0, self.size(), Status.DATA, self.file, 0, True)


class LateRead(Memory):
    """Goes on filling the buffer after the read was cancelled."""

    async def pread(self, offset: int, buf: memoryview) -> None:
        await asyncio.shield(self._late(offset, buf))

    async def _late(self, offset: int, buf: memoryview) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        await super().pread(offset, buf)


class LateWrite(Memory):
    """Goes on writing after the write was cancelled."""

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        await asyncio.shield(self._late(offset, bytes(buf), flags))

    async def _late(self, offset: int, data: bytes, flags: Flag) -> None:
        for _ in range(6):
            await asyncio.sleep(0)
        await super().pwrite(offset, memoryview(data), flags)


class TornBuffer(Memory):
    """Writes from the caller's buffer after the write was cancelled."""

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        await asyncio.shield(self._late(offset, buf, flags))

    async def _late(self, offset: int, buf: memoryview, flags: Flag) -> None:
        for _ in range(2):
            await asyncio.sleep(0)
        await super().pwrite(offset, buf, flags)


class BufferChanged(Memory):
    """Encrypts in the caller's buffer (and, luckily, not at all)."""

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        await super().pwrite(offset, buf, flags)
        if not buf.readonly:
            buf[:1] = bytes([buf[0] ^ 1])


class WrongError(Memory):
    """Lets an error of the system through."""

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        raise OSError(95, "Operation not supported")


class FlushFails(Memory):
    """A flush fails."""

    async def flush(self) -> None:
        raise Unsupported("no flush here", node=self.node.name, op="flush")


class FlushHangs(Memory):
    """A flush never ends."""

    async def flush(self) -> None:
        await asyncio.Event().wait()


class WrongSize(Memory):
    """Rounds its size up to sectors."""

    def size(self) -> int:
        return super().size() + -super().size() % 512


class OddCluster(Memory):
    """Its allocation unit is no power of two."""

    def info(self) -> Info:
        return Info(cluster_size=3 << 10)


class GrownDirty(Memory):
    """A grown area is not zero."""

    async def truncate(self, size: int) -> None:
        old = self.size()
        await super().truncate(size)
        if size > old:
            await self.pwrite(size - 1, memoryview(b"x"))


class Forgetful(Memory):
    """Nothing outlives it."""


BROKEN: list[tuple[type[Driver], str]] = [
    (TailUnread, "read_ranges"),
    (SeamMissed, "round_trip"),
    (LostUpdate, "neighbours_together"),
    (ZeroTooMuch, "write_zeroes"),
    (ZeroHalf, "write_zeroes"),
    (ZeroForgetsUnmap, "write_zeroes"),
    (DiscardGarbage, "discard"),
    (DiscardNeighbour, "discard"),
    (StatusLies, "block_status"),
    (StatusTooLong, "block_status"),
    (StatusCrumbs, "block_status"),
    (MapElsewhere, "map"),
    (MapCrumbs, "map"),
    (MapBehind, "map"),
    (MapWritable, "map_writable"),
    (LateRead, "cancelled_read"),
    (LateWrite, "cancelled_write"),
    (TornBuffer, "cancelled_write"),
    (BufferChanged, "round_trip"),
    (WrongError, "write_zeroes"),
    (FlushFails, "flush"),
    (FlushHangs, "flush"),
    (WrongSize, "size"),
    (OddCluster, "size"),
    (GrownDirty, "truncate"),
    (Forgetful, "persistence"),
]


def describe(driver: type[Driver], size: int) -> dict[str, Any]:
    """A node of that driver."""
    if issubclass(driver, Filter):
        return {"node-name": "it", "driver": driver.name, "file": {"driver": "memory", "size": size}}
    return {"node-name": "it", "driver": driver.name, "size": size}
