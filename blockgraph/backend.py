# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Backend: a root of the graph, held by an export, a job or an emulator.

Every request of the outside enters here. A drain closes the gates of the backends above the drained nodes and waits
until what is in flight has ended; requests that arrive meanwhile wait at the gate and go on afterwards, in the graph
as it then is.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockgraph.errors import IOFailure, OptionError, OutOfRange, ReadOnly
from blockgraph.extent import BlockStatus
from blockgraph.flags import Flag
from blockgraph.native import MapStats
from blockgraph.native.extent_map import DEFAULT_MEMORY, MIN_MEMORY
from blockgraph.perm import ALL, Perm
from blockgraph.root_map import RootMap

if TYPE_CHECKING:
    from blockgraph.node import Child, Node


class Backend:
    """A root. Made by `Graph.backend` (or a transaction), ended by `close`.

    Use it from the graph's loop thread; `blockgraph.api` has the form for other threads.

    Attributes:
        name: unique among roots.
        need, share: permissions of its edge.
        stays: the edge stays at its node when a filter is inserted above that node (jobs).
        owner: who holds it, for messages: "export 'guest'", "job 'b0'".
        root: the edge; its `node` changes with the graph.
        map: where its bytes live, for native requests; None: nobody asked for it (`use_map`).
        extent_map_size: most memory of that map, bytes.

    Raises:
        OptionError: `extent_map_size` is less than a map needs.
    """

    def __init__(
        self,
        name: str,
        *,
        need: Perm = Perm.CONSISTENT_READ,
        share: Perm = ALL,
        stays: bool = False,
        owner: str | None = None,
        extent_map_size: int = DEFAULT_MEMORY,
    ) -> None:
        if not MIN_MEMORY <= extent_map_size < 1 << 63:
            raise OptionError(
                f"an extent map needs at least {MIN_MEMORY} bytes", path="extent_map_size", value=extent_map_size
            )
        self.name = name
        self.need = need
        self.share = share
        self.stays = stays
        self.owner = owner or name
        self.root: Child
        self.children: dict[str, Child] = {}
        self.map: RootMap | None = None
        self.extent_map_size = extent_map_size
        self._ended = False
        self._closed_gates = 0
        self._gate: asyncio.Event | None = None
        self._in_flight = 0
        self._idle: asyncio.Event | None = None

    def __repr__(self) -> str:
        return f"<Backend {self.name} -> {self.root.node.name}>"

    @property
    def node(self) -> Node:
        """The node it is attached to now."""
        return self.root.node

    @property
    def writable(self) -> bool:
        """Writes are permitted."""
        return bool(self.need & Perm.WRITE) and not self.node.read_only

    def size(self) -> int:
        """Length of the disk, bytes."""
        return self.root.node.size()

    def set_child(self, name: str, child: Child | None) -> None:
        """For the graph: put the edge in place."""
        if child is None:
            self.children.pop(name, None)
        else:
            self.children[name] = child
            # Requests lie inside the disk: one that has waited until it was shorter does not make it longer.
            child.grows = False
            self.root = child

    def use_map(self) -> RootMap:
        """Keep an extent map from now on; returns it."""
        if self.map is None:
            self.map = RootMap(self, self.extent_map_size)
        return self.map

    def stats(self) -> MapStats | None:
        """Hits and misses of native requests, and what the extent map holds; None: there is no map."""
        return None if self.map is None else self.map.extents.stats()

    # Gate.

    def close_gate(self) -> None:
        """New requests wait from now on; nests."""
        self._closed_gates += 1

    def open_gate(self) -> None:
        """Undo one close_gate."""
        self._closed_gates -= 1
        if not self._closed_gates:
            self._wake()

    def end(self) -> None:
        """For the graph: the root is gone. Requests that wait at the gate, and later ones, fail."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._gate is not None:
            self._gate.set()
            self._gate = None

    @property
    def busy(self) -> bool:
        """A request is in flight."""
        return self._in_flight > 0

    async def wait_idle(self) -> None:
        """Until no request is in flight; meaningful while the gate is closed."""
        while self._in_flight:
            if self._idle is None:
                self._idle = asyncio.Event()
            await self._idle.wait()

    async def enter(self) -> None:
        """Pass the gate; pair with `leave`.

        Raises:
            IOFailure: the root was closed (ESHUTDOWN).
        """
        while self._closed_gates and not self._ended:
            if self._gate is None:
                self._gate = asyncio.Event()
            await self._gate.wait()
        if self._ended:
            raise IOFailure(f"{self.owner} has been closed", node=self.root.node.name, errno=errno.ESHUTDOWN)
        self._in_flight += 1

    def leave(self) -> None:
        """The request that entered is over."""
        self._in_flight -= 1
        if not self._in_flight and self._idle is not None:
            self._idle.set()
            self._idle = None

    # Requests. Offsets and lengths in bytes, any alignment.

    async def pread(self, offset: int, length: int) -> bytes:
        """The bytes of [offset, offset + length).

        Raises:
            OutOfRange: not inside the disk.
            IOFailure: could not be read.
        """
        buf = bytearray(self._check("pread", offset, length))
        await self.pread_into(offset, memoryview(buf))
        return bytes(buf)

    async def pread_into(self, offset: int, buf: memoryview) -> None:
        """Fill `buf` (writable, contiguous, itemsize 1)."""
        self._check("pread", offset, len(buf))
        await self.enter()
        try:
            await self.root.node.pread(offset, buf)
            if self.map is not None:
                await self.map.fill(offset, len(buf))
        finally:
            self.leave()

    def is_scattered(self, offset: int, *, write: bool) -> bool:
        """A read or write was not in the map, and is better off with `look_up`, then done natively, than done here."""
        return self.map is not None and self.map.scattered.add(offset, write=write)

    def came_back(self, *, write: bool) -> None:
        """It was looked up, but is not in the map all the same."""
        if self.map is not None:
            self.map.scattered.came_back(write=write)

    async def look_up(self, runs: Sequence[tuple[int, int]]) -> None:
        """Let the map know where runs (offset, end) are. It may get to know none of them, or only how to read them."""
        assert self.map is not None
        await self.enter()
        try:
            await self.map.look_up(runs, write=self.writable)
        finally:
            self.leave()

    async def pread_missed(self, offset: int, buf: memoryview) -> bool:
        """Do as `pread_into`, or just look up what is to be tried natively again: False."""
        self._check("pread", offset, len(buf))
        if not (len(buf) and self.is_scattered(offset, write=False)):
            await self.pread_into(offset, buf)
            return True
        await self.look_up([(offset, offset + len(buf))])
        return False

    async def pwrite(self, offset: int, buf: memoryview | bytes | bytearray, flags: Flag = Flag.NONE) -> None:
        """Write `buf`; durable after a later flush, or at once with FUA.

        The buffer must not change until this returns.
        """
        view = memoryview(buf).cast("B")
        self._check("pwrite", offset, len(view), write=True)
        await self.enter()
        try:
            await self.root.pwrite(offset, view, flags)
            if self.map is not None:
                await self.map.fill(offset, len(view), written=True)
        finally:
            self.leave()

    async def write_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        """Make the range read as zeroes. Flags: FUA, MAY_UNMAP, NO_FALLBACK."""
        self._check("write_zeroes", offset, length, write=True)
        await self.enter()
        try:
            await self.root.pwrite_zeroes(offset, length, flags)
            await self._learn(offset, length, kept=not flags & Flag.MAY_UNMAP)
        finally:
            self.leave()

    async def discard(self, offset: int, length: int) -> None:
        """The range is no longer needed; advisory."""
        self._check("discard", offset, length, write=True)
        await self.enter()
        try:
            await self.root.discard(offset, length)
            await self._learn(offset, length, discard=True)
        finally:
            self.leave()

    async def _learn(self, offset: int, length: int, *, discard: bool = False, kept: bool = False) -> None:
        """Where bytes that were made zero live, if native code may do that next time."""
        if self.map is not None and self.map.learns_zeroes(offset, length, discard=discard, kept=kept):
            await self.map.fill(offset, length, written=kept)

    async def flush(self) -> None:
        """Make every completed write durable."""
        await self.enter()
        try:
            await (self.root if self.map is None else self.map).flush()
        finally:
            self.leave()

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """What the range contains from `offset` on; the answer may be shorter than the range."""
        self._check("block_status", offset, length)
        await self.enter()
        try:
            return await self.root.block_status(offset, length)
        finally:
            self.leave()

    async def truncate(self, size: int) -> None:
        """Change the size; needs RESIZE."""
        if size < 0:
            raise OutOfRange(f"negative size {size}", node=self.node.name, op="truncate")
        await self.enter()
        try:
            await self.root.truncate(size)
        finally:
            self.leave()

    def _check(self, op: str, offset: int, length: int, *, write: bool = False) -> int:
        node = self.root.node
        if offset < 0 or length < 0 or offset + length > node.size():
            raise OutOfRange(
                f"outside the disk of {node.size()} bytes", node=node.name, op=op, offset=offset, length=length
            )
        if write and not self.need & Perm.WRITE:
            raise ReadOnly(f"{self.owner} is read-only", node=node.name, op=op, offset=offset, length=length)
        return length
