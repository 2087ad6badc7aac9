# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What a running graph looks like from outside, and a filter that fails where a test says."""

from __future__ import annotations

from typing import Any, ClassVar

from blockgraph.api import AsyncGraph
from blockgraph.driver import Filter
from blockgraph.errors import GraphError, IOFailure
from blockgraph.perm import Perm
from blockgraph.registry import register


class Stubborn(Filter):
    """Refuses at one stage of a transaction.

    Attributes:
        fail_at: "open", "attached", "prepare_perm" or "".
        log: what has been called, for every node of this driver.
    """

    name: ClassVar[str] = "stubborn"
    fail_at: ClassVar[str] = ""
    log: ClassVar[list[str]] = []

    def _stage(self, name: str) -> None:
        self.log.append(name)
        if self.fail_at == name:
            raise GraphError(f"refused at {name}", node=self.node.name)

    async def open(self) -> None:
        self._stage("open")

    async def close(self) -> None:
        self.log.append("close")

    async def attached(self) -> None:
        self._stage("attached")
        await super().attached()

    async def prepare_perm(self, need: Perm, share: Perm) -> None:
        self._stage("prepare_perm")

    def abort_perm(self) -> None:
        self.log.append("abort_perm")

    def commit_perm(self) -> None:
        self.log.append("commit_perm")

    async def flush(self) -> None:
        if self.fail_at == "flush":
            raise IOFailure("refused at flush", node=self.node.name, op="flush")
        await super().flush()


register(Stubborn)


def state(graph: AsyncGraph) -> dict[str, Any]:
    """Nodes, edges, permissions: in the model, and in the running nodes, which must agree."""
    edges = {}
    for edge in graph.model.edges():
        vertex = graph.model.get(edge.parent)
        assert vertex is not None
        holder: Any = vertex.node if vertex.kind == "node" else vertex.backend
        child = holder.children[edge.name]
        assert child.node is graph.node(edge.child)
        assert (child.need, child.share) == (edge.need, edge.share)
        if vertex.kind == "node":
            assert getattr(holder.driver, edge.name.replace("-", "_")) is child
        edges[edge.parent, edge.name] = (edge.child, id(child.node), edge.need, edge.share)
    for node in graph.nodes():
        assert {(node.name, name) for name in node.children} == {key for key in edges if key[0] == node.name}
    return {
        "nodes": {node.name: (id(node), node.read_only, node.options) for node in graph.nodes()},
        "roots": sorted(backend.name for backend in graph.backends()),
        "edges": edges,
        "owned": set(graph.owned),
    }
