# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""How a node gets its sidecar: because there is one beside its image, or because somebody asks.

A `raw` node over a whole file or device looks for "FILE.bitmaps" when it is opened, and so does a format with a place
for bitmaps of its own, which the sidecar then makes safe against crashes (`CrashSafeStore`). Any other node gets one by
`AttachSidecar`, which has to name the file where the node has none itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockgraph.bitmaps.crash_safe import CrashSafeStore
from blockgraph.bitmaps.identity import FILES, storage_of
from blockgraph.bitmaps.sidecar import SUFFIX, Sidecar
from blockgraph.errors import CorruptImage, GraphError
from blockgraph.graph.action import Action

if TYPE_CHECKING:
    from blockgraph.bitmaps.store import BitmapStore
    from blockgraph.graph.transaction import Transaction
    from blockgraph.node import Node

log = logging.getLogger(__name__)


def default_path(node: Node) -> str | None:
    """Beside the file or device of a node; None: it has none."""
    storage = storage_of(node)
    name = None if storage is None else storage.driver.filename()
    return None if name is None else name + SUFFIX


async def find_sidecar(node: Node) -> bool:
    """Give a node that was just opened the sidecar beside its image. False: there is none.

    A damaged one is left alone, and the node has no place for bitmaps, or only its own.

    Raises:
        IOFailure: it can not be read, or is in use elsewhere while this node may write.
    """
    storage = storage_of(node)
    if storage is None or storage is node or storage.driver.name not in FILES:
        return False
    if node.bitmap_store is None and (node.driver.name != "raw" or node.children["file"].node is not storage):
        return False
    path = default_path(node)
    if path is None:
        return False
    sidecar = Sidecar(node, path) if node.bitmap_store is None else CrashSafeStore(node, path, node.bitmap_store)
    if not sidecar.file.exists():
        return False
    try:
        loaded = await sidecar.load()
    except CorruptImage as error:
        log.error("%s", error)
        await sidecar.close()
        return False
    except BaseException:
        await sidecar.close()
        raise
    node.bitmap_store = sidecar
    node.bitmaps = {bitmap.name: bitmap for bitmap in loaded}
    return True


class AttachSidecar(Action):
    """Give a node a sidecar, and the bitmaps that are in it.

    Args:
        path: None: the image's name with ".bitmaps".
        crash_safe: see `Sidecar`; of no choice where the image has a place for bitmaps.
        shared: a node that has this very sidecar already is fine.
    """

    def __init__(
        self, node: str, path: str | None = None, *, crash_safe: bool | None = None, shared: bool = False
    ) -> None:
        self._name = node
        self._path = path
        self._crash_safe = crash_safe
        self._shared = shared
        self._node: Node | None = None
        self._sidecar: Sidecar | None = None
        self._existed = True
        self._former: BitmapStore | None = None
        self._loaded: list[str] = []

    def nodes(self) -> Sequence[str]:
        return (self._name,)

    async def prepare(self, change: Transaction) -> None:
        await self.attach(change.node(self._name))

    async def attach(self, node: Node) -> None:
        """`prepare`, without a transaction."""
        path = self._path or default_path(node)
        if path is None:
            raise GraphError("has no file to put a sidecar beside", node=node.name, hint="name the sidecar file")
        store = node.bitmap_store
        if isinstance(store, Sidecar):
            if self._shared and _same(store.path, path):
                if self._crash_safe not in (None, store.crash_safe):
                    raise GraphError(
                        f"sidecar '{path}' is {'' if store.crash_safe else 'not '}crash-safe",
                        node=node.name,
                        op="attach",
                        hint="ask for what it is, or remove its bitmaps and the file",
                    )
                return
            raise GraphError(f"already keeps its bitmaps in sidecar '{store.path}'", node=node.name, op="attach")
        if store is not None:
            await self._wrap(node, path, store)
            return
        self._sidecar = Sidecar(node, path, crash_safe=self._crash_safe)
        self._existed = self._sidecar.file.exists()
        loaded = await self._sidecar.load()
        for bitmap in loaded:
            if bitmap.name in node.bitmaps:
                raise GraphError(
                    f"there already is a bitmap '{bitmap.name}', and one in sidecar '{path}'",
                    node=node.name,
                    op="attach",
                    hint="remove it first",
                )
        node.bitmaps.update((bitmap.name, bitmap) for bitmap in loaded)
        self._loaded = [bitmap.name for bitmap in loaded]
        self._node = node
        node.bitmap_store = self._sidecar

    async def _wrap(self, node: Node, path: str, store: BitmapStore) -> None:
        if self._crash_safe is False:
            raise GraphError(
                "keeps its bitmaps in its image: a sidecar is of use only with crash-safe", node=node.name, op="attach"
            )
        self._sidecar = wrapped = CrashSafeStore(node, path, store)
        self._existed = wrapped.file.exists()
        await wrapped.adopt()
        self._node, self._former = node, store
        node.bitmap_store = wrapped

    async def abort(self) -> None:
        if self._node is not None:
            self._node.bitmap_store = self._former
            for name in self._loaded:
                del self._node.bitmaps[name]
        if self._sidecar is not None:
            await self._sidecar.close()
            if not self._existed:
                self._sidecar.file.remove()


def _same(path: str, other: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)
