# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Exports as actions of a transaction: a point in time, its bitmaps and the export that shows them come to be at once.

    async with graph.transaction() as change:
        change.add({"driver": "backup-top", "node-name": "top", "file": "disk", "target": "kept"})
        change.insert("top", above="disk")
        change.add({"driver": "snapshot-access", "node-name": "then", "file": "top"})
        pull = AddExport(change, server, NbdExportOptions(id="pull", node_name="then", bitmaps=("b0",)))

An export shows a *view* of each of its bitmaps: what the bitmap held at the instant of the transaction. Writes after
that are recorded beside it, so a bitmap may be exported while it records, and by several exports at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from blockgraph.backend import Backend
from blockgraph.errors import GraphError
from blockgraph.exports.nbd.export import NbdExport
from blockgraph.graph.action import Action
from blockgraph.graph.bitmaps import shown_below
from blockgraph.perm import ALL, Perm

if TYPE_CHECKING:
    from blockgraph.bitmaps import DirtyBitmap, View
    from blockgraph.exports.nbd.server import NbdServer
    from blockgraph.exports.options import NbdExportOptions
    from blockgraph.graph.transaction import Transaction
    from blockgraph.options import BitmapRef


class AddExport(Action):
    """Clients find the export as soon as the transaction has committed.

    Args:
        change: gets the export's root, and this action.
        server: may not listen yet.
        options: as in a graph file.

    Attributes:
        options: as given.
        backend: its root.
        export: what the server has, once the transaction has committed; its `stats` tell what it has done.
    """

    export: NbdExport

    def __init__(self, change: Transaction, server: NbdServer, options: NbdExportOptions) -> None:
        self.options = options
        self.server = server
        self.backend = Backend(
            f"export-{options.id}",
            need=Perm.CONSISTENT_READ | (Perm.WRITE if options.writable else Perm(0)),
            share=ALL & ~Perm.RESIZE,
            owner=f"export '{options.id}'",
            extent_map_size=options.extent_map_bytes,
        )
        self._candidate = change.candidate
        self._views: list[View] = []
        self._reserved = False
        change.attach(self.backend, options.node_name)
        change.act(self)

    def nodes(self) -> Iterable[str]:
        """Those whose bitmaps are looked at: a view is taken with the node held still."""
        names: set[str] = set()
        for wanted in self.options.bitmaps:
            if isinstance(wanted, str):
                names.update(shown_below(self._candidate, self.options.node_name))
            else:
                names.add(wanted.node)
        return names

    async def prepare(self, change: Transaction) -> None:
        options, name = self.options, self.options.export_name
        self.server.reserve(name)
        self._reserved = True
        bitmaps = {}
        for wanted in options.bitmaps:
            view = self._find(change, wanted).take(self.backend.owner)
            self._views.append(view)
            bitmaps[view.bitmap.name] = view.bits
        self.export = NbdExport(
            name,
            self.backend,
            description=options.description,
            writable=options.writable,
            bitmaps=bitmaps,
            allocation_depth=options.allocation_depth,
        )

    def _find(self, change: Transaction, wanted: str | BitmapRef) -> DirtyBitmap:
        if isinstance(wanted, str):
            name, names = wanted, shown_below(change.candidate, self.options.node_name)
        else:
            name, names = wanted.name, [wanted.node]
        nodes = [change.node(node) for node in names]
        for node in nodes:
            if name in node.bitmaps:
                return node.bitmaps[name]
        known = ", ".join(f"'{other}'" for node in nodes for other in node.bitmaps) or "none"
        beside = "" if len(names) == 1 else f" or on those below it ({', '.join(names[1:])})"
        raise GraphError(
            f"there is no bitmap '{name}' on it{beside}; there are: {known}", node=names[0], op=self.backend.owner
        )

    async def abort(self) -> None:
        self.end_views()
        if self._reserved:
            self.server.release(self.options.export_name)

    def commit(self) -> None:
        self.server.release(self.options.export_name)
        self.server.add_export(self.export)

    def end_views(self) -> None:
        """The bitmaps are no longer in use by this export, which serves nobody any more."""
        while self._views:
            self._views.pop().end(succeeded=True)


class RemoveExport(Action):
    """Clients no longer find the export.

    Args:
        change: loses the export's root, and gets this action.
        added: how it came to be.
        hard: disconnect its clients; those in the middle of a request get no answer.
    """

    def __init__(self, change: Transaction, added: AddExport, *, hard: bool = False) -> None:
        self._added = added
        self._hard = hard
        self._removed = False
        change.detach(added.backend)
        change.act(self)

    async def prepare(self, change: Transaction) -> None:
        self._added.server.withdraw(self._added.export, hard=self._hard)
        self._removed = True

    async def abort(self) -> None:
        if self._removed:
            self._added.server.add_export(self._added.export)

    def commit(self) -> None:
        self._added.server.disconnect(self._added.export)
        self._added.end_views()
