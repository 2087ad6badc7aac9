# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A layered layout: every edge points down, few cross, parents stand above the middle of their children.

The steps are those of Sugiyama: layers by the longest path from a top, way points where an edge passes a layer, the
order inside a layer by the middle of the neighbours, then positions.
Source: Sugiyama, Tagawa, Toda, "Methods for visual understanding of hierarchical system structures", 1981.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

_SWEEPS = 8


@dataclass(slots=True)
class Spot:
    """Where a box (or a way point of an edge) stands.

    Attributes:
        layer: from 0, downwards.
        x: of its middle.
        width: it takes this much room.
        box: it is a box.
    """

    layer: int
    x: float
    width: float
    box: bool


@dataclass(slots=True)
class Layout:
    """Attributes:
    spots: of boxes, by key, and of way points.
    routes: for each edge, in the order given: keys of the spots it passes, from parent to child.
    layers: keys in each layer, in no order.
    """

    spots: dict[object, Spot]
    routes: list[list[object]]
    layers: list[list[object]]


def layered(widths: Mapping[str, float], edges: Iterable[tuple[str, str]], gap: float) -> Layout:
    """Lay boxes out.

    Args:
        widths: of the boxes.
        edges: parent and child; may hold cycles.
        gap: least room between neighbours in a layer.
    """
    edges = list(edges)
    layer_of = _layers(list(widths), edges)
    spots: dict[object, Spot] = {key: Spot(layer_of[key], 0.0, width, True) for key, width in widths.items()}
    routes = [_route(parent, child, index, layer_of, spots) for index, (parent, child) in enumerate(edges)]
    layers: list[list[object]] = [[] for _ in range(max(layer_of.values(), default=-1) + 1)]
    for key, spot in spots.items():
        layers[spot.layer].append(key)
    above: dict[object, list[object]] = {key: [] for key in spots}
    below: dict[object, list[object]] = {key: [] for key in spots}
    for route in routes:
        for upper, lower in pairwise(route):
            above[lower].append(upper)
            below[upper].append(lower)
    left = 0.0
    for part in _parts(spots, routes):
        inside: list[list[object]] = [[] for _ in range(max(spots[key].layer for key in part) + 1)]
        for key in part:
            inside[spots[key].layer].append(key)
        _order(inside, above, below)
        _place(inside, spots, above, below, gap)
        left = _pack([spots[key] for key in part], left) + 2 * gap
    return Layout(spots, routes, layers)


def _parts(spots: Iterable[object], routes: list[list[object]]) -> list[list[object]]:
    """What hangs together, in the order of the boxes."""
    spots = list(spots)
    graph = nx.Graph()
    graph.add_nodes_from(spots)
    for route in routes:
        graph.add_edges_from(pairwise(route))
    part_of = {key: index for index, part in enumerate(nx.connected_components(graph)) for key in part}
    parts: dict[int, list[object]] = {}
    for key in spots:
        parts.setdefault(part_of[key], []).append(key)
    return list(parts.values())


def _pack(spots: list[Spot], left: float) -> float:
    """Move a part so that it begins at `left`; returns where it ends."""
    shift = left - min(spot.x - spot.width / 2 for spot in spots)
    for spot in spots:
        spot.x += shift
    return max(spot.x + spot.width / 2 for spot in spots)


def _layers(keys: list[str], edges: list[tuple[str, str]]) -> dict[str, int]:
    """Longest path from a top. The edges that close a cycle do not count."""
    graph = nx.DiGraph()
    graph.add_nodes_from(keys)
    graph.add_edges_from(edge for edge in edges if edge[0] != edge[1])
    while not nx.is_directed_acyclic_graph(graph):
        closing = nx.find_cycle(graph)[-1]
        graph.remove_edge(*closing[:2])
    layer_of = {}
    for layer, generation in enumerate(nx.topological_generations(graph)):
        layer_of.update(dict.fromkeys(generation, layer))
    # A box that nothing leads to stands just above what it uses, not at the far top.
    for key in keys:
        children = list(graph.successors(key))
        if children and not graph.in_degree(key):
            layer_of[key] = min(layer_of[child] for child in children) - 1
    return layer_of


def _route(parent: str, child: str, index: int, layer_of: Mapping[str, int], spots: dict[object, Spot]) -> list[object]:
    first, last = layer_of[parent], layer_of[child]
    step = 1 if last > first else -1
    route: list[object] = [parent]
    for layer in range(first + step, last, step):
        key = (index, layer)
        spots[key] = Spot(layer, 0.0, 0.0, False)
        route.append(key)
    return [*route, child]


def _order(
    layers: list[list[object]], above: Mapping[object, list[object]], below: Mapping[object, list[object]]
) -> None:
    """Sort each layer by the middle of its neighbours in the one before, down and up in turn; the best order stays."""
    best, fewest = [list(layer) for layer in layers], _crossings(layers, below)
    position = {key: float(index) for layer in layers for index, key in enumerate(layer)}
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        neighbours = above if down else below
        for layer in layers if down else reversed(layers):
            middle = {key: _mean([position[n] for n in neighbours[key]], position[key]) for key in layer}
            layer.sort(key=middle.__getitem__)
            position.update((key, index) for index, key in enumerate(layer))
        crossings = _crossings(layers, below)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    for layer, order in zip(layers, best, strict=True):
        layer[:] = order


def _crossings(layers: list[list[object]], below: Mapping[object, list[object]]) -> int:
    """How many lines cross: pairs of edges whose ends are in opposite orders."""
    count = 0
    for upper, lower in pairwise(layers):
        position = {key: index for index, key in enumerate(lower)}
        seen: list[int] = []
        for key in upper:
            ends = sorted(position[child] for child in below[key] if child in position)
            count += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return count


def _place(
    layers: list[list[object]],
    spots: Mapping[object, Spot],
    above: Mapping[object, list[object]],
    below: Mapping[object, list[object]],
    gap: float,
) -> None:
    for layer in layers:
        x = 0.0
        for key in layer:
            spots[key].x = x + spots[key].width / 2
            x += spots[key].width + gap
    for sweep in range(2 * _SWEEPS):
        down = sweep % 2 == 1
        neighbours = above if down else below
        for layer in layers if down else reversed(layers):
            wanted = [_mean([spots[n].x for n in neighbours[key]], spots[key].x) for key in layer]
            _spread(layer, spots, wanted, gap)


def _spread(layer: list[object], spots: Mapping[object, Spot], wanted: list[float], gap: float) -> None:
    """Positions closest to the wanted ones that keep order and room: neighbours that would overlap form a block,
    which stands at the mean of what its members want."""
    offsets: list[float] = []
    previous: Spot | None = None
    for key in layer:
        spot = spots[key]
        offsets.append(0.0 if previous is None else offsets[-1] + (previous.width + spot.width) / 2 + gap)
        previous = spot
    # With the room between neighbours taken out, the wish is a non-decreasing sequence: merge what decreases.
    blocks: list[tuple[float, int]] = []
    for want, offset in zip(wanted, offsets, strict=True):
        total, count = want - offset, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            before, members = blocks.pop()
            total, count = total + before, count + members
        blocks.append((total, count))
    index = 0
    for total, count in blocks:
        for _ in range(count):
            spots[layer[index]].x = total / count + offsets[index]
            index += 1


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
