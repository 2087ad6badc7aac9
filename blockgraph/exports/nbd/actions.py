# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Exports that come and go in a transaction of the graph, at the same instant as everything else in it.

```
async with graph.transaction() as change:
    change.attach(backend, "then")
    change.act(AddExport(server, backend, "then", writable=False))
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockgraph.exports.nbd.export import NbdExport
from blockgraph.graph.action import Action

if TYPE_CHECKING:
    from blockgraph.backend import Backend
    from blockgraph.exports.nbd.server import NbdServer
    from blockgraph.graph.transaction import Transaction


class AddExport(Action):
    """Clients may ask for the export once the transaction has committed. Arguments: see NbdExport.

    Attributes:
        export: once it has.
    """

    export: NbdExport

    def __init__(
        self, server: NbdServer, backend: Backend, name: str, *, description: str = "", writable: bool
    ) -> None:
        self._server = server
        self._backend = backend
        self._name = name
        self._description = description
        self._writable = writable
        self._reserved = False

    async def prepare(self, change: Transaction) -> None:
        self.export = NbdExport(self._name, self._backend, description=self._description, writable=self._writable)
        self._server.reserve(self._name)
        self._reserved = True

    async def abort(self) -> None:
        if self._reserved:
            self._server.release(self._name)

    def commit(self) -> None:
        self._server.release(self._name)
        self._server.add_export(self.export)


class RemoveExport(Action):
    """The export is gone; it has no clients. Whoever owns its backend detaches that in the same transaction."""

    def __init__(self, server: NbdServer, name: str) -> None:
        self._server = server
        self._name = name
        self._taken: NbdExport | None = None

    async def prepare(self, change: Transaction) -> None:
        self._taken = self._server.take_out(self._name)

    async def abort(self) -> None:
        if self._taken is not None:
            self._server.add_export(self._taken)
