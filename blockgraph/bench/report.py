# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A result for a terminal: tables with bars, latencies on a logarithmic axis, backup-top's cost over time.

It fits 80 columns, says the same without colours, and makes do with ASCII where the output knows no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from blockgraph.bench.figures import OURS, Figure, Result
from blockgraph.bench.scale import Log, format_latency, format_number, format_rate, round_up

_SIDE = 21
_BAR = 14
_STRIP = 56
_HEIGHT = 4


class _Marks(NamedTuple):
    """Characters to draw with; the parts of a full one rise from nothing."""

    across: str
    up: str
    median: str
    tail: str
    most: str
    last: str
    side: str
    corner: str
    floor: str
    micro: str


_UNICODE = _Marks(" ▏▎▍▌▋▊▉█", " ▁▂▃▄▅▆▇█", "●", "─", "┤", "·", "│", "└", "─", "µ")
_ASCII = _Marks(" #", " .#", "o", "-", "|", ".", "|", "+", "-", "u")


def show(result: Result, console: Console) -> None:
    """Print everything."""
    marks = _UNICODE if console.encoding.lower().startswith("utf") else _ASCII
    for name, value in result.facts.items():
        console.print(Text(f"{name + ':':<11} {value}"), soft_wrap=True)
    for group, figures in groupby(result.figures, lambda figure: figure.group):
        _heading(console, group)
        of_group = list(figures)
        console.print(_columns(timed=any(figure.timed() for figure in of_group), header=True))
        for figure in of_group:
            console.print(Text(f" {figure.what}", style="bold"), soft_wrap=True)
            console.print(_table(result, figure, marks))
    timed = [figure for figure in result.figures if figure.timed()]
    if timed:
        key = f"{marks.median} half, {marks.most} 95 %, {marks.last} 99.9 % of the requests take no longer"
        _heading(console, f"Latency: {key}")
        for figure in timed:
            _latencies(console, figure, marks)
    for figure in result.figures:
        if figure.interval:
            _over_time(console, figure, marks)
    notes = result.all_notes()
    if notes:
        _heading(console, "Notes")
    for note in notes:
        console.print(Text(f"  {note}"), soft_wrap=True)


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold cyan"), soft_wrap=True)


def _micro(text: str, marks: _Marks) -> str:
    return text.replace("µ", marks.micro)


# Rates.


def _columns(*, timed: bool, header: bool) -> Table:
    """An empty table. All have the same widths, so that several stand as one."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=header)
    table.add_column("", width=_SIDE, no_wrap=True, overflow="crop")
    table.add_column("rate", justify="right", width=13, no_wrap=True, overflow="crop")
    table.add_column("", width=_BAR, no_wrap=True, overflow="crop")
    table.add_column("we are", justify="right", width=7, no_wrap=True, overflow="crop")
    for name in ("p50", "p99"):
        table.add_column(name if timed else "", justify="right", width=7, no_wrap=True, overflow="crop")
    return table


def _table(result: Result, figure: Figure, marks: _Marks) -> Table:
    table = _columns(timed=figure.timed(), header=False)
    most = max(figure.rate(side) for side in figure.sides)
    for side in figure.sides:
        table.add_row(*_row(figure, side, most, marks), style="bold" if side == OURS else None)
    for name in result.missing_in(figure):
        table.add_row(f"  {name}", "not installed", style="dim")
    return table


def _row(figure: Figure, side: str, most: float, marks: _Marks) -> list[str]:
    rate, ratio, latency = figure.rate(side), figure.ratio(side), figure.latency(side)
    return [
        f"  {side}",
        format_rate(rate, figure.unit),
        _bar(rate / most if most else 0.0, marks.across),
        "" if ratio is None else f"{ratio:.2f} x",
        *(_micro(format_latency(latency[name]), marks) for name in ("p50", "p99") if latency),
    ]


def _bar(share: float, parts: str) -> str:
    steps = len(parts) - 1
    whole, part = divmod(round(share * _BAR * steps), steps)
    return (parts[-1] * whole + parts[part]).rstrip()


# Latencies.


def _latencies(console: Console, figure: Figure, marks: _Marks) -> None:
    """A line for each side, on one axis."""
    found = {side: figure.latency(side) for side in figure.sides}
    axis = Log.around(value for latency in found.values() for value in latency.values())
    console.print(Text(f" {figure.group}: {figure.what}", style="bold"), soft_wrap=True)
    for side, latency in found.items():
        if latency:
            line = Text(f"  {side:<{_SIDE - 2}} {marks.side}{_strip(axis, latency, marks)}")
            console.print(line, style="bold" if side == OURS else "", soft_wrap=True)
    ruler = [" "] * (_STRIP + 12)
    for tick in axis.ticks():
        label = _micro(format_latency(tick), marks)
        at = round(axis.place(tick) * (_STRIP - 1))
        at = min(at, _STRIP - len(label))
        ruler[at : at + len(label)] = label
    console.print(Text(f"{'':<{_SIDE + 2}}{''.join(ruler).rstrip()}", style="dim"), soft_wrap=True)


def _strip(axis: Log, latency: dict[str, float], marks: _Marks) -> str:
    cells = [" "] * _STRIP
    median, most, last = (round(axis.place(latency[name]) * (_STRIP - 1)) for name in ("p50", "p95", "p99.9"))
    cells[last] = marks.last
    for at in range(median, most):
        cells[at] = marks.tail
    cells[most] = marks.most
    cells[median] = marks.median
    return "".join(cells).rstrip()


# Over time.


def _over_time(console: Console, figure: Figure, marks: _Marks) -> None:
    """A small plot for each side, all on the same axes."""
    series = {side: figure.series(side) for side in figure.sides}
    top = round_up(max((rate for rates in series.values() for rate in rates), default=0.0))
    _heading(console, f"While clusters get copied, {figure.unit}: {figure.group}, {figure.what}")
    for side, rates in series.items():
        labels = [format_number(top), *[""] * (_HEIGHT - 2), side]
        for row, label in enumerate(labels):
            plot = "".join(_cell(rate / top * _HEIGHT - (_HEIGHT - 1 - row), marks.up) for rate in rates)
            style = "bold" if side == OURS else ""
            console.print(Text(f"  {label:>{_SIDE - 2}} {marks.side}{plot.rstrip()}", style=style), soft_wrap=True)
    length = max((len(rates) for rates in series.values()), default=0)
    console.print(Text(f"{'0':>{_SIDE}} {marks.corner}{marks.floor * length}", style="dim"), soft_wrap=True)
    end = f"{length * figure.interval:.2g} s"
    console.print(Text(f"{'':<{_SIDE + 2}}0{end:>{max(length - 1, len(end) + 1)}}", style="dim"), soft_wrap=True)


def _cell(height: float, parts: Sequence[str]) -> str:
    """One character of a column that reaches `height` characters above its bottom."""
    return parts[min(max(round(height * (len(parts) - 1)), 0), len(parts) - 1)]
