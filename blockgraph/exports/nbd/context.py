# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Metadata contexts: what NBD_CMD_BLOCK_STATUS can tell about ranges."""

from __future__ import annotations

from typing import Protocol

from blockgraph.backend import Backend
from blockgraph.exports.nbd.protocol import STATE_HOLE, STATE_ZERO
from blockgraph.extent import BlockStatus

#: Questions to the graph for one request, and so the most descriptors of a reply. The protocol lets a server answer
#: for less than was asked.
MAX_QUESTIONS = 2048


class MetaContext(Protocol):
    """One kind of knowledge about ranges."""

    name: str

    async def extents(self, backend: Backend, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """(length, flags) of consecutive ranges from `offset`, inside [offset, offset + length).

        At least one, at most `limit`; neighbours differ; lengths in bytes.

        Raises: what Backend.block_status raises.
        """
        ...


class BaseAllocation:
    """base:allocation: where a hole is, and what reads as zeroes."""

    name = "base:allocation"

    async def extents(self, backend: Backend, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        end = offset + length
        for _ in range(MAX_QUESTIONS):
            status = await backend.block_status(offset, end - offset)
            flags = _flags(status)
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


def _flags(status: BlockStatus) -> int:
    return (0 if status.data else STATE_HOLE) | (STATE_ZERO if status.zero else 0)


def align_extents(extents: list[tuple[int, int]], alignment: int) -> list[tuple[int, int]]:
    """Lengths rounded to multiples of `alignment`; a block of mixed status gets flags 0, which claims nothing.

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
            _append(aligned, alignment, 0)
            surplus = alignment - rest
    return aligned


def _append(extents: list[tuple[int, int]], length: int, flags: int) -> None:
    if extents and extents[-1][1] == flags:
        extents[-1] = (extents[-1][0] + length, flags)
    else:
        extents.append((length, flags))


CONTEXTS: tuple[MetaContext, ...] = (BaseAllocation(),)
