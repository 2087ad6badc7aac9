# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Checks of block status and map: what a driver says of its contents is what it shows."""

from __future__ import annotations

import os

from blockgraph.extent import BlockStatus, Extent, Status
from blockgraph.node import Child, Node
from blockgraph.perm import Perm, Role
from blockgraph.testing.checks.subject import Subject, Violation, check

#: A walk over a node in answers shorter than this on average is useless to an extent map, bytes.
_SHORTEST = 512


@check()
async def check_block_status(subject: Subject) -> None:
    """Block status covers every range without gaps, stays inside it, and is true."""
    await _scatter(subject)
    await _walk_status(subject, 0, subject.size)
    for offset, length in [*subject.ranges(), *(subject.some_range() for _ in range(40))]:
        await _judge_status(subject, offset, length)


async def _walk_status(subject: Subject, offset: int, length: int) -> None:
    end = offset + length
    steps = 0
    while offset < end:
        status = await _judge_status(subject, offset, end - offset)
        offset += status.length
        steps += 1
        if steps > offset // _SHORTEST + 8:
            raise Violation(f"block status gives {steps} answers for {offset} bytes; answer for the widest range known")


async def _judge_status(subject: Subject, offset: int, length: int) -> BlockStatus:
    status = await subject.backend.block_status(offset, length)
    asked = f"block status of {length} bytes at {offset}"
    if status.offset != offset:
        raise Violation(f"{asked} starts at {status.offset}")
    if not 0 < status.length <= length:
        raise Violation(f"{asked} has {status.length} bytes")
    expected = subject.model[offset : offset + status.length]
    if status.zero and any(expected):
        bad = next(i for i, byte in enumerate(expected) if byte)
        raise Violation(
            f"{asked} says zeroes for {status.length} bytes, but byte {offset + bad} is {expected[bad]:#04x}"
        )
    if status.depth < 0 and not status.zero:
        raise Violation(f"{asked} says allocated nowhere, but not zeroes")
    if status.host is not None and status.host_offset is not None:
        found = await _read_node(status.host, status.host_offset, status.length)
        at = f"{asked}: its host '{status.host.name}' at {status.host_offset}"
        subject.compare(offset, found, expected, at)
    return status


@check()
async def check_map(subject: Subject) -> None:
    """Following map down to storage gives the bytes that pread gives, for the whole extent that is answered."""
    await _scatter(subject)
    offset, steps = 0, 0
    while offset < subject.size:
        left = subject.size - offset
        extent = await map_node(subject.node, offset, left)
        end = min(extent.offset + extent.length, subject.size)
        if extent.status is Status.SPECIAL:
            end = min(max(end, offset + _SHORTEST), subject.size)  # whoever intercepts need not know more
        start = min(max(0, extent.offset), offset)
        found = await resolve(subject.node, start, end - start)
        subject.compare(
            start,
            found,
            subject.model[start:end],
            f"following map({offset}, {left}) = {_show(extent)}",
        )
        offset = end
        steps += 1
        if steps > offset // _SHORTEST + 8:
            raise Violation(f"map gives {steps} answers for {offset} bytes; answer with the widest extent known")
    for offset, length in [*subject.ranges(), *(subject.some_range() for _ in range(40))]:
        found = await resolve(subject.node, offset, length)
        subject.compare(offset, found, subject.model[offset : offset + length], f"following map({offset}, {length})")


@check(writes=True)
async def check_map_writable(subject: Subject) -> None:
    """What is written where a writable extent points to, is read from the node."""
    await _scatter(subject)
    for offset, length in [
        *((o, n) for o, n in subject.ranges() if n <= 4097),
        *(subject.some_range() for _ in range(20)),
    ]:
        place = await _resolve_writable(subject.node, offset, length)
        if place is None:
            continue
        child, at, run = place
        data = subject.fill(run)
        await child.pwrite(at, memoryview(data))
        subject.model[offset : offset + run] = data
        where = (
            f"write of {run} bytes at {at} of '{child.node.name}', where map({offset}, {length}) says it is writable"
        )
        await subject.expect_around(offset, run, where)


