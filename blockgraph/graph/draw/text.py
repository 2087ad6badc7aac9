# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A graph for a terminal: a tree in the first column, one line for each edge.

    export 'guest'
    └─ top                       backup-top     1 GiB   rw--   r-u-
       ├─ file: disk             qcow2          1 GiB   rw--   r-u-
       │  └─ file: #block0       file                   rw-s   r-u-   disk.qcow2
       └─ target: scratch ...

A node that several parents share is drawn below the first; the others refer to it. On a terminal that is too narrow the
file stands in a line of its own below its node.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.style import Style
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

_HEAD = ("graph", "driver", "size", "need", "share", "file")
_SIZE = 2  # the column that stands to the right
#: Columns that are cut where a terminal is too narrow keep this much, characters.
_LEAST_TREE, _LEAST_DRIVER = 16, 15


@dataclass(frozen=True, slots=True)
class _Row:
    """Attributes:
    cells: as in `_HEAD`.
    below: what stands left of a second line.
    """

    cells: tuple[Text, ...]
    below: str = ""


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
    rows = [_Row(tuple(Text(head, "dim") for head in _HEAD)), *_Tree(picture).rows()]
    widths = [max(row.cells[column].cell_len for row in rows) for column in range(len(_HEAD))]
    gap = 3
    narrow = sum(widths) + gap * (len(widths) - 1) > console.width
    if narrow:
        gap = 2
        widths = _narrow(widths[:-1], gap, console.width)
    for row in rows:
        _print(console, _line(row.cells[: len(widths)], widths, gap))
        if narrow and row.cells[-1] and row is not rows[0]:
            file = row.cells[-1].plain
            room = max(console.width - len(row.below), _LEAST_TREE)
            _print(console, Text.assemble((row.below, "dim"), file if len(file) <= room else f"…{file[1 - room :]}"))
    console.print(Text(f"\n{LEGEND}", "dim"))


def _narrow(widths: list[int], gap: int, room: int) -> list[int]:
    """Widths with the tree, then the drivers cut."""
    excess = sum(widths) + gap * (len(widths) - 1) - room
    for column, least in ((0, max(_LEAST_TREE, room // 2)), (1, _LEAST_DRIVER), (0, _LEAST_TREE)):
        cut = max(0, min(excess, widths[column] - least))
        widths[column] -= cut
        excess -= cut
    return widths


def _line(cells: tuple[Text, ...], widths: list[int], gap: int) -> Text:
    line = Text()
    for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        cell = cell.copy()
        cell.truncate(width, overflow="ellipsis")
        cell.align("right" if column == _SIZE else "left", width)
        line.append(" " * gap if column else "").append_text(cell)
    line.rstrip()
    return line


def _print(console: Console, line: Text) -> None:
    console.print(line, no_wrap=True, overflow="ignore", crop=False)


class _Tree:
    """Rows of the table. A loop instead of recursion: chains can be long."""

    def __init__(self, picture: Picture) -> None:
        self._picture = picture
        self._drawn: set[str] = set()

    def rows(self) -> Iterator[_Row]:
        """Every tree: from the tops, then from what only a cycle holds."""
        for first in [*self._picture.tops(), *self._picture.boxes]:
            tops = [first]
            for top in tops:  # grows by the trees that were too deep to be drawn in one
                if top in self._drawn:
                    continue
                self._drawn.add(top)
                box = self._picture.boxes[top]
                name = Text(printable(box.title), _STYLES[box.kind])
                yield self._row(name, box, None, "│     " if self._picture.lines.get(top) else "      ")
                yield from self._below(top, tops)

    def _below(self, top: str, tops: list[str]) -> Iterator[_Row]:
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
            below = self._children(line.child, inner)
            yield self._row(text, box, line, f"{inner}{'│' if below else ' '}     ")
            todo += below

    def _children(self, key: str, indent: str) -> list[tuple[Line, str, bool]]:
        lines = self._picture.lines.get(key, [])
        return [(line, indent, index == len(lines) - 1) for index, line in enumerate(lines)][::-1]

    def _row(self, name: Text, box: Box | None, line: Line | None, below: str = "") -> _Row:
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
        return _Row((name, driver, size, need, share, file), below)
