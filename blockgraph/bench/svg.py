# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A result as SVG, without any other program: bars, latencies on logarithmic axes, backup-top's cost over time.

There is no background, and every colour can be read on a light page and on a dark one. Every bar and line has its
name beside it: no colour says anything alone.
"""

from __future__ import annotations

from itertools import groupby
from xml.sax.saxutils import escape, quoteattr

from blockgraph.bench.figures import OURS, WITHOUT_FILTER, Figure, Result
from blockgraph.bench.scale import Log, format_latency, format_number, format_rate, round_up

_WIDTH = 760
_LEFT = 176
_RIGHT = 190
_PLOT = _WIDTH - _LEFT - _RIGHT
_ROW = 18
_CHART = 160

_TEXT = "#7d8590"

_OURS = "#2f81f7"
_OTHER = "#8c959f"
_COLOURS = {OURS: _OURS, WITHOUT_FILTER: _OTHER, "nbdkit": "#3fa35c"}


def _colour(side: str) -> str:
    return _COLOURS.get(side, "#d0803a" if side.startswith("qemu") else _OTHER)


def draw(result: Result) -> str:
    """A complete SVG document."""
    page = _Page()
    page.heading("blockgraph bench")
    for name, value in result.facts.items():
        page.line(f"{name}: {value}")
    for group, figures in groupby(result.figures, lambda figure: figure.group):
        page.heading(group)
        for figure in figures:
            _bars(page, result, figure)
    timed = [figure for figure in result.figures if figure.timed()]
    if timed:
        page.heading("Latency: from the half to 95 % of the requests, and the slowest of 99.9 %")
        for figure in timed:
            _strips(page, figure)
    for figure in result.figures:
        if figure.interval:
            page.heading(f"While clusters get copied, {figure.unit}: {figure.group}, {figure.what}")
            _lines(page, figure)
    notes = result.all_notes()
    if notes:
        page.heading("Notes")
    for note in notes:
        page.line(note)
    return page.document()


class _Page:
    """Elements so far, and how far down they go."""

    def __init__(self) -> None:
        self.y = 16.0
        self._out: list[str] = []

    def add(self, element: str) -> None:
        self._out.append(element)

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False, size: int = 12) -> None:
        weight = ' font-weight="bold"' if bold else ""
        at = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
        self.add(f'<text {at}{weight} fill="{_TEXT}">{escape(_clean(text))}</text>')

    def rule(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.add(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{_TEXT}" stroke-opacity="0.35"/>'
        )

    def heading(self, text: str) -> None:
        self.y += 26
        self.text(0, self.y, text, bold=True, size=15)
        self.y += 8

    def line(self, text: str) -> None:
        """Text of any length, in as many lines as it needs."""
        rest = ""
        for word in text.split():
            if rest and len(rest) + len(word) > 120:
                self.y += 16
                self.text(0, self.y, rest)
                rest = word
            else:
                rest = f"{rest} {word}" if rest else word
        self.y += 16
        self.text(0, self.y, rest)

    def document(self) -> str:
        height = self.y + 24
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH + 32}" height="{height:.0f}" '
            f'viewBox="-16 0 {_WIDTH + 32} {height:.0f}" font-family="Helvetica, Arial, sans-serif">'
        )
        return "\n".join([head, *self._out, "</svg>", ""])


def _clean(text: str) -> str:
    """Without what XML can not hold; names come from users' graphs."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _name(page: _Page, side: str) -> None:
    page.text(_LEFT - 8, page.y + 12, side, anchor="end", bold=side == OURS)


