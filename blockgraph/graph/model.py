# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Model: the graph as data, a networkx MultiDiGraph and the single source of truth.

Vertices are nodes and roots; an edge parent -> child is keyed by the child's name ("file", "backing", ...).

    @guest --root--> top --file----> disk --file--> #block0
                      \\--target--> scratch

The same class holds a description that nothing of has been opened and the graph of a running process. A change is
made on a copy: `candidate = model.copy()`, edits, `problems = candidate.validate()`; edits themselves check nothing
that a later edit of the same change could still put right, so an edge may point to a node that does not exist (yet).

Node names and root names are separate namespaces: a root's vertex is keyed by `root_key(name)`, which no node name
can be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import networkx as nx

from blockgraph.errors import GraphError
from blockgraph.options import NodeOptions
from blockgraph.perm import ALL, NONE, Perm, Role

if TYPE_CHECKING:
    from blockgraph.backend import Backend
    from blockgraph.driver import Driver
    from blockgraph.graph.problem import Problem
    from blockgraph.node import Node

#: Role and name of the edge from a root.
ROOT_ROLE = Role.FILTERED | Role.PRIMARY
ROOT_EDGE = "root"


def root_key(name: str) -> str:
    """Key of the vertex of the root of that name."""
    return f"@{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeVertex:
    """A node.

    Attributes:
        name: its node-name.
        driver, options: as described; child members of the options are left as they were written.
        read_only: writes are refused.
        node: the running node; None in a description.
        where: path in the description ("nodes[2].file"), None when it was made at run time.
        broken: the description of its options could not be used; what follows from them is not known.
    """

    name: str
    driver: type[Driver]
    options: NodeOptions
    read_only: bool = False
    node: Node | None = None
    where: str | None = None
    broken: bool = False
    kind: Literal["node"] = "node"

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"node '{self.name}'"


@dataclass(frozen=True, slots=True, kw_only=True)
class RootVertex:
    """What an export, a job or an emulator holds.

    Attributes:
        name: unique among roots.
        need, share: permissions of its edge.
        stays: its edge does not move when a filter is inserted above its node (jobs).
        owner: who holds it, for messages: "export 'guest'".
        backend: the running root; None in a description.
        where: path in the description ("exports[0]").
    """

    name: str
    need: Perm
    share: Perm
    stays: bool = False
    owner: str
    backend: Backend | None = None
    where: str | None = None
    kind: Literal["root"] = "root"

    @property
    def label(self) -> str:
        """How messages call it."""
        return self.owner


Vertex = NodeVertex | RootVertex


class Edge(NamedTuple):
    """An edge.

    Attributes:
        parent: key of the parent's vertex.
        name: child name.
        child: key of the child's vertex; there may be no such node (see Model.dangling).
        role: why.
        need, share: as last computed (Model.validate).
        where: path in the description ("nodes[2].file").
    """

    parent: str
    name: str
    child: str
    role: Role
    need: Perm = NONE
    share: Perm = ALL
    where: str | None = None


