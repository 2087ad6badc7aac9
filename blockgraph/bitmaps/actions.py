# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Changes of bitmaps as actions of a transaction: the node is drained, so each happens at one instant."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from blockgraph.bitmaps.attach import AttachSidecar
from blockgraph.bitmaps.bitmap import DirtyBitmap, Mode, View, check_granularity, check_name
from blockgraph.bitmaps.epochs import Epochs
from blockgraph.bitmaps.sidecar import Sidecar
from blockgraph.bitmaps.sidecar_format import new_entry
from blockgraph.bitmaps.store import LiveStore
from blockgraph.errors import GraphError
from blockgraph.graph.action import Action
from blockgraph.native import MAX_BITS, fits, fitting

if TYPE_CHECKING:
    from blockgraph.graph.transaction import Transaction
    from blockgraph.native import Bitmap
    from blockgraph.node import Node

log = logging.getLogger(__name__)

#: Bounds of the granularity that is chosen when none is given, bytes.
_LEAST, _MOST = 4 << 10, 64 << 10


class BitmapName(NamedTuple):
    """A bitmap of a node.

    Attributes:
        node: name of the node.
        name: its name.
    """

    node: str
    name: str


def find(change: Transaction, bitmap: BitmapName) -> DirtyBitmap:
    """The bitmap, as the transaction's earlier actions have made it.

    Raises:
        GraphError: there is no such node or bitmap.
    """
    return find_on(change.node(bitmap.node), bitmap.name)


def find_on(node: Node, name: str) -> DirtyBitmap:
    """The bitmap of a node.

    Raises:
        GraphError: it has none of that name; tells those it has.
    """
    try:
        return node.bitmaps[name]
    except KeyError:
        known = ", ".join(f"'{known}'" for known in node.bitmaps) or "none"
        raise GraphError(f"there is no bitmap '{name}' (there are: {known})", node=node.name) from None


