# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Permissions of a whole graph, computed from the roots downwards.

    node's need   = OR  of what the edges to it need
    node's share  = AND of what the edges to it share
    child's edge  = driver.child_perm(options, child name, need, share)

Two edges to one node conflict when one needs what the other does not share. A node that is read-only refuses every
edge that needs to write. A node with auto-read-only counts as read-only while nothing above it needs to write: a
format then takes no write permission on the files below it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product

from blockgraph.errors import GraphError, PermissionConflict
from blockgraph.graph.model import Edge, Model, NodeVertex, RootVertex
from blockgraph.graph.problem import Problem
from blockgraph.perm import ALL, NONE, Perm

#: What a read-only node refuses.
WRITES = Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE

#: Conflicts told per node; a base below thousands of writers is one mistake, not millions.
_MAX_PAIRS = 16


def compute(model: Model) -> list[Problem]:
    """Set need and share of every edge; tell the conflicts.

    Vertices in or below a cycle, and edges to nodes that do not exist, are left alone: validate tells those.
    Child edges that the driver does not declare, and those of broken nodes, get no permissions.
    """
    problems: list[Problem] = []
    for name in model.ordered():
        vertex = model.get(name)
        if isinstance(vertex, RootVertex):
            for edge in model.children(name).values():
                _store(model, edge, vertex.need, vertex.share)
        elif vertex is not None:
            problems += _conflicts(model, vertex)
            need, share, refused = _cumulative(model, vertex)
            problems += refused
            _children(model, vertex, need, share)
    return problems


def _cumulative(model: Model, vertex: NodeVertex) -> tuple[Perm, Perm, list[Problem]]:
    need, share = model.cumulative(vertex.name)
    if not (vertex.read_only and need & WRITES):
        return need, share, []
    problems = [
        Problem(
            kind=GraphError,
            message=(
                f"{vertex.label} is read-only, but {model.edge_label(edge)} needs permission "
                f"'{(edge.need & WRITES).words}' on it"
            ),
            path=vertex.where or "",
            related=(edge.where,) if edge.where else (),
            node=vertex.name,
            permission=(edge.need & WRITES).words,
            needs=model.edge_label(edge),
            hint=f"make '{vertex.name}' writable or the parent read-only",
        )
        for edge in islice((e for e in model.parents(vertex.name) if e.need & WRITES), _MAX_PAIRS)
    ]
    # What the node refuses does not travel on: the nodes below are not at fault.
    return need & ~WRITES, share, problems


def _children(model: Model, vertex: NodeVertex, need: Perm, share: Perm) -> None:
    read_only = vertex.read_only or (vertex.options.auto_read_only and not need & WRITES)
    for edge in model.children(vertex.name).values():
        if edge.name in vertex.driver.children and not vertex.broken:
            child_need, child_share = vertex.driver.child_perm(
                vertex.options, edge.name, need, share, read_only=read_only
            )
            _store(model, edge, child_need, child_share)
        else:
            _store(model, edge, NONE, ALL)


def _store(model: Model, edge: Edge, need: Perm, share: Perm) -> None:
    data = model.graph.succ[edge.parent][edge.child][edge.name]
    data["need"] = need
    data["share"] = share


def _conflicts(model: Model, vertex: NodeVertex) -> list[Problem]:
    edges = model.parents(vertex.name)
    if len(edges) < 2:
        return []
    pairs: dict[tuple[int, int], Perm] = {}
    for permission in Perm:
        for pair in islice(_pairs(edges, permission), _MAX_PAIRS):
            # Each pair is told once, also when neither shares what both need.
            if pair[::-1] not in pairs:
                pairs[pair] = pairs.get(pair, NONE) | permission
    return [
        _conflict(model, vertex, edges[needs], edges[blocks], permission)
        for (needs, blocks), permission in islice(pairs.items(), _MAX_PAIRS)
    ]


def _pairs(edges: list[Edge], permission: Perm) -> Iterator[tuple[int, int]]:
    """Indices (needs, blocks) of edges in conflict about one permission."""
    blocks = [index for index, edge in enumerate(edges) if not edge.share & permission]
    if not blocks:
        return
    needs = [index for index, edge in enumerate(edges) if edge.need & permission]
    yield from ((a, b) for a, b in product(needs, blocks) if a != b)


def _conflict(model: Model, vertex: NodeVertex, needs: Edge, blocks: Edge, permission: Perm) -> Problem:
    needing, blocking = model.edge_label(needs), model.edge_label(blocks)
    return Problem(
        kind=PermissionConflict,
        message=(
            f"permission conflict on {vertex.label}: {needing} needs '{permission.words}', "
            f"which {blocking} does not share"
        ),
        path=needs.where or vertex.where or "",
        related=tuple(path for path in (blocks.where, vertex.where) if path),
        node=vertex.name,
        needs=needing,
        blocks=blocking,
        permission=permission.words,
    )