async def _scatter(subject: Subject) -> None:
    """Data, zeroes and discarded ranges side by side, where the node can be written."""
    await subject.load()
    if not subject.backend.writable:
        return
    step = max(4096, subject.size // 24)
    for number, offset in enumerate(range(0, subject.size, step)):
        length = min(step * 2 // 3 + 1, subject.size - offset)
        if number % 4 == 0:
            await subject.write(offset, subject.fill(length))
        elif number % 4 == 1:
            await subject.zero(offset, length)
        elif number % 4 == 2:
            await subject.write(offset, subject.fill(length))
            await subject.discard(offset, length)


async def map_node(node: Node, offset: int, length: int) -> Extent:
    request = await node.begin(offset, length)
    try:
        extent = await node.map(offset, length)
    finally:
        node.end(request)
    if extent.length < 1 or not extent.offset <= offset < extent.offset + extent.length:
        raise Violation(f"map({offset}, {length}) of '{node.name}' = {_show(extent)} does not contain byte {offset}")
    if extent.child is not None and extent.child.node is node:
        raise Violation(f"map({offset}, {length}) of '{node.name}' points to the node itself")
    if extent.status is Status.DATA and extent.child_offset < 0:
        raise Violation(f"map({offset}, {length}) of '{node.name}' = {_show(extent)} has a negative place")
    return extent


async def resolve(node: Node, offset: int, length: int) -> bytearray:
    """The bytes of a range, found by map alone as far as it leads."""
    found = bytearray()
    while len(found) < length:
        at = offset + len(found)
        left = length - len(found)
        if at >= node.size():
            return found + bytes(left)
        extent = (await map_node(node, at, left)).clip(at, left)
        if extent.status is Status.DATA and extent.child is not None:
            found += await resolve(extent.child.node, extent.child_offset, extent.length)
        elif extent.status is Status.DATA:
            found += await _read_storage(node, extent.child_offset, extent.length)
        elif extent.status is Status.SPECIAL:
            found += await _read_node(node, at, extent.length)
        elif extent.status is Status.UNALLOCATED and (cow := _cow(node)) is not None:
            found += await resolve(cow.node, at, extent.length)
        else:
            found += bytes(extent.length)
    return found


async def _resolve_writable(node: Node, offset: int, length: int) -> tuple[Child, int, int] | None:
    """Where `offset` may be written in place: the lowest edge, the offset there, for how many bytes; None: nowhere."""
    place: tuple[Child, int, int] | None = None
    while offset < node.size():
        extent = (await map_node(node, offset, length)).clip(offset, length)
        if not extent.writable or extent.status is not Status.DATA:
            return None
        if extent.child is None:
            return place
        if not extent.child.need & Perm.WRITE:
            raise Violation(f"map({offset}, {length}) of '{node.name}' is writable, its child may not be written")
        place = extent.child, extent.child_offset, extent.length
        node, offset, length = extent.child.node, extent.child_offset, extent.length
    return None


async def _read_node(node: Node, offset: int, length: int) -> bytearray:
    buf = bytearray(length)
    await node.pread(offset, memoryview(buf))
    return buf


async def _read_storage(node: Node, offset: int, length: int) -> bytes | bytearray:
    """From the storage itself, where a descriptor gives access to it; else the node's own pread."""
    fd = node.driver.fd()
    if fd is None or node.driver.request_alignment > 1:
        return await _read_node(node, offset, length)
    found = bytearray()
    while len(found) < length and (piece := os.pread(fd, length - len(found), offset + len(found))):
        found += piece
    return found.ljust(length, b"\0")


def _cow(node: Node) -> Child | None:
    for child in node.children.values():
        if child.role & Role.COW:
            return child
    return None


def _show(extent: Extent) -> str:
    where = f" at {extent.child_offset} of '{extent.child.node.name}'" if extent.child is not None else ""
    return f"{extent.status.name} {extent.offset}+{extent.length}{where}"
