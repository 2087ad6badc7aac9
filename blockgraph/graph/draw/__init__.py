# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Drawings of a graph, of a description that nothing of is opened or of a running one.

    Model --> picture --> text | dot | svg | mermaid | json

Every format says the same: nodes with driver, file and size where known, edges with role and permissions, roots with
their owner. Names in it are untrusted and are escaped for each format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from blockgraph.graph.draw.picture import Box, Line, Picture, picture

Format = Literal["text", "dot", "svg", "mermaid", "json"]
FORMATS: tuple[Format, ...] = ("text", "dot", "svg", "mermaid", "json")


def render(drawn: Picture, form: Format) -> str:
    """The picture in that format, with a line end at the end; text without colours (see draw.text for a terminal)."""
    return _renderer(form)(drawn)


def _renderer(form: Format) -> Callable[[Picture], str]:
    if form == "text":
        from blockgraph.graph.draw.text import plain

        return plain
    if form == "svg":
        from blockgraph.graph.draw.svg import svg

        return svg
    from blockgraph.graph.draw import formal

    return {"dot": formal.dot, "mermaid": formal.mermaid, "json": formal.to_json}[form]


__all__ = ["FORMATS", "Box", "Format", "Line", "Picture", "picture", "render"]
