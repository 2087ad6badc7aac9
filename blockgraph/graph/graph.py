# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Graph: the running nodes and roots, and the only way to change them, a transaction.

```
async with graph.transaction() as change:
    change.add({"driver": "backup-top", "node-name": "top", "file": "disk", "target": "scratch"})
    change.insert("top", above="disk")
```

Everything here runs on the graph's loop thread. Changes are made one after the other; requests go on until the very
moment they must be held.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Unpack

from blockgraph.backend import Backend
from blockgraph.bitmaps import DirtyBitmap
from blockgraph.bitmaps.actions import (
    AddBitmap,
    AdvanceEpoch,
    BitmapName,
    ClearBitmap,
    EnableBitmap,
    MergeBitmaps,
    NewBitmap,
    RemoveBitmap,
    find_on,
)
from blockgraph.bitmaps.attach import AttachSidecar
from blockgraph.bitmaps.identity import whole
from blockgraph.bitmaps.query import BitmapInfo, digest, info
from blockgraph.errors import OutOfRange
from blockgraph.finish import finish
from blockgraph.graph.action import Action
from blockgraph.graph.drain import Drain
from blockgraph.graph.model import Model, NodeVertex
from blockgraph.graph.opening import close_nodes
from blockgraph.graph.policy import OpenPolicy
from blockgraph.graph.transaction import Transaction
from blockgraph.native import Bitmap
from blockgraph.native.extent_map import DEFAULT_MEMORY
from blockgraph.node import Node
from blockgraph.perm import ALL, Perm, Role

if TYPE_CHECKING:
    from blockgraph.graph.description import Description
    from blockgraph.graph.problem import Problem


