# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Metadata contexts: what NBD_CMD_BLOCK_STATUS can tell about ranges.

Source: NBD proto.md, "Metadata querying"; QEMU docs/interop/nbd.txt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from blockgraph.backend import Backend
from blockgraph.exports.nbd.protocol import STATE_DIRTY, STATE_HOLE, STATE_ZERO
from blockgraph.extent import BlockStatus

if TYPE_CHECKING:
    from blockgraph.native import Bitmap

#: What the names of all dirty bitmaps begin with.
DIRTY_BITMAP = "qemu:dirty-bitmap:"

#: Questions to the graph for one request, and so the most descriptors of a reply. The protocol lets a server answer
#: for less than was asked.
MAX_QUESTIONS = 2048


class MetaContext(Protocol):
    """One kind of knowledge about ranges.

    Attributes:
        name: as clients ask for it.
        mixed: flags of a block whose bytes differ: those that claim nothing.
    """

    name: str
    mixed: int

    async def extents(self, backend: Backend, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """(length, flags) of consecutive ranges from `offset`, inside [offset, offset + length).

        At least one, at most `limit`; neighbours differ; lengths in bytes.

        Raises: what Backend.block_status raises.
        """
        ...


class _FromStatus:
    """What follows from block status."""

    def flags(self, status: BlockStatus) -> int:
        """Of the range."""
        raise NotImplementedError

    async def extents(self, backend: Backend, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        end = offset + length
        for _ in range(MAX_QUESTIONS):
            status = await backend.block_status(offset, end - offset)
            flags = self.flags(status)
            if found and found[-1][1] == flags:
                found[-1] = (found[-1][0] + status.length, flags)
            elif len(found) == limit:
                break
            else:
                found.append((status.length, flags))
            offset += status.length
            if offset >= end:
                break
        return found


class BaseAllocation(_FromStatus):
    """base:allocation: where a hole is, and what reads as zeroes."""

    name = "base:allocation"
    mixed = 0

    def flags(self, status: BlockStatus) -> int:
        return (0 if status.data else STATE_HOLE) | (STATE_ZERO if status.zero else 0)


class AllocationDepth(_FromStatus):
    """qemu:allocation-depth: the layer of a backing chain that has the bytes.

    Flags are a number: 0 no layer, 1 the top one, 2 its backing file, and so on.
    """

    name = "qemu:allocation-depth"
    mixed = 1

    def flags(self, status: BlockStatus) -> int:
        return status.depth + 1


class DirtyBitmapContext:
    """qemu:dirty-bitmap:NAME: what a bitmap held at one instant.

    Args:
        name: of the bitmap.
        bits: of a disk as large as the export; never changes.
    """

    mixed = STATE_DIRTY

    def __init__(self, name: str, bits: Bitmap) -> None:
        self.name = f"{DIRTY_BITMAP}{name}"
        self._bits = bits

    async def extents(self, backend: Backend, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        end = offset + length
        while offset < end and len(found) < limit:
            start, dirty = self._bits.next_dirty(offset, end) or (end, 0)
            if start > offset:
                found.append((start - offset, 0))
            if dirty and len(found) < limit:
                found.append((dirty, STATE_DIRTY))
            offset = start + dirty
        return found


def align_extents(extents: list[tuple[int, int]], alignment: int, mixed: int) -> list[tuple[int, int]]:
    """Lengths rounded to multiples of `alignment`; a block in which several extents meet gets the flags `mixed`.

    The extents start aligned; what they cover in total grows to the next multiple.
    """
    aligned: list[tuple[int, int]] = []
    surplus = 0  # bytes of the next extent that the last block has taken already
    for length, flags in extents:
        if length <= surplus:
            surplus -= length
            continue
        whole = (length - surplus) - (length - surplus) % alignment
        rest = length - surplus - whole
        if whole:
            _append(aligned, whole, flags)
        surplus = 0
        if rest:
            _append(aligned, alignment, mixed)
            surplus = alignment - rest
    return aligned


def _append(extents: list[tuple[int, int]], length: int, flags: int) -> None:
    if extents and extents[-1][1] == flags:
        extents[-1] = (extents[-1][0] + length, flags)
    else:
        extents.append((length, flags))


def wildcards(context: MetaContext) -> tuple[str, ...]:
    """The queries that list a context among others: its namespace, and what QEMU's dirty bitmaps have in common."""
    namespace = context.name.partition(":")[0] + ":"
    return (namespace, DIRTY_BITMAP) if context.name.startswith(DIRTY_BITMAP) else (namespace,)
