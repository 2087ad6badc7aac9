# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Action: a part of a transaction that is no edit of the graph: bitmaps, exports, jobs.

candidate is valid, its nodes are open, what changes is drained
    │
    ├── edges move, permissions are taken
    ├── prepare, in the order of the transaction ──► a failure: abort, in reverse, of those prepared
    ▼
commit, in order: must not fail
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockgraph.graph.transaction import Transaction


class Action:
    """See the module's text. `Transaction.act` takes it."""

    def nodes(self) -> Iterable[str]:
        """Names of nodes that are drained while the transaction commits."""
        return ()

    async def prepare(self, change: Transaction) -> None:
        """Do all that may fail, so that `abort` can undo it. Nodes are found by `change.node`.

        Raises:
            BlockGraphError: the transaction fails; `abort` of this action is called too and must cope.
        """

    async def abort(self) -> None:
        """Undo `prepare`, which may have failed half-way. Must not fail."""

    def commit(self) -> None:
        """It counts. Must not fail."""

    def dropped(self) -> None:
        """The transaction has not happened, whether it came to `prepare` or not; called last. Must not fail."""


class Then(Action):
    """What follows once the transaction has committed, whoever still waits for that: `then` must not fail."""

    def __init__(self, then: Callable[[], object]) -> None:
        self._then = then

    def commit(self) -> None:
        self._then()


class Abort(Action):
    """Fails: a transaction with it changes nothing, whatever else is in it."""

    async def prepare(self, change: Transaction) -> None:
        from blockgraph.errors import GraphError

        raise GraphError("the transaction was asked to abort", op="abort")
