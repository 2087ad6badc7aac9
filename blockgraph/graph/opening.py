# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Opening: the nodes that a transaction adds, from description to running node.

Nodes open children first. Each takes its permissions (image locks) right after it has opened, so that a format above
reads its header under the lock. A child that an image names itself goes through the graph's open policy and is then
opened like any other. Until the transaction commits, nothing that runs refers to these nodes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from blockgraph.bitmaps.attach import find_sidecar
from blockgraph.bitmaps.store import LiveStore
from blockgraph.errors import BlockGraphError, GraphError
from blockgraph.graph.description import add_nodes
from blockgraph.graph.load import convert_options, flatten_node
from blockgraph.graph.model import Model, NodeVertex
from blockgraph.node import Child, Node
from blockgraph.perm import Perm

if TYPE_CHECKING:
    from blockgraph.graph.graph import Graph
    from blockgraph.options import NodeOptions

log = logging.getLogger(__name__)


class Opening:
    """See the module's text.

    Attributes:
        opened: names of the nodes opened so far, in order.
    """

    def __init__(self, graph: Graph, candidate: Model) -> None:
        self._graph = graph
        self._candidate = candidate
        self.opened: list[str] = []
        self._held: dict[str, tuple[Perm, Perm]] = {}
        self._attached: set[str] = set()
        self._chain: dict[str, frozenset[str]] = {}
        self._no_implied: set[tuple[str, str]] = set()

    def describe(self, description: Mapping[str, Any]) -> str:
        """Add the described node, and those inside it, to the candidate; returns its name."""
        candidate = self._candidate
        flat = flatten_node(description, lambda: self._graph.new_name(candidate))
        add_nodes(candidate, flat)
        return flat[0].name

    def options(
        self, name: str, vertex: NodeVertex, options: Mapping[str, Any]
    ) -> tuple[NodeOptions, dict[str, str | None]]:
        """New options for a node, and what they say of its children (a name, or None for null)."""
        full = {"driver": vertex.driver.name, "node-name": name, **options}
        for child, edge in self._candidate.children(name).items():
            full.setdefault(child, edge.child)
        return convert_options(vertex.driver, full)

    def no_implied(self, node: str, child: str) -> None:
        """The transaction gives this child itself, whatever the image says."""
        self._no_implied.add((node, child))

    def held(self, name: str) -> tuple[Perm, Perm]:
        """Permissions the node's driver has been given so far."""
        return self._held.get(name) or self._graph.model.cumulative(name)

    async def run(self) -> None:
        """Open everything in the candidate that is not running.

        Raises: what a driver's open raised, or the policy; call `undo`.
        """
        while waiting := self._waiting():
            for name in waiting:
                await self._open(name)
            # Implied children have been added: their permissions are not known yet.
            for problem in self._candidate.validate():
                if problem.severity == "error":
                    raise problem.to_error()

    def _waiting(self) -> list[str]:
        names = []
        for name in reversed(self._candidate.topological()):
            vertex = self._candidate.get(name)
            if isinstance(vertex, NodeVertex) and vertex.node is None:
                names.append(name)
        return names

    async def _open(self, name: str) -> None:
        vertex = self._candidate.node(name)
        node = Node(name, vertex.driver, vertex.options)
        node.find_bitmap = self._graph.find_bitmap
        node.shown_by = partial(self._graph.shown_by, name)
        for key, edge in self._candidate.children(name).items():
            below = self._candidate.node(edge.child).node
            assert below is not None
            child = Child(name, key, edge.role, below)
            child.need, child.share = edge.need, edge.share
            node.set_child(key, child)
            if below.name in self.opened and below.name not in self._attached and vertex.driver.kind == "format":
                self._attached.add(below.name)
                await below.driver.attached()
        self._candidate.update(name, node=node)
        self.opened.append(name)
        try:
            await node.driver.open()
        except BlockGraphError as error:
            if error.node is None:
                error.node = name
            if error.node == name:
                error.file = node.driver.filename()
            raise
        self._held[name] = self._candidate.cumulative(name)
        await node.driver.prepare_perm(*self._held[name])
        node.driver.commit_perm()
        self._add_implied(node)

    async def load_bitmaps(self) -> None:
        """Take over what the stores of the new nodes keep; all of them are attached.

        Raises: what a store's `load` raised; call `undo`.
        """
        for name in self.opened:
            node = self._candidate.node(name).node
            assert node is not None
            if await find_sidecar(node):
                continue
            if node.bitmap_store is not None:
                node.bitmaps = {bitmap.name: bitmap for bitmap in await node.bitmap_store.load()}

    def _add_implied(self, node: Node) -> None:
        for key, wish in node.driver.implied().items():
            if (node.name, key) in self._no_implied or self._candidate.edge(node.name, key) is not None:
                continue
            image = node.driver.filename()
            chain = self._chain.get(node.name) or frozenset({os.path.realpath(image)} if image else ())
            allowed = self._graph.policy.describe(node.name, image, key, wish, chain)
            below = self.describe(allowed.description)
            self._chain[below] = chain | {allowed.real_path}
            self._candidate.set_edge(node.name, key, below, node.driver.children[key].role)

    async def undo(self) -> None:
        """Close what was opened, parents first; nothing of it was ever used."""
        for name in reversed(self.opened):
            node = self._candidate.node(name).node
            assert node is not None
            await _close(node)


async def close_node(node: Node) -> BlockGraphError | None:
    """Write back and close; what fails is logged and returned, the node is closed all the same."""
    failure: BlockGraphError | None = None
    try:
        await node.flush()
        if node.bitmap_store is not None and not node.read_only:
            await node.bitmap_store.save()
    except BlockGraphError as error:
        log.error("closing node '%s': %s", node.name, error)
        failure = error
    return await _close(node, failure)


async def close_nodes(nodes: Iterable[Node]) -> BlockGraphError | None:
    """Write back and close all, whatever fails; returns the first failure."""
    failures = [await close_node(node) for node in nodes]
    return next((failure for failure in failures if failure is not None), None)


async def _close(node: Node, told: BlockGraphError | None = None) -> BlockGraphError | None:
    """Close; returns the first failure. What was `told` already fails here again and is not logged twice."""
    if isinstance(node.bitmap_store, LiveStore):
        await node.bitmap_store.close()
    try:
        await node.driver.close()
    except BlockGraphError as error:
        if str(error) != str(told):
            log.error("closing node '%s': %s", node.name, error)
        return told or error
    except Exception as error:  # a bug in one driver must not leave the others open
        log.exception("closing node '%s'", node.name)
        return told or GraphError(f"unexpected {type(error).__name__}: {error}", node=node.name, op="close")
    return told
