# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The one question of the data path, *where do the bytes of this range live?*, and its answers.

`Extent` is the answer of one node (`Driver.map`): it points into a child, or at the node's own storage.
`BlockStatus` is the answer about contents (`block_status`): does a range read as zeroes, and at which depth.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from blockgraph.native import Copier
    from blockgraph.node import Child, Node


class Status(enum.IntEnum):
    """What an extent is."""

    DATA = 0  #: the bytes are at (child, child_offset); child None: in the node's own storage
    ZERO = 1  #: reads as zeroes, without asking anybody
    UNALLOCATED = 2  #: the COW child knows; without one, or past its end, zeroes
    SPECIAL = 3  #: only this node's pread/pwrite can serve it (compressed, intercepted, computed)


class Extent(NamedTuple):
    """Where a range of one node lives.

    Attributes:
        offset, length: the range in the node, bytes; length > 0.
        status: see Status.
        child: the edge the bytes lie behind; None with status DATA means the node's own storage.
        child_offset: where in the child (or the storage) `offset` is; meaningful with DATA, and with ZERO where the
            node has preallocated room.
        writable: the range may be overwritten in place there, without asking the node again.
        copier: where the range is not `writable`, native writes may still overwrite it once this has copied it.
        allocate: of what is not DATA: a first write may be left to the node's `Driver.first_writes`.
    """

    offset: int
    length: int
    status: Status
    child: Child | None = None
    child_offset: int = 0
    writable: bool = False
    copier: Copier | None = None
    allocate: bool = False

    def clip(self, offset: int, length: int) -> Extent:
        """The part of this extent inside [offset, offset + length), which must overlap it."""
        start = max(self.offset, offset)
        end = min(self.offset + self.length, offset + length)
        assert start < end
        return self._replace(offset=start, length=end - start, child_offset=self.child_offset + start - self.offset)


class BlockStatus(NamedTuple):
    """What a range contains, seen from the node that was asked.

    Attributes:
        offset, length: the range, bytes; length > 0.
        data: it has storage of its own somewhere (NBD: not a hole).
        zero: it is known to read as zeroes.
        depth: how many COW steps down the answer was found; -1: allocated nowhere (zeroes).
        node: the node of that depth, None with depth -1.
        host: node holding the bytes and offset in it, where they lie uncompressed in one place.
        host_offset: see host.
    """

    offset: int
    length: int
    data: bool
    zero: bool
    depth: int = 0
    node: Node | None = None
    host: Node | None = None
    host_offset: int | None = None
