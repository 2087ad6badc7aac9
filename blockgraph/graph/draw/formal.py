# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A graph for other programs: Graphviz's dot, Mermaid, JSON."""

from __future__ import annotations

import json
from typing import Any

from blockgraph.graph.draw.picture import Box, Line, Picture, letters, role_words
from blockgraph.graph.problem import printable
from blockgraph.text import format_size

_DOT_SHAPES = {
    "root": "shape=cds, style=filled, fillcolor=gray92",
    "filter": 'shape=box, style="rounded,filled", fillcolor=thistle',
    "format": "shape=box, style=filled, fillcolor=lightcyan",
    "protocol": "shape=cylinder, style=filled, fillcolor=honeydew",
    "unknown": "shape=box, color=red",
    "missing": "shape=box, style=dashed, color=red",
}
_DOT_LINES = {"filtered": "style=bold", "storage": "style=solid", "cow": "style=dashed"}
_MERMAID_SHAPES = {
    "root": (">", "]"),
    "filter": ("(", ")"),
    "format": ("[", "]"),
    "protocol": ("[(", ")]"),
    "unknown": ("{{", "}}"),
    "missing": ("{{", "}}"),
}
_MERMAID_LINES = {"filtered": "==>", "storage": "-->", "cow": "-.->"}


def dot(picture: Picture) -> str:
    """Graphviz: `dot -Tpng`."""
    ids = _ids(picture)
    out = [
        "digraph blockgraph {",
        "  rankdir=TB;",
        '  node [fontname="sans-serif"];',
        '  edge [fontname="sans-serif"];',
    ]
    for key, box in picture.boxes.items():
        out.append(f"  {ids[key]} [label={_quoted(box_lines(box))}, {_DOT_SHAPES[box.kind]}];")
    for line in _lines(picture):
        label = _quoted([*([line.name] if line.name else []), permissions(line)])
        out.append(
            f"  {ids[line.parent]} -> {ids[line.child]} "
            f"[label={label}, tooltip={_quoted([tooltip(line)])}, {_DOT_LINES[line.style]}];"
        )
    return "\n".join([*out, "}", ""])


def mermaid(picture: Picture) -> str:
    """Mermaid, as Markdown viewers draw it."""
    ids = _ids(picture)
    out = ["flowchart TD"]
    for key, box in picture.boxes.items():
        begin, end = _MERMAID_SHAPES[box.kind]
        out.append(f'  {ids[key]}{begin}"{"<br>".join(map(_entities, box_lines(box)))}"{end}')
    for line in _lines(picture):
        label = "<br>".join([*([_entities(line.name)] if line.name else []), permissions(line)])
        out.append(f'  {ids[line.parent]} {_MERMAID_LINES[line.style]}|"{label}"| {ids[line.child]}')
    return "\n".join([*out, ""])


def to_json(picture: Picture) -> str:
    """Nodes, roots and edges as data; sizes in bytes."""
    roots = [
        {"name": box.key.removeprefix("@"), "owner": box.title} for box in picture.boxes.values() if box.kind == "root"
    ]
    nodes = [_json_node(box) for box in picture.boxes.values() if box.kind != "root"]
    edges = [
        {
            "parent": line.parent.removeprefix("@"),
            "parent-kind": "root" if picture.boxes[line.parent].kind == "root" else "node",
            "child": line.child,
            "name": line.name or "root",
            "roles": _names(line.role),
            "need": _names(line.need),
            "share": _names(line.share),
        }
        for line in _lines(picture)
    ]
    return json.dumps({"nodes": nodes, "roots": roots, "edges": edges}, indent=2) + "\n"


def _json_node(box: Box) -> dict[str, Any]:
    node: dict[str, Any] = {"node-name": box.title, "driver": box.driver, "kind": box.kind, "read-only": box.read_only}
    if box.size is not None:
        node["size"] = box.size
    if box.file is not None:
        node["filename"] = box.file
    return node


def box_lines(box: Box) -> list[str]:
    """What stands in a box."""
    if box.kind == "root":
        return [printable(box.title)]
    if box.kind == "missing":
        return [printable(box.title), "does not exist"]
    driver = printable(box.driver) + (", read-only" if box.read_only else "")
    if box.size is not None:
        driver += f", {format_size(box.size)}"
    return [printable(box.title), driver, *([printable(box.file)] if box.file else [])]


def permissions(line: Line) -> str:
    """What an edge needs, and what it shares, in letters."""
    return f"{letters(line.need)} / {letters(line.share)}"


def tooltip(line: Line) -> str:
    """An edge in words."""
    return f"{role_words(line.role)}: needs {line.need.words}; shares {line.share.words}"


def _lines(picture: Picture) -> list[Line]:
    return [line for lines in picture.lines.values() for line in lines]


def _ids(picture: Picture) -> dict[str, str]:
    return {key: f"n{index}" for index, key in enumerate(picture.boxes)}


def _names(flags: Any) -> list[str]:
    return [flag.name.lower().replace("_", "-") for flag in type(flags) if flag & flags and flag.name]


def _quoted(lines: list[str]) -> str:
    escaped = [line.replace("\\", "\\\\").replace('"', '\\"') for line in lines]
    return '"' + "\\n".join(escaped) + '"'


def _entities(text: str) -> str:
    """Mermaid gives many characters a meaning: all but plain ones as entities."""
    return "".join(char if char.isalnum() or char in " ._-/" else f"#{ord(char)};" for char in text)
