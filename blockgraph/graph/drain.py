# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Drain: nodes held still.

```
    roots above     gate closed, in flight: none, extent map: empty
      nodes above   no work in the background (a copy that outlived its request)
        nodes       idle, extent maps that lead through them: empty
```

Once a node and everything above it are idle and the gates are closed, nothing can start a request on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from blockgraph.graph.model import root_key

if TYPE_CHECKING:
    from blockgraph.backend import Backend
    from blockgraph.graph.graph import Graph
    from blockgraph.node import Node


class Drain:
    """Closes the gates when made; then `wait`, and `end` to open them.

    Args:
        names: nodes to hold still; None: all.
    """

    def __init__(self, graph: Graph, names: Iterable[str] | None) -> None:
        self._graph = graph
        self._names = None if names is None else frozenset(names)
        self._gates: list[Backend] = []
        self.extend()

    def extend(self) -> None:
        """Close the gates of roots that have come to lie above the nodes."""
        for root in self._graph.model.roots():
            backend = root.backend
            if backend is not None and backend not in self._gates and self._above(backend):
                backend.close_gate()
                self._gates.append(backend)

    def _above(self, backend: Backend) -> bool:
        model = self._graph.model
        return self._names is None or not self._names.isdisjoint(model.descendants(root_key(backend.name)))

    def _nodes(self) -> list[Node]:
        """The nodes and those above them, parents first."""
        model = self._graph.model
        if self._names is None:
            return self._graph.nodes()
        held = {name for name in self._names if model.has(name)}
        for name in tuple(held):
            held |= model.ancestors(name)
        return [node for node in self._graph.nodes() if node.name in held]

    async def wait(self) -> None:
        """Until everything is idle."""
        while True:
            for backend in list(self._gates):
                await backend.wait_idle()
                if backend.map is not None:
                    await backend.map.clear()
            for node in self._nodes():
                await node.wait_idle()
                for extents in list(node.maps):  # those that belong to nodes
                    await extents.clear()
            # Background work may have moved on to a node that was idle when we looked.
            if not any(gate.busy for gate in self._gates) and not any(node.busy for node in self._nodes()):
                return

    def end(self) -> None:
        """Open the gates."""
        for backend in self._gates:
            backend.open_gate()
