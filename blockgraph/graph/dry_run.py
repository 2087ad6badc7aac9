# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Opening the images of a description read-only, to see whether they are there, readable and of fitting sizes.

Nothing is written, no lock is taken (an image in use can be looked at), every node is tried: a node whose child could
not be opened is passed over, since its child's problem is the cause.
"""

from __future__ import annotations

import itertools

import msgspec

from blockgraph.errors import BlockGraphError
from blockgraph.graph.description import Description, add_nodes
from blockgraph.graph.load import flatten_node
from blockgraph.graph.model import Model, NodeVertex
from blockgraph.graph.policy import OpenPolicy
from blockgraph.graph.problem import Problem
from blockgraph.node import Child, Node
from blockgraph.options import NodeOptions


async def dry_run(description: Description, policy: OpenPolicy | None = None) -> list[Problem]:
    """The problems of opening everything described, which has no problems by itself."""
    run = _DryRun(description.model(), policy or OpenPolicy())
    try:
        for name in run.model.ordered(children_first=True):
            await run.open(name)
    finally:
        await run.close()
    return run.problems


class _DryRun:
    def __init__(self, model: Model, policy: OpenPolicy) -> None:
        self.model = model
        self.problems: list[Problem] = []
        self._policy = policy
        self._nodes: dict[str, Node] = {}
        self._opened: list[Node] = []
        self._chain: dict[str, frozenset[str]] = {}
        self._names = (f"#implied{number}" for number in itertools.count())

    async def open(self, name: str) -> None:
        """Open one node over those that could be opened."""
        vertex = self.model.get(name)
        edges = self.model.children(name)
        if not isinstance(vertex, NodeVertex) or any(edge.child not in self._nodes for edge in edges.values()):
            return
        node = Node(name, vertex.driver, _read_only(vertex.options))
        for key, edge in edges.items():
            node.set_child(key, Child(name, key, edge.role, self._nodes[edge.child]))
        self._opened.append(node)
        try:
            await node.driver.open()
            await self._implied(node, vertex)
            await node.driver.attached()
        except BlockGraphError as error:
            self._tell(error, vertex)
        else:
            self._nodes[name] = node

    async def _implied(self, node: Node, vertex: NodeVertex) -> None:
        for key, wish in node.driver.implied().items():
            chain = self._chain.get(node.name, frozenset())
            allowed = self._policy.describe(node.name, node.driver.filename(), key, wish, chain)
            flat = flatten_node(allowed.description, lambda: next(self._names))
            for inner in flat:
                inner.where = vertex.where or ""
            add_nodes(self.model, flat)
            self._chain[flat[0].name] = chain | {allowed.real_path}
            for inner in reversed(flat):
                await self.open(inner.name)
            below = self._nodes.get(flat[0].name)
            if below is not None:
                node.set_child(key, Child(node.name, key, vertex.driver.children[key].role, below))

    def _tell(self, error: BlockGraphError, vertex: NodeVertex) -> None:
        self.problems.append(Problem(kind=type(error), message=str(error), path=vertex.where or "", node=vertex.name))

    async def close(self) -> None:
        for node in reversed(self._opened):
            await node.driver.close()


def _read_only(options: NodeOptions) -> NodeOptions:
    return msgspec.structs.replace(options, read_only=True, force_share=True)
