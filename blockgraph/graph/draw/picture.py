# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Picture: what every drawing of a graph shows, taken from a Model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from blockgraph.graph import sizes
from blockgraph.graph.model import ROOT_EDGE, Edge, Model, NodeVertex, RootVertex
from blockgraph.perm import Perm, Role

Kind = Literal["root", "filter", "format", "protocol", "unknown", "missing"]

_LETTERS = ((Perm.CONSISTENT_READ, "r"), (Perm.WRITE, "w"), (Perm.WRITE_UNCHANGED, "u"), (Perm.RESIZE, "s"))
#: What the letters of `letters` mean.
LEGEND = "r consistent-read, w write, u write-unchanged, s resize"


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A vertex.

    Attributes:
        key: unique in the picture.
        title: the node's name, or who holds the root.
        kind: of its driver; "missing" when only an edge to it exists.
        driver: its driver's name, "" for a root.
        size: bytes, None when not known.
        file: the file behind it, None when there is none or it is not known.
        read_only: of a node: writes are refused; of a root: it does not need to write.
    """

    key: str
    title: str
    kind: Kind
    driver: str = ""
    size: int | None = None
    file: str | None = None
    read_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """An edge.

    Attributes:
        parent, child: keys of boxes.
        name: the child's name; "" for the edge of a root.
        role, need, share: see blockgraph.perm.
    """

    parent: str
    child: str
    name: str
    role: Role
    need: Perm
    share: Perm

    @property
    def style(self) -> Literal["filtered", "cow", "storage"]:
        """How it is drawn."""
        if self.role & Role.COW:
            return "cow"
        return "filtered" if self.role & Role.FILTERED else "storage"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """Boxes and lines, in the order of the graph.

    Attributes:
        lines: by parent, in the order in which its driver declares the children.
    """

    boxes: dict[str, Box]
    lines: dict[str, list[Line]] = field(default_factory=dict)

    def tops(self) -> list[str]:
        """Boxes that nothing leads to: roots first, then nodes."""
        below = {line.child for lines in self.lines.values() for line in lines}
        tops = [key for key in self.boxes if key not in below]
        return sorted(tops, key=lambda key: self.boxes[key].kind != "root")


def picture(model: Model) -> Picture:
    """What there is to draw. Permissions are computed first, on a copy, so that they are never stale."""
    model = model.copy()
    model.validate()
    known = sizes.known(model)
    boxes: dict[str, Box] = {}
    for key, vertex in model.vertices():
        boxes[key] = _root(key, vertex) if isinstance(vertex, RootVertex) else _node(vertex, known.get(key))
    for edge in model.dangling():
        boxes[edge.child] = Box(key=edge.child, title=edge.child, kind="missing")
    lines = {key: [_line(edge) for edge in model.children(key).values()] for key, _ in model.vertices()}
    return Picture(boxes=boxes, lines=lines)


def letters(perm: Perm) -> str:
    """Permissions in four columns: "rw--"."""
    return "".join(letter if perm & value else "-" for value, letter in _LETTERS)


def role_words(role: Role) -> str:
    """Roles as people read them: "data, metadata"."""
    return ", ".join(value.name.lower() for value in Role if value & role and value.name)


def _root(key: str, root: RootVertex) -> Box:
    return Box(key=key, title=root.owner, kind="root", read_only=not root.need & Perm.WRITE)


def _node(vertex: NodeVertex, size: int | None) -> Box:
    driver = vertex.driver
    file = next((name for path in driver.paths if isinstance(name := getattr(vertex.options, path, None), str)), None)
    if vertex.node is not None:
        size = vertex.node.size()
    kind: Kind = driver.kind if driver.kind in ("filter", "format", "protocol") else "unknown"
    return Box(
        key=vertex.name,
        title=vertex.name,
        kind=kind,
        driver=driver.name,
        size=size,
        file=file,
        read_only=vertex.read_only,
    )


def _line(edge: Edge) -> Line:
    name = "" if edge.name == ROOT_EDGE and edge.parent.startswith("@") else edge.name
    return Line(parent=edge.parent, child=edge.child, name=name, role=edge.role, need=edge.need, share=edge.share)
