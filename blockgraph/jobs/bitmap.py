# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Which bitmap a job means: one of its device, of what its device shows, or of a node that it names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from blockgraph.bitmaps.actions import find_on
from blockgraph.errors import GraphError
from blockgraph.options import BitmapRef
from blockgraph.perm import Role

if TYPE_CHECKING:
    from blockgraph.bitmaps import DirtyBitmap
    from blockgraph.graph.model import Model
    from blockgraph.graph.transaction import Transaction
    from blockgraph.jobs.options import BackupOptions
    from blockgraph.jobs.sync import BitmapUse
    from blockgraph.node import Node


def shown(model: Model, name: str) -> Iterator[str]:
    """The node, and those whose bytes it shows: below filters."""
    while model.has(name):
        yield name
        below = [edge.child for edge in model.children(name).values() if edge.role & Role.FILTERED]
        if not below:
            return
        name = below[0]


def bitmap_nodes(model: Model, options: BackupOptions) -> list[str]:
    """Nodes that may have the job's bitmap."""
    if isinstance(options.bitmap, BitmapRef):
        return [options.bitmap.node]
    return [] if options.bitmap is None else list(shown(model, options.device))


def find_bitmap(change: Transaction, device: str, use: BitmapUse) -> tuple[Node, DirtyBitmap]:
    """The bitmap and its node, as the transaction's earlier actions have made them.

    Raises:
        GraphError: there is no such node or bitmap; tells those that there are.
    """
    if use.node is not None:
        node = change.node(use.node)
        return node, find_on(node, use.name)
    known: list[str] = []
    for name in shown(change.candidate, device):
        node = change.node(name)
        if use.name in node.bitmaps:
            return node, node.bitmaps[use.name]
        known += node.bitmaps
    told = ", ".join(f"'{name}'" for name in known) or "none"
    raise GraphError(
        f"there is no bitmap '{use.name}' (there are: {told})",
        node=device,
        op="backup",
        hint="add it in the transaction of a full backup; until then it could not tell what has changed",
    )
