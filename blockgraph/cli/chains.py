# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What `verify` and `restore` share: arguments, tables of points, progress."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from blockgraph.chains import Backup, Chain
from blockgraph.graph.problem import printable
from blockgraph.text import format_size

Told = Callable[[int, int], None]


def add_chain_arguments(parser: ArgumentParser) -> None:
    """The chain, and which disk of it."""
    parser.add_argument("chain", metavar="CHAIN", help="directory of backups, or a manifest (.json) in it")
    parser.add_argument("--disk", metavar="NAME", help="of several disks' backups, those of this one")


#: What `--at` takes.
AT_HELP = "'latest', the beginning of an id, a number as listed, or a time: the newest point that is not later"


def describe(backup: Backup) -> dict[str, Any]:
    """A point as JSON has it."""
    info = backup.manifest
    return {
        "id": info.id,
        "time": info.time,
        "kind": info.kind,
        "parent": info.parent,
        "disk": info.disk.name,
        "size": info.disk.size,
        "covered": info.covered,
        "image": info.image,
        "format": info.image_format,
        "state": info.state,
    }


def points_table(chain: Chain, disk: str | None, states: dict[str, str]) -> Table:
    """The points of a chain.

    Args:
        states: by id; "complete" or "running" where there is none.
    """
    table = Table(box=None, pad_edge=False)
    for name in ("", "time (UTC)", "disk", "kind", "id", "parent", "has", "of", "format", "state"):
        table.add_column(name, justify="right" if name in ("", "has", "of") else "left")
    numbers = {backup.manifest.id: str(i) for i, backup in enumerate(chain.points(disk), 1)}
    for name, backup in chain.backups.items():
        info = backup.manifest
        if disk not in (None, info.disk.name):
            continue
        table.add_row(
            numbers.get(name, ""),
            info.time.replace("T", " ")[:19],
            printable(info.disk.name),
            info.kind,
            info.short,
            (info.parent or "")[:8],
            format_size(info.covered),
            format_size(info.disk.size),
            info.image_format,
            states.get(name, info.state),
        )
    return table


@contextmanager
def progress(text: str) -> Iterator[Told]:
    """Shows a bar on a terminal; nothing elsewhere."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    with Progress(
        TextColumn(text), BarColumn(), TextColumn("{task.percentage:3.0f} %"), console=console, transient=True
    ) as bars:
        task = bars.add_task(text, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=max(total, 1))