class BitmapAction(Action):
    """An action on one bitmap; `undo` collects what takes it back, `kept` what is stored until it no longer can be."""

    def __init__(self, bitmap: BitmapName) -> None:
        self.bitmap = bitmap
        self._undo: list[Callable[[], None]] = []
        self._kept: list[Callable[[], None]] = []

    def nodes(self) -> Sequence[str]:
        return (self.bitmap.node,)

    async def abort(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self.commit()

    def commit(self) -> None:
        while self._kept:
            self._kept.pop()()

    async def _begin(self, node: Node, bitmap: DirtyBitmap) -> None:
        """Before the bitmap changes."""
        store = node.bitmap_store
        if bitmap.persistent and store is not None:
            await store.begin()
            if isinstance(store, LiveStore):
                self._kept.append(store.keep(bitmap))

    async def _store(self, node: Node, bitmap: DirtyBitmap) -> None:
        """After something was added to it."""
        if bitmap.persistent and isinstance(node.bitmap_store, LiveStore):
            await node.bitmap_store.store()


class NewBitmap(TypedDict, total=False):
    """Members of AddBitmap, for those who pass them on.

    Attributes:
        granularity: bytes per bit, a power of two; None (default): the node's cluster size within 4 to 64 KiB, 64 KiB
            where it has none, and more for a disk that would have more bits than a bitmap can.
        enabled: it records writes (default).
        persistent: the node's image keeps it, or the sidecar file that it has.
        sidecar: with `persistent`, for a node without a place for bitmaps: the file that keeps them, or True for the
            image's name with ".bitmaps". It is made when it is missing, and found by itself from then on.
        epochs: it can tell what has changed since any of its checkpoints; see AdvanceEpoch.
    """

    granularity: int | None
    enabled: bool
    persistent: bool
    sidecar: str | bool
    epochs: bool


class AddBitmap(BitmapAction):
    """A new, empty bitmap; members as of NewBitmap."""

    def __init__(
        self,
        bitmap: BitmapName,
        *,
        granularity: int | None = None,
        enabled: bool = True,
        persistent: bool = False,
        sidecar: str | bool = False,
        epochs: bool = False,
    ) -> None:
        super().__init__(bitmap)
        self._attach: AttachSidecar | None = None
        if sidecar:
            self._attach = AttachSidecar(bitmap.node, None if sidecar is True else sidecar, shared=True)
        self._granularity = granularity
        self._enabled = enabled
        self._persistent = persistent
        self._epochs = epochs

    async def prepare(self, change: Transaction) -> None:
        node = change.node(self.bitmap.node)
        name = self.bitmap.name
        if self._attach is not None:
            await self._attach.prepare(change)
        check_name(name, node=node.name)
        if name in node.bitmaps:
            raise GraphError(f"there already is a bitmap '{name}'", node=node.name, op="add")
        granularity = default_granularity(node) if self._granularity is None else self._granularity
        check_granularity(granularity, node=node.name)
        if not fits(node.size(), granularity):
            raise GraphError(
                f"bitmap '{name}' would have more than {MAX_BITS} bits for {node.size()} bytes",
                node=node.name,
                op="add",
                hint="choose a larger granularity",
            )
        bitmap = DirtyBitmap(
            name, node.size(), granularity, node=node.name, enabled=self._enabled, persistent=self._persistent
        )
        if self._epochs:
            entry = new_entry(name, granularity, bitmap.size)
            bitmap.epochs = Epochs(bitmap.size, granularity, 8 << entry.chunk_bits)
            if self._persistent and node.bitmap_store is not None and not isinstance(node.bitmap_store, Sidecar):
                raise GraphError(
                    f"driver '{node.driver.name}' has no place for the epochs of a bitmap",
                    node=node.name,
                    op="add",
                    hint="leave out 'persistent', or attach a sidecar",
                )
        if self._persistent:
            if node.bitmap_store is None:
                raise GraphError(
                    f"driver '{node.driver.name}' has no place for persistent bitmaps",
                    node=node.name,
                    op="add",
                    hint="give the bitmap a sidecar file",
                )
            node.bitmap_store.check(bitmap)
            await node.bitmap_store.begin()
        node.bitmaps[name] = bitmap
        self._undo.append(lambda: node.bitmaps.__delitem__(name))
        await self._store(node, bitmap)

    async def abort(self) -> None:
        await super().abort()
        if self._attach is not None:
            await self._attach.abort()


class EnsureBitmap(AddBitmap):
    """The bitmap that the node has already, or a new one.

    Args: as AddBitmap; of one that is there only granularity and epochs count: they must be what is asked for.
    """

    async def prepare(self, change: Transaction) -> None:
        bitmap = change.node(self.bitmap.node).bitmaps.get(self.bitmap.name)
        if bitmap is None:
            await super().prepare(change)
            return
        check_agrees(bitmap, self._granularity)
        if self._epochs and bitmap.epochs is None and not bitmap.inconsistent:
            raise GraphError(
                f"bitmap '{bitmap.name}' is there already, without epochs",
                node=bitmap.node,
                op="add",
                hint="leave them out, or remove it first",
            )
        if bitmap.inconsistent:
            log.warning("%s", bitmap.why_unusable("add"))


def check_agrees(bitmap: DirtyBitmap, granularity: int | None) -> None:
    """Refuse a bitmap that is there already with another granularity.

    Raises:
        GraphError: names both.
    """
    if granularity not in (None, bitmap.granularity):
        raise GraphError(
            f"bitmap '{bitmap.name}' is there already, with granularity {bitmap.granularity} and not {granularity}",
            node=bitmap.node,
            op="add",
            hint="ask for the granularity that it has, or remove it first",
        )


class RemoveBitmap(BitmapAction):
    """The bitmap is gone, also an inconsistent one."""

    async def prepare(self, change: Transaction) -> None:
        node = change.node(self.bitmap.node)
        bitmap = find(change, self.bitmap)
        bitmap.check_free("remove")
        await self._begin(node, bitmap)
        before = dict(node.bitmaps)
        del node.bitmaps[bitmap.name]

        def undo() -> None:
            node.bitmaps.clear()
            node.bitmaps.update(before)

        self._undo.append(undo)


class ClearBitmap(BitmapAction):
    """Nothing is marked any more."""

    async def prepare(self, change: Transaction) -> None:
        bitmap = find(change, self.bitmap)
        bitmap.check_usable("clear")
        await self._begin(change.node(self.bitmap.node), bitmap)
        self._undo.append(bitmap.clear())


class AdvanceEpoch(BitmapAction):
    """A new checkpoint in a bitmap with epochs: its bits are stamped, at one instant, and begin anew.

    Attributes:
        checkpoint: its number, for `DirtyBitmap.since`, once the transaction has committed.
    """

    checkpoint: int

    async def prepare(self, change: Transaction) -> None:
        node, bitmap = change.node(self.bitmap.node), find(change, self.bitmap)
        bitmap.check_usable("advance")
        if bitmap.epochs is None:
            raise GraphError(f"bitmap '{bitmap.name}' has no epochs", node=node.name, hint="add one with epochs")
        await self._begin(node, bitmap)
        self._undo.append(bitmap.advance())
        self.checkpoint = bitmap.epochs.current
        await self._store(node, bitmap)


class EnableBitmap(BitmapAction):
    """The bitmap records writes from now on, or (`enabled` False) no longer does."""

    def __init__(self, bitmap: BitmapName, *, enabled: bool) -> None:
        super().__init__(bitmap)
        self._enabled = enabled

    async def prepare(self, change: Transaction) -> None:
        bitmap = find(change, self.bitmap)
        bitmap.check_usable("enable" if self._enabled else "disable")
        node = change.node(self.bitmap.node)
        await self._begin(node, bitmap)
        before = bitmap.enabled
        bitmap.enabled = self._enabled
        self._undo.append(lambda: setattr(bitmap, "enabled", before))
        if self._enabled and not before:
            await self._store(node, bitmap)


class MergeBitmaps(BitmapAction):
    """Whatever is marked in one of the sources is marked in the bitmap, too."""

    def __init__(self, bitmap: BitmapName, sources: Sequence[BitmapName]) -> None:
        super().__init__(bitmap)
        self._sources = sources

    def nodes(self) -> Sequence[str]:
        return [self.bitmap.node, *(source.node for source in self._sources)]

    async def prepare(self, change: Transaction) -> None:
        bitmap = find(change, self.bitmap)
        bitmap.check_usable("merge")
        added: list[Bitmap] = []
        for name in self._sources:
            source = find(change, name)
            source.check_usable("merge")
            if source.size != bitmap.size:
                raise GraphError(
                    f"bitmap '{name.name}' covers {source.size} bytes, bitmap '{bitmap.name}' {bitmap.size}",
                    node=bitmap.node,
                    op="merge",
                    hint="only bitmaps of disks of the same size can be merged",
                )
            added.append(source.contents())
        node = change.node(self.bitmap.node)
        await self._begin(node, bitmap)
        self._undo.append(bitmap.merge(added))
        await self._store(node, bitmap)


@dataclass
class TakeView(Action):
    """A view of the bitmap, as it is at the instant of the transaction.

    Attributes:
        view: once the transaction has committed.
    """

    bitmap: BitmapName
    holder: str
    mode: Mode = "never"
    view: View = field(init=False)
    _taken: bool = field(default=False, init=False)

    def nodes(self) -> Sequence[str]:
        return (self.bitmap.node,)

    async def prepare(self, change: Transaction) -> None:
        self.view = find(change, self.bitmap).take(self.holder, self.mode)
        self._taken = True

    async def abort(self) -> None:
        if self._taken:
            self.view.drop()


def default_granularity(node: Node) -> int:
    """Bytes per bit when nobody says: see AddBitmap."""
    cluster = node.driver.info().cluster_size
    return fitting(node.size(), max(_LEAST, min(cluster, _MOST)) if cluster else _MOST)
