# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Roles of edges, permissions on edges, and the rules by which permissions travel down the graph.

An edge *needs* permissions on its child and *shares* others with the remaining edges to the same child. Two edges
conflict when one needs what the other does not share. The values are those of QEMU's lock bytes, so an image lock
(protocols/file) is the same bits written into byte ranges.
"""

from __future__ import annotations

import enum


class Perm(enum.IntFlag):
    """What an edge may do with its child."""

    CONSISTENT_READ = 1  #: read, and see data that makes sense as a disk
    WRITE = 2  #: change visible data
    WRITE_UNCHANGED = 4  #: write what is already visible (copy on read, stream)
    RESIZE = 8  #: change the size, or write past the end

    @property
    def words(self) -> str:
        """The names as users know them: "consistent-read, write"."""
        return ", ".join(p.name.lower().replace("_", "-") for p in Perm if p in self and p.name) or "nothing"


ALL = Perm.CONSISTENT_READ | Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE
NONE = Perm(0)


class Role(enum.IntFlag):
    """Why a node has a child. FILTERED excludes the others; at most one FILTERED, one COW, one PRIMARY per node."""

    DATA = 1  #: guest data lie in it
    METADATA = 2  #: the node's own tables lie in it
    FILTERED = 4  #: the node shows exactly this child's bytes
    COW = 8  #: unallocated ranges are read from it
    PRIMARY = 16  #: the child that names the disk


def filtered_child(need: Perm, share: Perm) -> tuple[Perm, Perm]:
    """A filter passes through what its parents need and share."""
    return need, share


def cow_child(need: Perm, share: Perm) -> tuple[Perm, Perm]:
    """A backing child is only read; others may write it only where our parents accept changing data."""
    writable = Perm.WRITE | Perm.RESIZE
    keep = ALL & ~writable
    return need & Perm.CONSISTENT_READ, keep | (share & writable if share & Perm.WRITE else NONE)


def storage_child(need: Perm, share: Perm, role: Role, writable: bool) -> tuple[Perm, Perm]:
    """A child that holds a format's data or metadata.

    Args:
        writable: the format node is not read-only: it may have to update its tables even with no writing parent.
    """
    if role & Role.METADATA:
        if writable:
            need |= Perm.WRITE | Perm.RESIZE
        need |= Perm.CONSISTENT_READ
        share &= ~(Perm.WRITE | Perm.RESIZE)
    if role & Role.DATA:
        if need & Perm.WRITE_UNCHANGED:
            need |= Perm.WRITE
        if need & Perm.WRITE and writable:
            need |= Perm.RESIZE
        share &= ~Perm.RESIZE
    return need, share
