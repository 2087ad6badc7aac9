# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Sizes that a description alone tells, and where they do not fit each other. Nothing is opened here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from blockgraph.errors import GraphError, OptionError
from blockgraph.graph.model import Model, NodeVertex
from blockgraph.graph.problem import Problem


def check(model: Model, opened: Mapping[str, int] | None = None) -> Iterator[Problem]:
    """Nodes whose children's sizes do not fit, as far as they are known (Driver.known_size).

    Args:
        opened: sizes that nodes really have, bytes, by name.
    """
    return iter(_walk(model, opened or {})[1])


def known(model: Model) -> dict[str, int]:
    """The sizes that are known, bytes, by node name."""
    return _walk(model, {})[0]


def _walk(model: Model, opened: Mapping[str, int]) -> tuple[dict[str, int], list[Problem]]:
    sizes: dict[str, int] = {}
    problems: list[Problem] = []
    for name in model.ordered(children_first=True):
        vertex = model.get(name)
        if not isinstance(vertex, NodeVertex) or vertex.broken:
            continue
        edges = model.children(name)
        below = {child: sizes[edge.child] for child, edge in edges.items() if edge.child in sizes}
        try:
            size = vertex.driver.known_size(vertex.options, below)
        except GraphError as error:
            at_fault = edges.get(error.node or "")
            path = (at_fault.where if at_fault else None) or vertex.where or ""
            problems.append(Problem(kind=GraphError, message=error.reason, path=path, node=name, hint=error.hint))
        except OptionError as error:
            path = f"{vertex.where}.{error.path}" if vertex.where else error.path
            problems.append(
                Problem(
                    kind=OptionError,
                    message=error.reason,
                    path=path,
                    node=name,
                    value=error.value,
                    hint=error.hint,
                )
            )
        else:
            if size is not None:
                sizes[name] = size
        if name in opened:
            sizes[name] = opened[name]
    return sizes, problems
