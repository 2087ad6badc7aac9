# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Transaction: a change of the graph that happens at one instant, or not at all.

    edits ──► candidate ──► validate ──► open new nodes ──► drain what changes ──► move edges ──► sizes, image locks
                                                                                      │ a failure undoes the moves
                                                                                      ▼
                                                       requests go on  ◄── permissions take effect

Requests go on until the drain, which holds only the backends above nodes that change. The move of the edges, the
last check and the commit happen with these held, so no request ever sees half a change: a filter inserted above a
node is in the way of every write from the first one on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from blockgraph.backend import Backend
from blockgraph.errors import BlockGraphError, GraphError, NodeInUse
from blockgraph.finish import finish
from blockgraph.graph.action import Action
from blockgraph.graph.description import add_nodes
from blockgraph.graph.model import ROOT_EDGE, Edge, Model, NodeVertex, RootVertex, root_key
from blockgraph.graph.opening import Opening, close_node
from blockgraph.node import Child, Node
from blockgraph.perm import Perm, Role

if TYPE_CHECKING:
    from blockgraph.graph.description import NodeDescription
    from blockgraph.graph.graph import Graph
    from blockgraph.options import NodeOptions

log = logging.getLogger(__name__)

_WRITES = Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE


class Transaction:
    """See the module's text. The methods edit the candidate and check nothing a later edit could put right.

    Args:
        forced: see Graph.transaction.

    Attributes:
        candidate: the graph as it will be.
        unflushed: names of nodes that failed to flush, when forced.
    """

    def __init__(self, graph: Graph, *, forced: bool = False) -> None:
        self.graph = graph
        self._forced = forced
        self._committed = False
        self.candidate = graph.model.copy()
        self._opening = Opening(graph, self.candidate)
        self._owned: set[str] = set()
        self._reopened: dict[str, NodeOptions] = {}
        self._undo: list[Callable[[], None]] = []
        self._actions: list[Action] = []
        self.unflushed: set[str] = set()

    # Edits.

    def add(self, description: Mapping[str, Any], *, owned: bool = True) -> str:
        """Add a node, with those described inside it; returns its name.

        Args:
            owned: it stays until it is removed by name; else it goes when its last parent goes.
        """
        name = self._opening.describe(description)
        if owned:
            self._owned.add(name)
        return name

    def add_nodes(self, nodes: list[NodeDescription]) -> None:
        """Add nodes of a description that has no problems, with all that they refer to."""
        add_nodes(self.candidate, nodes)
        self._owned |= {node.name for node in nodes if not node.inline}

    def remove(self, name: str) -> None:
        """Remove a node; nodes that only it referred to and that nobody named go too."""
        self.candidate.node(name)
        children = self.candidate.children(name)
        self.candidate.remove(name)
        for edge in children.values():
            self._sweep(edge.child)

    def _sweep(self, name: str) -> None:
        known = self.graph.owned | self._owned
        if self.candidate.has(name) and name not in known and not self.candidate.parents(name):
            self.remove(name)

    def set_child(self, parent: str, child: str, target: str) -> None:
        """Point an edge elsewhere, or make one that the driver declares."""
        vertex = self.candidate.node(parent)
        spec = vertex.driver.children.get(child)
        if spec is None:
            raise GraphError(f"driver '{vertex.driver.name}' has no child '{child}'", node=parent)
        old = self.candidate.edge(parent, child)
        self.candidate.set_edge(parent, child, target, spec.role)
        if old is not None:
            self._sweep(old.child)

    def remove_child(self, parent: str, child: str) -> None:
        """Take an optional child away."""
        if self.candidate.edge(parent, child) is None:
            raise GraphError(f"there is no child '{child}'", node=parent)
        target = self.candidate.edge(parent, child)
        assert target is not None
        self.candidate.remove_edge(parent, child)
        self._sweep(target.child)

    def replace(self, old: str, new: str) -> None:
        """Move the parents of `old` to `new`, except those in the subtree of `new` and roots that stay."""
        self.candidate.node(old)
        self.candidate.node(new)
        self.candidate.move_parents(old, new)
        self._sweep(old)

    def insert(self, name: str, *, above: str) -> None:
        """Put the filter `name`, whose filtered child is `above`, over `above`."""
        edge = self._filtered(name)
        if edge.child != above:
            raise GraphError(f"filters '{edge.child}', not '{above}'", node=name, op="insert")
        self.replace(above, name)

    def remove_filter(self, name: str) -> None:
        """Take the filter out: its parents move to its filtered child.

        Raises:
            NodeInUse: a job works with this very node.
        """
        below = self._filtered(name).child
        for edge in self.candidate.parents(name):
            parent = self.candidate.get(edge.parent)
            if isinstance(parent, RootVertex) and parent.stays:
                raise NodeInUse(f"is in use by {parent.owner}", node=name, op="remove")
            self.candidate.set_edge(edge.parent, edge.name, below)
        self.remove(name)

    def _filtered(self, name: str) -> Edge:
        self.candidate.node(name)
        for edge in self.candidate.children(name).values():
            if edge.role & Role.FILTERED:
                return edge
        raise GraphError("is not a filter", node=name)

    def reopen(self, name: str, options: Mapping[str, Any]) -> None:
        """New options for a node that stays open; child members move its edges, those left out keep theirs."""
        vertex = self.candidate.node(name)
        new, children = self._opening.options(name, vertex, options)
        if vertex.node is not None:
            vertex.node.driver.reopen_check(new)
        self.candidate.update(name, options=new, read_only=new.read_only)
        self._reopened[name] = new
        for child, target in children.items():
            if target is not None:
                self.set_child(name, child, target)
            elif self.candidate.edge(name, child) is not None:
                self.remove_child(name, child)

    def snapshot(self, node: str, overlay: str) -> None:
        """Put `overlay` over `node` as its backing child; the parents of `node` move to it."""
        vertex = self.candidate.node(overlay)
        if "backing" not in vertex.driver.children:
            raise GraphError(f"driver '{vertex.driver.name}' can not have a backing node", node=overlay)
        if self.candidate.edge(overlay, "backing") is not None:
            raise GraphError("already has a backing node", node=overlay, hint='describe it with "backing": null')
        if self.candidate.node(node).driver.kind == "filter":
            raise GraphError("is a filter, a snapshot goes over the node below it", node=node, op="snapshot")
        if any(edge.need & Perm.CONSISTENT_READ for edge in self.candidate.parents(overlay)):
            raise GraphError("is already in use", node=overlay, op="snapshot")
        self._opening.no_implied(overlay, "backing")
        self.set_child(overlay, "backing", node)
        self.replace(node, overlay)

    def attach(self, backend: Backend, node: str) -> None:
        """Add a root over `node`."""
        self.candidate.node(node)
        key = self.candidate.add_root(
            backend.name, backend.need, backend.share, stays=backend.stays, owner=backend.owner, backend=backend
        )
        self.candidate.attach_root(key, node)

    def detach(self, backend: Backend) -> None:
        """Remove a root."""
        if self.candidate.root(backend.name).backend is not backend:
            raise GraphError(f"'{backend.name}' is another root")
        key = root_key(backend.name)
        edge = self.candidate.edge(key, ROOT_EDGE)
        assert edge is not None
        self.candidate.remove(key)
        self._sweep(edge.child)

    def act(self, action: Action) -> None:
        """Let something that is no edit of the graph take part; actions are prepared in the order of these calls."""
        self._actions.append(action)

    def node(self, name: str) -> Node:
        """For actions: the running node of that name, as it will be.

        Raises:
            GraphError: there is none.
        """
        node = self.candidate.node(name).node
        assert node is not None
        return node

    # Commit.

    async def commit(self) -> None:
        """See the module's text.

        Cancelled: see Graph.transaction.
        """
        try:
            self._check()
            await finish(self._opening.run())
            self._check()
            affected = self._affected()
            async with self.graph.drained(affected):
                await finish(self._switch(affected))
        except BaseException:
            if not self._committed:
                await finish(self._opening.undo())
            raise

    def over(self) -> None:
        """Nothing more comes."""
        if not self._committed:
            for action in reversed(self._actions):
                action.dropped()

    def _check(self) -> None:
        for edge in self.candidate.dangling():
            if self.graph.model.has(edge.child):
                raise NodeInUse(f"is in use by {self.candidate.edge_label(edge)}", node=edge.child, op="remove")
        for problem in self.candidate.validate():
            if problem.severity == "error":
                raise problem.to_error()

    def _affected(self) -> set[str]:
        """Running nodes whose edges move, or that are removed or reopened."""
        old, new = _edges(self.graph.model), _edges(self.candidate)
        names = set(self._reopened)
        for action in self._actions:
            names.update(action.nodes())
        for key in old.keys() | new.keys():
            if old.get(key) != new.get(key):
                names |= {key[0], *(edges[key].name for edges in (old, new) if key in edges)}
        return {name for name in names if isinstance(self.graph.model.get(name), NodeVertex)}

    async def _switch(self, affected: set[str]) -> None:
        """With what changes held still: move edges, check, take permissions, commit."""
        changed = self._changed_perms()
        await self._flush(affected, changed)
        await self._save_bitmaps()
        prepared: list[Node] = []
        acting: list[Action] = []
        touched: list[str] = []
        try:
            self._move_edges(touched)
            for node in self._in_order(touched):
                await node.driver.attached()
            await self._opening.load_bitmaps()
            for node, need, share in changed:
                prepared.append(node)
                await node.driver.prepare_perm(need, share)
            for action in self._actions:
                acting.append(action)
                await action.prepare(self)
        except BaseException:
            for action in reversed(acting):
                await action.abort()
            for node in prepared:
                node.driver.abort_perm()
            for undo in reversed(self._undo):
                undo()
            await self._attach_again(touched)
            raise
        self._committed = True
        removed = self._take_over()
        # Before permissions are given up: what a node writes when it closes goes through its children.
        for node in removed:
            await close_node(node)
        for node, _, _ in changed:
            node.driver.commit_perm()
        for name in self._opening.opened:
            self.graph.node(name).driver.committed()
        for action in self._actions:
            action.commit()

    async def _flush(self, affected: set[str], changed: list[tuple[Node, Perm, Perm]]) -> None:
        """Whoever moves away from a node, or loses the right to write it, leaves nothing behind."""
        nodes = {self.graph.node(name) for name in affected}
        nodes |= {node for node, need, _ in changed if not need & _WRITES}
        for node in self.graph.nodes():
            if node not in nodes or not node.write_gen:
                continue
            try:
                await node.flush()
            except BlockGraphError as error:
                if not self._forced:
                    raise
                self.unflushed.add(node.name)
                if self.candidate.has(node.name):  # else it is told when the node is closed
                    log.error("node '%s' could not be flushed: %s", node.name, error)

    async def _save_bitmaps(self) -> None:
        """A node that becomes read-only leaves its bitmaps right behind."""
        for name, options in self._reopened.items():
            node = self.graph.node(name)
            if node.bitmap_store is not None and options.read_only and not node.read_only:
                await node.bitmap_store.save()

    async def _attach_again(self, touched: list[str]) -> None:
        """The edges are as they were: so are the facts that nodes took from their children."""
        for node in self._in_order(touched):
            if node.name in self._opening.opened:
                continue
            try:
                await node.driver.attached()
            except BlockGraphError as error:
                log.error("node '%s' after a change that failed: %s", node.name, error)

    def _take_over(self) -> list[Node]:
        """The candidate is the graph from now on. Returns the nodes that are no longer in it, parents first."""
        graph, old = self.graph, self.graph.model
        for name, options in self._reopened.items():
            node = graph.node(name)
            node.options = options
            node.read_only = options.read_only
            node.driver.reopened(options)
        for edge in self.candidate.edges():
            child = self._holder(edge.parent).children[edge.name]
            child.need, child.share = edge.need, edge.share
        kept = {id(vertex.node) for vertex in self.candidate.nodes()}
        before = [vertex.node for name in old.topological() if isinstance(vertex := old.get(name), NodeVertex)]
        roots = {id(root.backend) for root in self.candidate.roots()}
        for root in old.roots():
            if root.backend is not None and id(root.backend) not in roots:
                root.backend.end()
        self._tell_moved(_edges(old), _edges(self.candidate))
        graph.model = self.candidate
        graph.owned = {name for name in graph.owned | self._owned if self.candidate.has(name)}
        for drain in graph.drains:
            drain.extend()
        return [node for node in before if node is not None and id(node) not in kept]

    def _tell_moved(self, old: dict[tuple[str, str], _Target], new: dict[tuple[str, str], _Target]) -> None:
        """A parent that has moved flushes through other nodes now: these must not think they have nothing to do."""
        above: set[str] = set()
        for key, target in old.items():
            if key in new and new[key] != target and self.candidate.has(target.name):
                above |= self.candidate.ancestors(target.name)
        for vertex in self.candidate.nodes():
            if vertex.name in above and vertex.node is not None:
                vertex.node.not_flushed()

    def _changed_perms(self) -> list[tuple[Node, Perm, Perm]]:
        """Nodes whose parents' permissions together differ from what the node holds."""
        changed = []
        for vertex in self.candidate.nodes():
            assert vertex.node is not None
            need, share = self.candidate.cumulative(vertex.name)
            if (need, share) != self._opening.held(vertex.name):
                changed.append((vertex.node, need, share))
        return changed

    def _move_edges(self, touched: list[str]) -> None:
        """Point every edge where the candidate says; `touched` gets the nodes with an edge moved, new ones first."""
        old, new = _edges(self.graph.model), _edges(self.candidate)
        touched += self._opening.opened
        for (parent, name), target in new.items():
            if old.get((parent, name)) == target:
                continue
            touched.append(parent)
            holder, node = self._holder(parent), target.node
            assert node is not None
            child = holder.children.get(name)
            if child is None:
                edge = self.candidate.edge(parent, name)
                assert edge is not None
                self._put(holder, name, Child(parent, name, edge.role, node))
            elif child.node is not node:
                self._undo.append(partial(setattr, child, "node", child.node))
                child.node = node
        for parent, name in old.keys() - new.keys():
            if self.candidate.has(parent):
                touched.append(parent)
                self._put(self._holder(parent), name, None)

    def _put(self, holder: Node | Backend, name: str, child: Child | None) -> None:
        self._undo.append(partial(holder.set_child, name, holder.children.get(name)))
        holder.set_child(name, child)

    def _holder(self, parent: str) -> Node | Backend:
        vertex = self.candidate.get(parent)
        if isinstance(vertex, RootVertex):
            assert vertex.backend is not None
            return vertex.backend
        return self.node(parent)

    def _in_order(self, names: list[str]) -> list[Node]:
        """Children before parents, with every node above a touched one: it may take facts from its children."""
        wanted = set(names)
        for name in set(names):
            wanted |= self.candidate.ancestors(name)
        order = [name for name in reversed(self.candidate.topological()) if name in wanted]
        return [self.node(name) for name in order if isinstance(self.candidate.get(name), NodeVertex)]


class _Target(NamedTuple):
    """What an edge points to. A node of the same name need not be the same node."""

    name: str
    node: Node | None


def _edges(model: Model) -> dict[tuple[str, str], _Target]:
    return {(edge.parent, edge.name): _Target(edge.child, model.node(edge.child).node) for edge in model.edges()}
