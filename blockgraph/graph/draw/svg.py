# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A graph as SVG, without any other program. Shapes and line styles tell kinds apart, not colours alone."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from xml.sax.saxutils import escape

from blockgraph.graph.draw.formal import box_lines, permissions, tooltip
from blockgraph.graph.draw.layout import Layout, Spot, layered
from blockgraph.graph.draw.picture import LEGEND, Box, Line, Picture

_TITLE = 14
_SMALL = 11
_LINE = 16
_PAD = 12
_GAP = 48
_LAYER = 74
_MARGIN = 24
#: Longest text in a box, characters; the end of a path says more than its start.
_MAX_CHARS = 44
#: Parts of a curve at which its label may stand, the best first.
_LABEL_AT = (0.58, 0.45, 0.72, 0.32, 0.84, 0.2)
_LEGEND = f"on edges: needs / shares ({LEGEND})"

_FILL = {
    "root": ("#eceff1", "#546e7a"),
    "filter": ("#f3e5f5", "#7b1fa2"),
    "format": ("#e1f5fe", "#0277bd"),
    "protocol": ("#e8f5e9", "#2e7d32"),
    "unknown": ("#ffebee", "#c62828"),
    "missing": ("#ffffff", "#c62828"),
}
_STROKE = {"filtered": 'stroke-width="2.5"', "storage": 'stroke-width="1.2"', "cow": 'stroke-dasharray="6 4"'}
_ROUND = {"root": 0, "filter": 14, "format": 2, "protocol": 6, "unknown": 2, "missing": 2}


def svg(picture: Picture) -> str:
    """A complete SVG document."""
    texts = {key: [_short(text) for text in box_lines(box)] for key, box in picture.boxes.items()}
    lines = [line for lines in picture.lines.values() for line in lines]
    widths = {key: _width(text) for key, text in texts.items()}
    layout = layered(widths, [(line.parent, line.child) for line in lines], _GAP)
    tops, heights = _rows(layout, texts)
    width = max([spot.x + spot.width / 2 for spot in layout.spots.values()], default=0) + 2 * _MARGIN
    height = (tops[-1] + heights[-1] if tops else 0) + 2 * _MARGIN + _LINE
    width = max(width, _text_width(_LEGEND, _SMALL) + 2 * _MARGIN)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="Helvetica, Arial, sans-serif">',
        "<defs>"
        '<marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="9" markerHeight="9" '
        'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L10 5L0 10z" fill="#455a64"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        f'<g transform="translate({_MARGIN} {_MARGIN})">',
    ]
    labels: list[str] = []
    placed = _Labels()
    for line, route in zip(lines, layout.routes, strict=True):
        spots = [layout.spots[key] for key in route]
        out.append(_path(line, spots, tops, heights, texts))
        labels.append(_label_svg(placed.place(line, _places(line, spots, tops, heights, texts))))
    out += labels
    for key, box in picture.boxes.items():
        out.append(_box(box, texts[key], layout.spots[key], tops[layout.spots[key].layer]))
    out.append("</g>")
    out.append(_text(_MARGIN, height - _MARGIN / 2, _LEGEND, _SMALL, "#78909c", anchor="start"))
    return "\n".join([*out, "</svg>", ""])


def _rows(layout: Layout, texts: dict[str, list[str]]) -> tuple[list[float], list[float]]:
    """Top and height of each layer."""
    heights = [
        max((_height(texts[key]) for key in layer if isinstance(key, str)), default=0.0) for layer in layout.layers
    ]
    tops = []
    y = 0.0
    for height in heights:
        tops.append(y)
        y += height + _LAYER
    return tops, heights


def _height(texts: list[str]) -> float:
    return _LINE * len(texts) + 2 * _PAD - 4


def _width(texts: list[str]) -> float:
    widths = [_text_width(text, _TITLE if index == 0 else _SMALL) for index, text in enumerate(texts)]
    return max(*widths, 80.0) + 2 * _PAD


def _text_width(text: str, size: int) -> float:
    """An estimate: SVG can not ask the font. Wide (East Asian) characters count double."""
    return sum(1.0 if unicodedata.east_asian_width(char) in "WF" else 0.58 for char in text) * size


