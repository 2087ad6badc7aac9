# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Everything that can be wrong with the structure of a graph, told at once.

Used on a description before anything is opened, and on the candidate of every change at run time. Nothing here does
I/O.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

import networkx as nx

from blockgraph.errors import CycleError, GraphError, OptionError, RoleError
from blockgraph.graph import permissions
from blockgraph.graph.model import Edge, Model, NodeVertex
from blockgraph.graph.problem import Problem
from blockgraph.perm import Role

#: Names a description may give; generated ones start with '#'.
NODE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,30}")
_GENERATED = re.compile(r"#[A-Za-z][A-Za-z0-9._-]{0,29}")

_MAX_COMPARED = 20_000
_MAX_HOPS = 10

_SINGLE = (Role.FILTERED, Role.COW, Role.PRIMARY)


def validate(model: Model) -> list[Problem]:
    """All problems of the graph; also computes need and share of every edge."""
    problems: list[Problem] = []
    for vertex in model.nodes():
        problems += _name(vertex)
        problems += _roles(model, vertex)
    problems += _dangling(model)
    problems += _cycles(model)
    problems += permissions.compute(model)
    return problems


def is_generated(name: str) -> bool:
    """The name is of the kind that nodes without a name are given."""
    return _GENERATED.fullmatch(name) is not None


def name_problem(name: str) -> str | None:
    """What is wrong with a node name that a description gives; None when it is valid."""
    if NODE_NAME.fullmatch(name):
        return None
    if not name:
        return "a node name can not be empty"
    if name.startswith("#"):
        return f"node name {name!r}: names that start with '#' are for generated names"
    if len(name) > 31:
        shown = name if len(name) <= 40 else f"{name[:39]}…"
        return f"node name {shown!r} has {len(name)} characters, at most 31 are allowed"
    if not re.match(r"[A-Za-z]", name):
        return f"node name {name!r} must start with a letter"
    bad = "".join(sorted({char for char in name if not re.fullmatch(r"[A-Za-z0-9._-]", char)}))
    return f"node name {name!r}: only letters, digits, '-', '.' and '_' are allowed, not {bad!r}"


def _name(vertex: NodeVertex) -> Iterator[Problem]:
    message = None if is_generated(vertex.name) else name_problem(vertex.name)
    if message:
        path = f"{vertex.where}.node-name" if vertex.where else ""
        yield Problem(kind=OptionError, message=message, path=path, node=vertex.name, value=vertex.name)


def _roles(model: Model, vertex: NodeVertex) -> Iterator[Problem]:
    declared = vertex.driver.children
    edges = model.children(vertex.name)
    where = vertex.where or ""

    def problem(message: str, edge: Edge | None = None, hint: str | None = None, closest: str | None = None) -> Problem:
        path = edge.where if edge is not None and edge.where else where
        return Problem(kind=RoleError, message=message, path=path, node=vertex.name, hint=hint, closest=closest)

    for name, edge in edges.items():
        if name not in declared:
            if not declared:
                yield problem(f"driver '{vertex.driver.name}' has no children, but {vertex.label} has '{name}'", edge)
                continue
            closest = difflib.get_close_matches(name, declared, 1)
            yield problem(
                f"driver '{vertex.driver.name}' of {vertex.label} has no child '{name}'",
                edge,
                closest=closest[0] if closest else None,
                hint=None if closest else f"it has: {', '.join(declared)}",
            )
        elif edge.role != declared[name].role:
            yield problem(
                f"child '{name}' of {vertex.label} has role {edge.role.name}, "
                f"its driver declares {declared[name].role.name}",
                edge,
            )
    for name, spec in declared.items():
        if spec.required and name not in edges and not vertex.broken:
            yield problem(f"{vertex.label} (driver '{vertex.driver.name}') needs a child '{name}'")
    for role in _SINGLE:
        several = [edge for edge in edges.values() if edge.role & role]
        if len(several) > 1:
            names = " and ".join(f"'{edge.name}'" for edge in several)
            yield problem(f"{vertex.label} has {len(several)} children of role {role.name}: {names}", several[1])
    for edge in edges.values():
        if edge.role & Role.FILTERED and edge.role & (Role.DATA | Role.METADATA | Role.COW):
            yield problem(f"child '{edge.name}' of {vertex.label}: role FILTERED excludes DATA, METADATA and COW", edge)


def _dangling(model: Model) -> Iterator[Problem]:
    names = [vertex.name for vertex in model.nodes()]
    # Looking for the closest name takes time for each pair: in a large graph only the first get a proposal.
    proposals = _MAX_COMPARED // (len(names) + 1)
    for index, edge in enumerate(model.dangling()):
        closest = difflib.get_close_matches(edge.child[:31], names, 1) if index < proposals else []
        yield Problem(
            kind=GraphError,
            message=f"{model.edge_label(edge)} refers to node '{edge.child}', which does not exist",
            path=edge.where or "",
            node=edge.child,
            value=edge.child,
            closest=closest[0] if closest else None,
        )


def _cycles(model: Model) -> Iterator[Problem]:
    for component in nx.strongly_connected_components(model.graph):
        if len(component) == 1:
            (name,) = component
            if name not in model.graph.succ[name]:
                continue
        start = min(component)
        cycle = nx.find_cycle(model.graph.subgraph(component), source=start)
        edges = [edge for parent, _, key in cycle if (edge := model.edge(parent, key)) is not None]
        hops = [f"{edge.parent}.{edge.name}" for edge in edges]
        if len(hops) > _MAX_HOPS:
            hops[_MAX_HOPS // 2 : -_MAX_HOPS // 2] = [f"({len(hops) - _MAX_HOPS} more)"]
        spelled = " -> ".join([*hops, edges[0].parent])
        yield Problem(
            kind=CycleError,
            message=f"nodes refer to each other in a cycle: {spelled}",
            path=edges[0].where or "",
            related=tuple(edge.where for edge in edges[1:] if edge.where),
            node=edges[0].parent,
        )


def unused(model: Model) -> Iterator[Problem]:
    """Nodes that nothing refers to: a warning, for descriptions. What only they use is not told as well."""
    for vertex in model.nodes():
        if not model.graph.pred[vertex.name]:
            yield Problem(
                severity="warning",
                message=f"{vertex.label} is not used by any export, job or other node",
                path=vertex.where or "",
                node=vertex.name,
            )