def _bars(page: _Page, result: Result, figure: Figure) -> None:
    page.y += 20
    page.text(0, page.y, figure.what)
    page.y += 6
    most = max(figure.rate(side) for side in figure.sides) or 1.0
    for side in figure.sides:
        rate, ratio = figure.rate(side), figure.ratio(side)
        width = max(rate / most * _PLOT, 1.0)
        _name(page, side)
        page.add(
            f'<rect x="{_LEFT}" y="{page.y + 2:.1f}" width="{width:.1f}" height="{_ROW - 5}" rx="2" '
            f'fill="{_colour(side)}"/>'
        )
        told = format_rate(rate, figure.unit)
        page.text(_LEFT + width + 6, page.y + 12, told if ratio is None else f"{told}, we are {ratio:.2f} x")
        page.y += _ROW
    for name in result.missing_in(figure):
        _name(page, name)
        page.text(_LEFT + 6, page.y + 12, "not installed")
        page.y += _ROW


def _strips(page: _Page, figure: Figure) -> None:
    found = {side: latency for side in figure.sides if (latency := figure.latency(side))}
    axis = Log.around(value for latency in found.values() for value in latency.values())
    width = _PLOT + _RIGHT - 40
    page.y += 20
    page.text(0, page.y, f"{figure.group}: {figure.what}")
    page.y += 6
    top = page.y
    for side, latency in found.items():
        half, most, last = (_LEFT + axis.place(latency[name]) * width for name in ("p50", "p95", "p99.9"))
        colour, middle = _colour(side), page.y + _ROW / 2 - 1
        _name(page, side)
        told = ", ".join(f"{name} {format_latency(value)}" for name, value in latency.items())
        page.add(
            f"<g><title>{escape(_clean(f'{side}: {told}'))}</title>"
            f'<line x1="{half:.1f}" y1="{middle:.1f}" x2="{most:.1f}" y2="{middle:.1f}" stroke="{colour}" '
            f'stroke-width="4" stroke-linecap="round"/><circle cx="{half:.1f}" cy="{middle:.1f}" r="5" '
            f'fill="{colour}"/><circle cx="{last:.1f}" cy="{middle:.1f}" r="2.5" fill="{colour}"/></g>'
        )
        page.y += _ROW
    for tick in axis.ticks():
        x = _LEFT + axis.place(tick) * width
        page.rule(x, top, x, page.y)
        page.text(x, page.y + 12, format_latency(tick), anchor="middle", size=11)
    page.y += 16


def _lines(page: _Page, figure: Figure) -> None:
    series = {side: figure.series(side) for side in figure.sides}
    top = round_up(max((rate for rates in series.values() for rate in rates), default=0.0))
    count = max((len(rates) for rates in series.values()), default=0)
    left, width, begin = 56, _WIDTH - 56 - _RIGHT, page.y + 14
    for part in range(5):
        y = begin + _CHART * (1 - part / 4)
        page.rule(left, y, left + width, y)
        page.text(left - 6, y + 4, format_number(top * part / 4), anchor="end", size=11)
    for part in range(5):
        x = left + width * part / 4
        label = f"{count * figure.interval * part / 4:.2g}{' s' if part == 4 else ''}"
        page.text(x, begin + _CHART + 16, label, anchor="middle", size=11)
    ends: list[tuple[float, str]] = []
    for side, rates in series.items():
        if not rates:
            continue
        spots = [
            (left + width * (at + 0.5) / count, begin + _CHART * (1 - rate / top)) for at, rate in enumerate(rates)
        ]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        dash = ' stroke-dasharray="5 4"' if side == WITHOUT_FILTER else ""
        page.add(f'<polyline points={quoteattr(points)} fill="none" stroke="{_colour(side)}" stroke-width="2"{dash}/>')
        # Where its last quarter lies: the very last value may be an outlier.
        tail = spots[-max(1, len(spots) // 4) :]
        ends.append((sum(y for _, y in tail) / len(tail), side))
    last = begin - 16.0
    for end, side in sorted(ends):
        y = last = max(end, last + 16)
        mark = left + width + 8
        page.add(
            f'<line x1="{mark}" y1="{y:.1f}" x2="{mark + 16}" y2="{y:.1f}" stroke="{_colour(side)}" stroke-width="3"/>'
        )
        page.text(mark + 22, y + 4, side, bold=side == OURS)
    page.y = begin + _CHART + 20