class Model:
    """See the module's text.

    Attributes:
        graph: the MultiDiGraph. A vertex has the attribute `vertex` (none: something points to a node that does not
            exist); an edge has role, need, share, where. Read it freely, change it through the methods.
    """

    def __init__(self) -> None:
        self.graph = nx.MultiDiGraph()

    def copy(self) -> Model:
        """An independent model of the same graph (vertices are immutable and shared)."""
        other = Model()
        other.graph = self.graph.copy()
        return other

    # Edits.

    def add_node(
        self,
        name: str,
        driver: type[Driver],
        options: NodeOptions,
        *,
        read_only: bool | None = None,
        node: Node | None = None,
        where: str | None = None,
        broken: bool = False,
    ) -> None:
        """Add a node; `read_only` None takes it from the options.

        Raises:
            GraphError: the name is taken.
        """
        if self.has(name):
            raise GraphError("there already is a node of this name", node=name)
        read_only = options.read_only if read_only is None else read_only
        vertex = NodeVertex(
            name=name, driver=driver, options=options, read_only=read_only, node=node, where=where, broken=broken
        )
        self.graph.add_node(name, vertex=vertex)

    def add_root(
        self,
        name: str,
        need: Perm,
        share: Perm,
        *,
        stays: bool = False,
        owner: str | None = None,
        backend: Backend | None = None,
        where: str | None = None,
    ) -> str:
        """Add a root without an edge; returns its vertex's key, `root_key(name)`. Then `attach_root`.

        Raises:
            GraphError: the name is taken.
        """
        key = root_key(name)
        if self.has(key):
            raise GraphError(f"there already is a root '{name}'")
        vertex = RootVertex(
            name=name, need=need, share=share, stays=stays, owner=owner or name, backend=backend, where=where
        )
        self.graph.add_node(key, vertex=vertex)
        return key

    def attach_root(self, key: str, target: str, *, where: str | None = None) -> None:
        """Point the root's edge to `target`."""
        self.set_edge(key, ROOT_EDGE, target, ROOT_ROLE, where=where)

    def update(self, name: str, **changes: Any) -> None:
        """Change attributes of a vertex (options, read_only, node, need, share, ...)."""
        data = self.graph.nodes[name]
        data["vertex"] = dataclasses.replace(data["vertex"], **changes)

    def remove(self, name: str) -> None:
        """Remove a vertex and its edges to children. Edges to it stay, dangling, until they are set or removed."""
        for edge in self.children(name).values():
            self.remove_edge(edge.parent, edge.name)
        self.graph.nodes[name].pop("vertex")
        self._sweep(name)

    def set_edge(
        self, parent: str, name: str, target: str, role: Role | None = None, *, where: str | None = None
    ) -> None:
        """Point the edge `name` of `parent` to `target`; an edge of that name is replaced.

        Args:
            role: None keeps the role (and place) of the edge that is there.
        """
        assert self.has(parent)
        old = self.edge(parent, name)
        if old is not None:
            self.graph.remove_edge(parent, old.child, key=name)
            if role is None:
                role, where = old.role, old.where
        assert role is not None, "a new edge needs a role"
        self.graph.add_edge(parent, target, key=name, role=role, need=NONE, share=ALL, where=where)
        if old is not None:
            self._sweep(old.child)

    def remove_edge(self, parent: str, name: str) -> None:
        """Remove an edge."""
        edge = self.edge(parent, name)
        assert edge is not None
        self.graph.remove_edge(parent, edge.child, key=name)
        self._sweep(edge.child)

    def move_parents(self, old: str, new: str) -> list[Edge]:
        """Move the edges that lead to `old` over to `new`, as when `new` is inserted above `old`.

        Edges in the subtree of `new` stay (they would close a loop), and so do those of roots and children that stay.

        Returns: the edges as they were.
        """
        below = self.descendants(new) | {new}
        moved = [edge for edge in self.parents(old) if edge.parent not in below and not self._stays(edge)]
        for edge in moved:
            self.set_edge(edge.parent, edge.name, new)
        return moved

    def _stays(self, edge: Edge) -> bool:
        parent = self.get(edge.parent)
        if isinstance(parent, RootVertex):
            return parent.stays
        spec = None if parent is None else parent.driver.children.get(edge.name)
        return spec is not None and spec.stays

    def _sweep(self, name: str) -> None:
        """Forget a vertex that does not exist and that nothing points to any more."""
        if name in self.graph and not self.has(name) and not self.graph.pred[name]:
            self.graph.remove_node(name)

    # Questions.

    def has(self, name: str) -> bool:
        """There is a vertex of this key, not only an edge to it."""
        return name in self.graph and "vertex" in self.graph.nodes[name]

    def get(self, name: str) -> Vertex | None:
        """The vertex, None when there is none."""
        vertex: Vertex | None = self.graph.nodes[name].get("vertex") if name in self.graph else None
        return vertex

    def node(self, name: str) -> NodeVertex:
        """The node's vertex.

        Raises:
            GraphError: there is no such node.
        """
        vertex = self.get(name)
        if not isinstance(vertex, NodeVertex):
            raise GraphError("there is no such node", node=name)
        return vertex

    def root(self, name: str) -> RootVertex:
        """The root's vertex.

        Raises:
            GraphError: there is no such root.
        """
        vertex = self.get(root_key(name))
        if not isinstance(vertex, RootVertex):
            raise GraphError(f"there is no root '{name}'")
        return vertex

    def vertices(self) -> Iterator[tuple[str, Vertex]]:
        """Key and vertex of everything, in the order it was added."""
        for name, vertex in self.graph.nodes(data="vertex"):
            if vertex is not None:
                yield name, vertex

    def nodes(self) -> Iterator[NodeVertex]:
        """The nodes, in the order they were added."""
        for _, vertex in self.vertices():
            if isinstance(vertex, NodeVertex):
                yield vertex

    def roots(self) -> Iterator[RootVertex]:
        """The roots, in the order they were added."""
        for _, vertex in self.vertices():
            if isinstance(vertex, RootVertex):
                yield vertex

    def edge(self, parent: str, name: str) -> Edge | None:
        """The edge of that name, None when there is none."""
        for child, keyed in self.graph.succ[parent].items():
            if name in keyed:
                return Edge(parent, name, child, **keyed[name])
        return None

    def edges(self) -> Iterator[Edge]:
        """All edges."""
        for parent, child, name, data in self.graph.edges(keys=True, data=True):
            yield Edge(parent, name, child, **data)

    def children(self, name: str) -> dict[str, Edge]:
        """Edges to children by child name, in the order in which the driver declares them."""
        found = {
            key: Edge(name, key, child, **data)
            for child, keyed in self.graph.succ[name].items()
            for key, data in keyed.items()
        }
        if len(found) < 2:
            return found
        vertex = self.get(name)
        declared = list(vertex.driver.children) if isinstance(vertex, NodeVertex) else []
        order = {key: index for index, key in enumerate(declared)}
        return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))

    def parents(self, name: str) -> list[Edge]:
        """Edges from parents, roots too, in the order they were made."""
        return [
            Edge(parent, key, name, **data)
            for parent, keyed in self.graph.pred[name].items()
            for key, data in keyed.items()
        ]

    def descendants(self, name: str) -> set[str]:
        """Everything below a vertex, without itself."""
        return set(nx.descendants(self.graph, name))

    def ancestors(self, name: str) -> set[str]:
        """Everything above a vertex, roots too, without itself."""
        return set(nx.ancestors(self.graph, name))

    def roots_above(self, name: str) -> list[RootVertex]:
        """The roots whose requests can reach the node."""
        above = self.ancestors(name)
        return [root for root in self.roots() if root_key(root.name) in above]

    def dangling(self) -> Iterator[Edge]:
        """Edges to nodes that do not exist."""
        for name, vertex in self.graph.nodes(data="vertex"):
            if vertex is None:
                yield from self.parents(name)

    def topological(self) -> list[str]:
        """Keys of all vertices, parents before children.

        Raises:
            networkx.NetworkXUnfeasible: there is a cycle.
        """
        return list(nx.topological_sort(self.graph))

    def ordered(self, *, children_first: bool = False) -> list[str]:
        """Keys in topological order, without what is in a cycle or comes after one (networkx refuses such a graph)."""
        before = self.graph.succ if children_first else self.graph.pred
        after = self.graph.pred if children_first else self.graph.succ
        waiting = {name: len(before[name]) for name in self.graph}
        ready = [name for name, count in waiting.items() if not count]
        for name in ready:  # grows
            for other in after[name]:
                waiting[other] -= 1
                if not waiting[other]:
                    ready.append(other)
        return ready

    def edge_label(self, edge: Edge) -> str:
        """How messages call an edge: "top.target", or the root's owner."""
        vertex = self.get(edge.parent)
        return vertex.owner if isinstance(vertex, RootVertex) else f"{edge.parent}.{edge.name}"

    # Checks.

    def cumulative(self, name: str) -> tuple[Perm, Perm]:
        """What all parents of a node together need and share, as last computed."""
        need, share = NONE, ALL
        for keyed in self.graph.pred[name].values():
            for data in keyed.values():
                need |= data["need"]
                share &= data["share"]
        return need, share

    def validate(self) -> list[Problem]:
        """Everything that is wrong with the graph; also computes need and share of every edge."""
        from blockgraph.graph.validate import validate

        return validate(self)
