# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Resolving a range down to storage, and holding the answer still while it is used.

```
async with Pins() as pins:
    leaf = await pins.read(node, offset, length)      # where the bytes are now
    room = await pins.write(node, offset, length)     # where new bytes may go; allocated if need be
    ... move bytes between leaf.storage and room.storage without asking any node ...
    await pins.commit()                               # the new bytes become visible
```

`Pins` registers a request on every node the answer passes through. Whoever revokes a mapping (a discard, a drain, a
serialising write) waits for those requests, or frees storage only after they have ended, so nothing that was resolved
inside the block moves before its end.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from blockgraph.driver import Format
from blockgraph.errors import Unsupported
from blockgraph.extent import Status

if TYPE_CHECKING:
    from blockgraph.driver import Allocation
    from blockgraph.node import Node, Request


class Leaf(NamedTuple):
    """A resolved range.

    Attributes:
        offset, length: in the node that was asked, bytes.
        status: DATA (bytes at storage, storage_offset), ZERO (reads as zeroes), or SPECIAL (ask the node).
        storage: the node with `driver.fd()` not None, for DATA; else None.
        storage_offset: where in the storage.
        depth: COW steps down to the answer, -1: allocated nowhere. Unspecified (0) for SPECIAL.
    """

    offset: int
    length: int
    status: Status
    storage: Node | None = None
    storage_offset: int = 0
    depth: int = 0


class Pins:
    """Requests held on nodes, and allocations not yet committed. An async context manager; see the module's text."""

    def __init__(self) -> None:
        self._held: list[tuple[Node, Request]] = []
        self._written: list[tuple[Node, int, int]] = []
        self._allocations: list[tuple[Node, Allocation]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.release()

    async def release(self) -> None:
        """Give up what is held, and allocations not committed. The end of the block does this, too."""
        try:
            while self._allocations:
                await self._allocations.pop()[1].abort()
        finally:
            for node, offset, length in self._written:
                node.changed(offset, length)
            self._written.clear()
            while self._held:
                node, request = self._held.pop()
                await node.finish(request)

    async def commit(self) -> None:
        """Link in everything allocated, deepest node first; the data has been written."""
        while self._allocations:
            await self._allocations.pop()[1].commit()

    async def hold(self, node: Node, offset: int, length: int) -> None:
        """Be a serialising request on the whole clusters of the range, until the end of the block.

        Take it before anything else: whoever it waits for may need what is held here.
        """
        unit = node.driver.info().cluster_size or 1
        start = offset - offset % unit
        end = offset + length + -(offset + length) % unit
        self._held.append((node, await node.begin(start, end - start, serialising=True, owner=self)))

    async def read(self, node: Node, offset: int, length: int) -> Leaf:
        """Where the bytes at `offset` are; at most `length` of them, inside the node or past its end (zeroes)."""
        start, depth = offset, 0
        while True:
            size = node.size()
            if offset >= size:
                return Leaf(start, length, Status.ZERO, depth=depth)
            length = min(length, size - offset)
            self._held.append((node, await node.begin(offset, length, owner=self)))
            extent = (await node.map(offset, length)).clip(offset, length)
            length = extent.length
            if extent.status is Status.ZERO:
                return Leaf(start, length, Status.ZERO, depth=depth)
            if extent.status is Status.SPECIAL:
                return Leaf(start, length, Status.SPECIAL)
            if extent.status is Status.UNALLOCATED:
                cow = node.driver.cow() if isinstance(node.driver, Format) else None
                if cow is None:
                    return Leaf(start, length, Status.ZERO, depth=-1)
                node, depth = cow.node, depth + 1
            elif extent.child is not None:
                node, offset = extent.child.node, extent.child_offset
            else:
                return await self._storage(node, start, extent.child_offset, length, depth)

    async def _storage(self, node: Node, start: int, offset: int, length: int, depth: int) -> Leaf:
        run, status = await node.driver.storage_status(offset, length)
        run = min(run, length)
        if status is Status.ZERO:
            return Leaf(start, run, Status.ZERO, depth=depth)
        align = node.driver.request_alignment
        if node.driver.fd() is None or (align > 1 and (offset | run) % align):
            return Leaf(start, run, Status.SPECIAL, depth=depth)
        return Leaf(start, run, Status.DATA, node, offset, depth)

    async def write(self, node: Node, offset: int, length: int) -> Leaf | None:
        """Where new bytes for `offset` may be put, at most `length` of them; allocates.

        SPECIAL: only the node's own pwrite can; call that after this block has ended. None: the cluster belongs to an
        allocation of this block that is not committed; fill and `commit` what there is, then ask again.
        """
        start = offset
        mine = len(self._allocations)
        while True:
            special = Leaf(start, length, Status.SPECIAL)
            if node.options.detect_zeroes != "off":
                return await self._give_up(special, mine)
            self._held.append((node, await node.begin(offset, length, owner=self)))
            self._written.append((node, offset, length))
            if node.guard is not None:
                await node.guard.before(offset, length)
            extent = (await node.map(offset, length)).clip(offset, length)
            if extent.status is not Status.DATA or not extent.writable:
                if self._allocated(node, offset):
                    await self._give_up(special, mine)
                    return None
                try:
                    allocation = await node.driver.allocate(offset, length)
                except Unsupported:
                    return await self._give_up(special, mine)
                self._allocations.append((node, allocation))
                extent = allocation.extent
            length = extent.length
            if extent.child is not None:
                node, offset = extent.child.node, extent.child_offset
                continue
            align = node.driver.request_alignment
            if node.driver.fd() is None or (align > 1 and (extent.child_offset | length) % align):
                return await self._give_up(special._replace(length=length), mine)
            return Leaf(start, length, Status.DATA, node, extent.child_offset)

    def _allocated(self, node: Node, offset: int) -> bool:
        """An allocation that is not committed has the cluster: `allocate` would wait for it, and so for us."""
        unit = node.driver.info().cluster_size or 1
        start = offset - offset % unit
        return any(
            other is node
            and allocation.extent.offset < start + unit
            and start < allocation.extent.offset + allocation.extent.length
            for other, allocation in self._allocations
        )

    async def _give_up(self, special: Leaf, mine: int) -> Leaf:
        """Nobody will fill what this answer allocated on its way."""
        while len(self._allocations) > mine:
            await self._allocations.pop()[1].abort()
        return special
