# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""MemoryBackend: stands in for a `Backend` where there is no graph, to test exports and other front ends.

It keeps its bytes in memory, remembers every call, and can hold requests until told to go on:

    disk = MemoryBackend(1 << 20)
    with disk.hold("pwrite") as held:
        ...                      # a client writes
        await held.arrived()     # the write is in flight
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple, cast

from blockgraph.backend import Backend
from blockgraph.driver import Info
from blockgraph.errors import OutOfRange, ReadOnly, Unsupported
from blockgraph.extent import BlockStatus
from blockgraph.flags import Flag
from blockgraph.native import ExtentMap

_BLOCK = 4096


class Call(NamedTuple):
    """A request that reached the backend."""

    op: str
    offset: int
    length: int
    flags: Flag


class Held:
    """A breakpoint. Requests that reach it wait until `release`."""

    def __init__(self) -> None:
        self.waiting = 0
        self._go = asyncio.Event()
        self._changed = asyncio.Condition()

    async def arrived(self, count: int = 1) -> None:
        """Until `count` requests wait here."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.waiting >= count)

    def release(self) -> None:
        """Let go of all requests, of later ones too."""
        self._go.set()

    async def stop(self) -> None:
        """Wait here."""
        async with self._changed:
            self.waiting += 1
            self._changed.notify_all()
        await self._go.wait()


class MemoryMap:
    """Stands in for a RootMap: what native code may do is what a test enters."""

    def __init__(self, size: int) -> None:
        self.extents = ExtentMap(size)


class MemoryBackend:
    """A disk in memory, block status by blocks of 4096 bytes.

    Args:
        size: bytes.
        writable: as of a Backend with permission WRITE.
        alignment: request_alignment of the pretended driver; any request is served nevertheless.
        fast_zero: write-zeroes with NO_FALLBACK succeeds.

    Attributes:
        data: the contents.
        calls: every request, in the order of arrival.
        map: what native code may do without asking; a test's own.
        errors: exception to raise by op (those of `Call`).
        scattered: what misses is looked up.
    """

    def __init__(
        self, size: int, *, writable: bool = True, alignment: int = 1, fast_zero: bool = True, name: str = "memory"
    ) -> None:
        self.data = bytearray(size)
        self.map: MemoryMap | None = None
        self.writable = writable
        self.calls: list[Call] = []
        self.errors: dict[str, BaseException] = {}
        self.scattered = False
        self.node = SimpleNamespace(
            name=name, driver=SimpleNamespace(request_alignment=alignment, info=lambda: Info(cluster_size=None))
        )
        self._fast_zero = fast_zero
        self._view = memoryview(self.data)
        self._allocated = bytearray(-(-size // _BLOCK))
        self._holds: dict[str, Held] = {}

    def as_backend(self) -> Backend:
        """Itself, for type checkers."""
        return cast("Backend", self)

    @contextmanager
    def hold(self, op: str) -> Iterator[Held]:
        """Hold requests of a kind; they are released at the end of the block."""
        held = self._holds[op] = Held()
        try:
            yield held
        finally:
            del self._holds[op]
            held.release()

    def use_map(self) -> MemoryMap | None:
        """Unlike a Backend's: only the map that the test has set."""
        return self.map

    def size(self) -> int:
        """Bytes."""
        return len(self.data)

    def is_scattered(self, offset: int, *, write: bool) -> bool:
        """As the test wants it."""
        return self.scattered

    def came_back(self, *, write: bool) -> None:
        """See Backend."""

    async def look_up(self, runs: Sequence[tuple[int, int]]) -> None:
        """Finds out nothing."""
        for offset, end in runs:
            await self._enter("look_up", offset, end - offset)

    async def _enter(self, op: str, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        self.calls.append(Call(op, offset, length, flags))
        if offset < 0 or offset + length > len(self.data):
            raise OutOfRange("outside the disk", node=self.node.name, op=op, offset=offset, length=length)
        if not self.writable and op in ("pwrite", "write_zeroes", "discard"):
            raise ReadOnly("the backend is read-only", node=self.node.name, op=op)
        if op in self._holds:
            await self._holds[op].stop()
        if op in self.errors:
            raise self.errors[op]

    async def pread_into(self, offset: int, buf: memoryview) -> None:
        """See Backend."""
        await self._enter("pread", offset, len(buf))
        buf[:] = self._view[offset : offset + len(buf)]

    async def pwrite(self, offset: int, buf: memoryview | bytes | bytearray, flags: Flag = Flag.NONE) -> None:
        """See Backend."""
        await self._enter("pwrite", offset, len(buf), flags)
        self._view[offset : offset + len(buf)] = buf
        if len(buf):
            first, last = offset // _BLOCK, (offset + len(buf) - 1) // _BLOCK
            self._allocated[first : last + 1] = b"\1" * (last + 1 - first)

    async def write_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        """See Backend."""
        await self._enter("write_zeroes", offset, length, flags)
        if flags & Flag.NO_FALLBACK and not self._fast_zero:
            raise Unsupported("no fast zeroes here", node=self.node.name, op="write_zeroes")
        self._zero(offset, length, 0 if flags & Flag.MAY_UNMAP else 1)

    async def discard(self, offset: int, length: int) -> None:
        """See Backend."""
        await self._enter("discard", offset, length)
        self._zero(offset, length, 0)

    def _zero(self, offset: int, length: int, allocated: int) -> None:
        self._view[offset : offset + length] = bytes(length)
        first, last = -(-offset // _BLOCK), (offset + length) // _BLOCK
        if first < last:
            self._allocated[first:last] = bytes([allocated]) * (last - first)

    async def flush(self) -> None:
        """See Backend."""
        await self._enter("flush", 0, 0)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """See Backend. A hole is zero, an allocated block is data."""
        await self._enter("block_status", offset, length)
        end = offset + length
        first = offset // _BLOCK
        data = self._allocated[first]
        other = self._allocated.find(1 - data, first)
        if other >= 0:
            end = min(end, other * _BLOCK)
        return BlockStatus(offset, end - offset, bool(data), not data)
