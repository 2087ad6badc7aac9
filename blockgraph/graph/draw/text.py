# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A graph for a terminal: a tree in the first column, one line for each edge.

    export 'guest'
    └─ top                       backup-top     1 GiB   rw--   r-u-
       ├─ file: disk             qcow2          1 GiB   rw--   r-u-
       │  └─ file: #block0       file                   rw-s   r-u-   disk.qcow2
       └─ target: scratch ...

A node that several parents share is drawn below the first; the others refer to it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from blockgraph.graph.draw.picture import LEGEND, Box, Line, Picture, letters
from blockgraph.graph.problem import printable
from blockgraph.text import format_size

#: A tree deeper than this goes on as a tree of its own below, or it would leave the terminal.
_MAX_DEPTH = 24

_STYLES = {
    "root": "bold",
    "filter": "magenta",
    "format": "cyan",
    "protocol": "green",
    "unknown": "red",
    "missing": "red",
}
_EDGES = {"filtered": "", "storage": "", "cow": "yellow"}


def plain(picture: Picture) -> str:
    """Without colours, each line as long as it must be."""
    out = io.StringIO()
    show(picture, Console(file=out, width=10_000, color_system=None, legacy_windows=False, _environ={}))
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def show(picture: Picture, console: Console) -> None:
    """Print it on a console."""
    if not picture.boxes:
        console.print(Text("an empty graph", "dim"))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("graph", no_wrap=True)
    table.add_column("driver", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("need", no_wrap=True)
    table.add_column("share", no_wrap=True)
    table.add_column("file", overflow="fold")
    for row in _Tree(picture).rows():
        table.add_row(*row)
    console.print(table)
    console.print(Text(f"\n{LEGEND}", "dim"))


class _Tree:
    """Rows of the table. A loop instead of recursion: chains can be long."""

    def __init__(self, picture: Picture) -> None:
        self._picture = picture
        self._drawn: set[str] = set()

    def rows(self) -> Iterator[tuple[Text, ...]]:
        """Every tree: from the tops, then from what only a cycle holds."""
        for first in [*self._picture.tops(), *self._picture.boxes]:
            tops = [first]
            for top in tops:  # grows by the trees that were too deep to be drawn in one
                if top in self._drawn:
                    continue
                self._drawn.add(top)
                box = self._picture.boxes[top]
                yield self._row(Text(printable(box.title), _STYLES[box.kind]), box, None)
                yield from self._below(top, tops)

    def _below(self, top: str, tops: list[str]) -> Iterator[tuple[Text, ...]]:
        # Depth first; each entry is a line, what stands left of it, and whether it is its parent's last.
        todo = self._children(top, "")
        while todo:
            line, indent, last = todo.pop()
            box = self._picture.boxes[line.child]
            text = Text(indent + ("└─ " if last else "├─ "), "dim")
            if line.name:
                text.append(f"{printable(line.name)}: ", Style.parse(_EDGES[line.style] or "default"))
            text.append(printable(box.title), Style.parse(_STYLES[box.kind]))
            if line.child in self._drawn:
                text.append(" ↑" if box.kind != "missing" else "", "dim")
                yield self._row(text, None, line)
                continue
            inner = indent + ("   " if last else "│  ")
            if len(inner) > 3 * _MAX_DEPTH and self._picture.lines.get(line.child):
                text.append(" ↓", "dim")
                tops.append(line.child)
                yield self._row(text, None, line)
                continue
            self._drawn.add(line.child)
            yield self._row(text, box, line)
            todo += self._children(line.child, inner)

    def _children(self, key: str, indent: str) -> list[tuple[Line, str, bool]]:
        lines = self._picture.lines.get(key, [])
        return [(line, indent, index == len(lines) - 1) for index, line in enumerate(lines)][::-1]

    def _row(self, name: Text, box: Box | None, line: Line | None) -> tuple[Text, ...]:
        driver = Text()
        size = file = Text()
        if box is not None:
            driver = Text(printable(box.driver), _STYLES[box.kind])
            if box.kind == "missing":
                driver = Text("does not exist", "red")
            elif box.read_only and box.kind != "root":
                driver.append(" ro", "dim")
            size = Text(format_size(box.size) if box.size is not None else "")
            file = Text(printable(box.file or ""))
        need = Text(letters(line.need) if line else "")
        share = Text(letters(line.share) if line else "", "dim")
        return name, driver, size, need, share, file