def _short(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else f"…{text[1 - _MAX_CHARS :]}"


def _box(box: Box, texts: list[str], spot: Spot, top: float) -> str:
    fill, stroke = _FILL[box.kind]
    height = _height(texts)
    dash = ' stroke-dasharray="5 4"' if box.kind == "missing" else ""
    out = [
        f'<g class="{box.kind}"><title>{_safe(" · ".join(box_lines(box)))}</title>',
        f'<rect x="{spot.x - spot.width / 2:.1f}" y="{top:.1f}" width="{spot.width:.1f}" height="{height:.1f}" '
        f'rx="{_ROUND[box.kind]}" fill="{fill}" stroke="{stroke}" stroke-width="1.4"{dash}/>',
    ]
    for index, text in enumerate(texts):
        y = top + _PAD + _LINE * index + 10
        if index == 0:
            out.append(_text(spot.x, y, text, _TITLE, "#102027", weight="bold"))
        else:
            out.append(_text(spot.x, y, text, _SMALL, "#455a64"))
    return "".join([*out, "</g>"])


def _ends(line: Line, spots: list[Spot], tops: list[float], texts: dict[str, list[str]]) -> tuple[float, float]:
    """y where the line leaves the parent, and where it meets the child."""
    down = spots[-1].layer > spots[0].layer
    first = tops[spots[0].layer] + (_height(texts[line.parent]) if down else 0.0)
    last = tops[spots[-1].layer] + (0.0 if down else _height(texts[line.child]))
    return first, last


def _path(line: Line, spots: list[Spot], tops: list[float], heights: list[float], texts: dict[str, list[str]]) -> str:
    title = f"<title>{_safe(tooltip(line))}</title>"
    style = f'fill="none" stroke="#455a64" {_STROKE[line.style]} marker-end="url(#tip)"'
    first, last = _ends(line, spots, tops, texts)
    if spots[0] is spots[-1] or spots[0].layer == spots[-1].layer:
        x, y = spots[0].x + spots[0].width / 2, tops[spots[0].layer] + 12
        return f'<path class="{line.style}" d="M{x:.1f} {y:.1f}c40 -20 40 36 0 16" {style}>{title}</path>'
    # A curve between layers; straight down beside the boxes of a layer that it passes.
    down = last > first
    x, y = spots[0].x, first
    d = f"M{x:.1f} {y:.1f}"
    for spot in spots[1:]:
        enter = tops[spot.layer] if down else tops[spot.layer] + heights[spot.layer]
        leave = tops[spot.layer] + heights[spot.layer] if down else tops[spot.layer]
        if spot is spots[-1]:
            enter = last
        bend = (enter - y) / 2
        d += f"C{x:.1f} {y + bend:.1f} {spot.x:.1f} {enter - bend:.1f} {spot.x:.1f} {enter:.1f}"
        if spot is not spots[-1]:
            d += f"V{leave:.1f}"
        x, y = spot.x, leave
    return f'<path class="{line.style}" d="{d}" {style}>{title}</path>'


@dataclass(slots=True)
class _Label:
    """Name and permissions of an edge, and where they stand: the middle, and the room they take."""

    texts: list[str]
    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: _Label) -> float:
        """The area that both cover."""
        across = (self.width + other.width) / 2 - abs(self.x - other.x)
        down = (self.height + other.height) / 2 - abs(self.y - other.y)
        return across * down if across > 0 and down > 0 else 0.0


class _Labels:
    """Labels placed so far, by squares of the drawing, so that only those nearby are looked at."""

    _SQUARE = 512.0  # no label is wider

    def __init__(self) -> None:
        self._squares: dict[tuple[int, int], list[_Label]] = {}

    def place(self, line: Line, places: list[tuple[float, float]]) -> _Label:
        """At the first of `places` where it covers no other label; else where it covers least."""
        texts = [line.name, permissions(line)] if line.name else [permissions(line)]
        width = max(_text_width(text, _SMALL) for text in texts) + 4
        labels = [_Label(texts, x, y, width, 13.0 * len(texts)) for x, y in places]
        best = min(labels, key=lambda label: sum(map(label.overlap, self._near(label))))
        self._squares.setdefault(self._square(best), []).append(best)
        return best

    def _square(self, label: _Label) -> tuple[int, int]:
        return int(label.x // self._SQUARE), int(label.y // self._SQUARE)

    def _near(self, label: _Label) -> Iterator[_Label]:
        column, row = self._square(label)
        for square in product(range(column - 1, column + 2), range(row - 1, row + 2)):
            yield from self._squares.get(square, ())


def _places(
    line: Line, spots: list[Spot], tops: list[float], heights: list[float], texts: dict[str, list[str]]
) -> list[tuple[float, float]]:
    """Where the label may stand, the best first: close to the child, where lines that start together are apart."""
    before = spots[-2] if len(spots) > 1 else spots[-1]
    if before.layer == spots[-1].layer:
        return [(before.x + before.width / 2 + 30, tops[before.layer] + 22)]
    first, last = _ends(line, spots, tops, texts)
    down = last > first
    places = []
    for upper, lower in reversed(list(pairwise(spots))):
        leave = tops[upper.layer] + (heights[upper.layer] if down else 0.0)
        enter = tops[lower.layer] + (0.0 if down else heights[lower.layer])
        start, end = first if upper is spots[0] else leave, last if lower is spots[-1] else enter
        middle = (start + end) / 2
        for t in _LABEL_AT:
            x = _bezier(t, upper.x, upper.x, lower.x, lower.x)
            places.append((x, _bezier(t, start, middle, middle, end) - 1))
    return places


def _label_svg(label: _Label) -> str:
    left, top = label.x - label.width / 2, label.y - label.height / 2
    out = [
        f'<rect class="label" x="{left:.1f}" y="{top:.1f}" width="{label.width:.1f}" height="{label.height:.1f}" '
        'fill="#ffffff" fill-opacity="0.85"/>'
    ]
    for index, text in enumerate(label.texts):
        colour = "#102027" if index < len(label.texts) - 1 else "#78909c"
        out.append(_text(label.x, top + 10 + 13 * index, text, _SMALL, colour))
    return "".join(out)


def _bezier(t: float, a: float, b: float, c: float, d: float) -> float:
    """A coordinate of a point of a cubic curve."""
    return (1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t**2 * c + t**3 * d


def _text(
    x: float, y: float, text: str, size: int, fill: str, *, weight: str = "normal", anchor: str = "middle"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{_safe(text)}</text>'
    )


def _safe(text: str) -> str:
    return escape(text, {'"': "&quot;"})