class Graph:
    """See the module's text.

    Attributes:
        model: the graph as it is; replaced as a whole by each committed transaction.
        policy: what images may name.
        owned: names of the nodes somebody added by name; others go when their last parent goes.
        drains: under way.
        before_close: ends what uses the graph (jobs); awaited, last first, when the graph closes.
    """

    def __init__(self, policy: OpenPolicy | None = None) -> None:
        self.model = Model()
        self.policy = policy or OpenPolicy()
        self.owned: set[str] = set()
        self.drains: list[Drain] = []
        self.before_close: list[Callable[[], Awaitable[None]]] = []
        self._changing = asyncio.Lock()
        self._unnamed = 0

    # Looking.

    def node(self, name: str) -> Node:
        """The running node of that name.

        Raises:
            GraphError: there is none.
        """
        node = self.model.node(name).node
        assert node is not None
        return node

    def nodes(self) -> list[Node]:
        """All running nodes, in the order they were added."""
        return [vertex.node for vertex in self.model.nodes() if vertex.node is not None]

    def backends(self) -> list[Backend]:
        """All roots, in the order they were added."""
        return [root.backend for root in self.model.roots() if root.backend is not None]

    def new_name(self, model: Model) -> str:
        """A name for a node that was given none."""
        while True:
            self._unnamed += 1
            name = f"#block{self._unnamed}"
            if not model.has(name):
                return name

    # Changing.

    @asynccontextmanager
    async def transaction(self, *, forced: bool = False) -> AsyncIterator[Transaction]:
        """Edits made inside are committed together at the end of the block, or not at all.

        Args:
            forced: a node that fails to flush on the way does not keep the change back; it is logged.
        Raises:
            GraphError (or what opening an image raised): the graph is unchanged.
        Cancelled: while requests are waited for, nothing has changed; later the change is completed first.
        """
        async with self._changing:
            change = Transaction(self, forced=forced)
            try:
                yield change
                await change.commit()
            finally:
                change.over()

    async def add_node(self, description: Mapping[str, Any]) -> Node:
        """Open a node (and those described inside it)."""
        async with self.transaction() as change:
            name = change.add(description)
        return self.node(name)

    async def remove_node(self, name: str) -> None:
        """Close a node.

        Raises:
            NodeInUse: something still refers to it.
        """
        async with self.transaction(forced=True) as change:
            change.remove(name)

    async def replace_node(self, old: str, new: str) -> None:
        """Let every parent of `old` use `new` instead."""
        async with self.transaction() as change:
            change.replace(old, new)

    async def insert_filter(self, description: Mapping[str, Any] | str, above: str) -> Node:
        """Put a filter (described, or there already) over a live node; no write passes beside it from then on."""
        async with self.transaction() as change:
            name = description if isinstance(description, str) else change.add(description)
            change.insert(name, above=above)
        return self.node(name)

    async def remove_filter(self, name: str) -> None:
        """Take a filter out and close it; its parents use the filtered child again."""
        async with self.transaction() as change:
            change.remove_filter(name)

    async def reopen(self, name: str, options: Mapping[str, Any]) -> None:
        """Give a node new options; those left out return to their defaults."""
        async with self.transaction() as change:
            change.reopen(name, options)

    async def snapshot(self, node: str, overlay: Mapping[str, Any] | str) -> Node:
        """External snapshot: `overlay`, which must have no backing yet, is put over `node`; writes go there."""
        async with self.transaction() as change:
            name = overlay if isinstance(overlay, str) else change.add(overlay)
            change.snapshot(node, name)
        return self.node(name)

    async def backend(
        self,
        node: str,
        *,
        name: str | None = None,
        writable: bool = False,
        resize: bool = False,
        share: Perm = ALL,
        owner: str | None = None,
        stays: bool = False,
        extent_map_size: int = DEFAULT_MEMORY,
    ) -> Backend:
        """A new root over a node. End it with `close_backend`.

        Args:
            writable, resize: permissions beyond reading.
            share: what others may do with the node meanwhile.
            owner: for messages.
            stays: it stays at this very node when a filter is inserted above the node.
            extent_map_size: most memory of its extent map, bytes.
        Raises:
            OptionError: `extent_map_size` is too small.
            GraphError: no such node, or the permissions can not be had.
        """
        need = Perm.CONSISTENT_READ
        need |= Perm.WRITE if writable else Perm(0)
        need |= Perm.RESIZE if resize else Perm(0)
        backend: Backend | None = None
        try:
            async with self.transaction() as change:
                name = name or self._root_name(node)
                backend = Backend(
                    name, need=need, share=share, owner=owner, stays=stays, extent_map_size=extent_map_size
                )
                change.attach(backend, node)
        except asyncio.CancelledError:
            if backend is not None and backend in self.backends():
                await finish(self.close_backend(backend))
            raise
        return backend

    def _root_name(self, node: str) -> str:
        taken = {backend.name for backend in self.backends()}
        return next(name for i in range(len(taken) + 1) if (name := f"{node}-{i}") not in taken)

    async def close_backend(self, backend: Backend) -> None:
        """Flush (when it could write), wait for its requests and remove the root.

        Raises:
            IOFailure: the flush failed; the root is gone all the same.
            GraphError: it is not a root of this graph (any more).
        """
        try:
            if backend.writable and backend in self.backends():
                await backend.flush()
        finally:
            async with self.transaction(forced=True) as change:
                change.detach(backend)

    async def close(self) -> None:
        """End what uses the graph, wait for every request, write everything back and close every node, parents first.

        Requests that wait at a gate, and later ones, fail.

        Raises:
            BlockGraphError: the first failure; everything is closed all the same.
        Cancelled: while requests are waited for, nothing is closed.
        """
        for end in reversed(self.before_close):
            await end()
        async with self._changing, self.drained():
            await finish(self._close_all())

    async def _close_all(self) -> None:
        model, self.model = self.model, Model()
        for root in model.roots():
            if root.backend is not None:
                root.backend.end()
        vertices = (model.get(name) for name in model.topological())
        nodes = [vertex.node for vertex in vertices if isinstance(vertex, NodeVertex) and vertex.node is not None]
        if (failure := await close_nodes(nodes)) is not None:
            raise failure

    # Holding still.

    @asynccontextmanager
    async def drained(self, names: Iterable[str] | None = None) -> AsyncIterator[None]:
        """Inside, no request is in flight on these nodes (None: on any) and new ones wait at their backend.

        Nests, in one task or in several. A change of the graph inside is held to it too: roots that come to lie above
        the nodes wait as well.
        """
        drain = Drain(self, names)
        self.drains.append(drain)
        try:
            await drain.wait()
            yield
        finally:
            self.drains.remove(drain)
            drain.end()

    @staticmethod
    async def dry_run(description: Description, policy: OpenPolicy | None = None) -> list[Problem]:
        """What goes wrong when everything described is opened, read-only and without locks."""
        from blockgraph.graph.dry_run import dry_run

        return await dry_run(description, policy)

    # Bitmaps. Each change is a transaction; for several at one instant see `act` and blockgraph.bitmaps.actions.

    def bitmaps(self, node: str | None = None) -> list[BitmapInfo]:
        """The bitmaps of a node, or of all nodes, in the order they were added.

        Raises:
            GraphError: there is no such node.
        """
        nodes = self.nodes() if node is None else [self.node(node)]
        return [info(bitmap) for each in nodes for bitmap in each.bitmaps.values()]

    def dirty_extents(self, node: str, name: str, offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
        """Offset and length of what is dirty in [offset, offset + length), in bytes, in order.

        Args:
            length: None: up to the disk's end.
        Raises:
            GraphError: there is no such node or bitmap, or it is inconsistent.
            OutOfRange: the range is not inside the disk.
        """
        bits = self.find_bitmap(node, name)
        end = bits.size if length is None else offset + length
        if not 0 <= offset <= end <= bits.size:
            raise OutOfRange(
                f"outside the disk of {bits.size} bytes", node=node, op="bitmap", offset=offset, length=end - offset
            )
        return list(bits.dirty_extents(offset, end))

    async def bitmap_digest(self, node: str, name: str) -> str:
        """SHA-256 of the bits, as QEMU's x-debug-block-dirty-bitmap-sha256 (blockgraph.bitmaps.query.digest).

        Raises:
            GraphError: there is no such node or bitmap, or it is inconsistent.
        """
        return await digest(self.find_bitmap(node, name))

    async def add_bitmap(self, node: str, name: str, **how: Unpack[NewBitmap]) -> DirtyBitmap:
        """A new, empty dirty bitmap on a node. It has every write that is not over when this returns.

        Args:
            how: see NewBitmap.
        Raises:
            GraphError: the name is taken or too long, the granularity is none, or there is no place for it.
        """
        await self.act(AddBitmap(BitmapName(node, name), **how))
        return self.bitmap(node, name)

    async def attach_sidecar(self, node: str, path: str | None = None, *, crash_safe: bool | None = None) -> None:
        """Keep the persistent bitmaps of a node in a file beside its image, and take over those that are there.

        Args:
            path: None: the image's name with ".bitmaps". Made with the first bitmap, when it is missing.
            crash_safe: what changes is marked in the file before it changes, so that bitmaps survive a crash.
                None: as the file says, and so in a new one.
        Raises:
            GraphError: the node has a place for them already, or is no file.
            CorruptImage: the file is damaged, or something else.
        """
        await self.act(AttachSidecar(node, path, crash_safe=crash_safe))

    async def remove_bitmap(self, node: str, name: str) -> None:
        """Remove a bitmap, also from the image that keeps it.

        Raises:
            NodeInUse: somebody reads it.
        """
        await self.act(RemoveBitmap(BitmapName(node, name)))

    async def clear_bitmap(self, node: str, name: str) -> None:
        """Nothing is marked any more."""
        await self.act(ClearBitmap(BitmapName(node, name)))

    async def advance_epoch(self, node: str, name: str) -> int:
        """Begin a new checkpoint in a bitmap with epochs; returns its number, for `DirtyBitmap.since`.

        The first checkpoint of a bitmap is 1, when it was added.
        """
        action = AdvanceEpoch(BitmapName(node, name))
        await self.act(action)
        return action.checkpoint

    async def enable_bitmap(self, node: str, name: str, *, enabled: bool = True) -> None:
        """Record writes from now on, or no longer."""
        await self.act(EnableBitmap(BitmapName(node, name), enabled=enabled))

    async def merge_bitmaps(self, node: str, name: str, sources: Iterable[tuple[str, str]]) -> None:
        """Mark in a bitmap whatever is marked in one of the `sources` (node and name), of any granularity.

        Raises:
            GraphError: a source is not there, inconsistent, or of a disk of another size; the bitmap is unchanged.
        """
        await self.act(MergeBitmaps(BitmapName(node, name), [BitmapName(*source) for source in sources]))

    async def act(self, *actions: Action) -> None:
        """All of these at one instant, or none."""
        async with self.transaction() as change:
            for action in actions:
                change.act(action)

    def bitmap(self, node: str, name: str) -> DirtyBitmap:
        """A bitmap of a node.

        Raises:
            GraphError: there is no such node or bitmap.
        """
        return find_on(self.node(node), name)

    def shown_by(self, name: str) -> Iterator[Node]:
        """Running nodes right above that show all of a node, and are as long as it is; none while it is being added."""
        for edge in self.model.parents(name) if self.model.has(name) else ():
            above = self.model.get(edge.parent)
            node = above.node if isinstance(above, NodeVertex) else None
            if node is not None and (edge.role & Role.FILTERED or (node.driver.transparent and whole(node))):
                yield node

    def find_bitmap(self, node: str, name: str) -> Bitmap:
        """What a named bitmap holds; not to be changed.

        Raises:
            GraphError: there is no such node or bitmap, or it is inconsistent.
        """
        bitmap = self.bitmap(node, name)
        bitmap.check_usable("read")
        return bitmap.contents()
