# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Checks of requests that run together, and of cancelled ones."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

from blockgraph.node import Node
from blockgraph.testing.checks.subject import DIRT, Subject, Violation, check, first_foreign

#: For translate: another byte that is not zero.
_NEXT = bytes(byte % 255 + 1 for byte in range(256))
#: Turns of the event loop after which a request is cancelled.
_TURNS = (0, 1, 2, 3, 4, 5, 8, 13, 21, 34)


@check(writes=True)
async def check_neighbours_together(subject: Subject) -> None:
    """Writes to neighbouring ranges at once all land, also where they share a sector or a cluster."""
    await subject.load()
    for piece, count in ((37, 64), (512, 32), (4096 + 1, 16)):
        start = min(300, subject.size - 1)
        cuts = list(range(start, min(start + piece * count, subject.size), piece))
        subject.rng.shuffle(cuts)
        parts = [(at, subject.fill(min(piece, subject.size - at))) for at in cuts]
        await asyncio.gather(*(subject.write(at, data) for at, data in parts))
        await subject.expect_all(f"{len(parts)} writes of {piece} bytes at once, side by side")


@check(writes=True)
async def check_kinds_together(subject: Subject) -> None:
    """Writes, write-zeroes, discards, reads and flushes of separate ranges do not disturb each other."""
    await subject.load()
    await subject.write(0, subject.fill(subject.size))
    slot = max(1, subject.size // 16)
    for _ in range(4):
        requests: list[Coroutine[Any, Any, object]] = []
        for offset in range(0, subject.size - slot + 1, slot):
            length = subject.rng.randrange(1, slot + 1)
            at = offset + subject.rng.randrange(slot - length + 1)
            kind = subject.rng.randrange(5)
            if kind == 0:
                requests.append(subject.write(at, subject.fill(length)))
            elif kind == 1:
                requests.append(subject.zero(at, length))
            elif kind == 2:
                requests.append(subject.discard(at, length))
            elif kind == 3:
                requests.append(subject.expect(at, length, f"read of {length} bytes at {at} beside writes"))
            else:
                requests.append(subject.backend.flush())
        await asyncio.gather(*requests)
        await subject.expect_all("different requests at once to separate ranges")


@check(writes=True)
async def check_overlapping(subject: Subject) -> None:
    """After overlapping writes at once, each byte is that of one of them; a read meanwhile sees old or new bytes."""
    await subject.load()
    await subject.write(0, subject.fill(subject.size))
    for offset, length in ((0, 512), (100, 5000), (4000, 70000)):
        if offset + length > subject.size:
            continue
        # Each writer's bytes differ from the others' at every place.
        base = subject.fill(length)
        writers = [base]
        for _ in range(3):
            writers.append(writers[-1].translate(_NEXT))
        old = bytes(subject.model[offset : offset + length])
        results = await asyncio.gather(
            *(subject.backend.pwrite(offset, data) for data in writers), subject.read(offset, length)
        )
        meanwhile = results[-1]
        assert isinstance(meanwhile, bytes)
        what = f"{len(writers)} writes at once of {length} bytes at {offset}"
        _each_of(offset, meanwhile, [old, *writers], f"read during {what}")
        final = await subject.read(offset, length)
        _each_of(offset, final, writers, what)
        subject.model[offset : offset + length] = final
        await subject.expect_around(offset, length, what)


@check()
async def check_cancelled_read(subject: Subject) -> None:
    """Once a cancelled read has ended, nothing touches its buffer any more."""
    await subject.load()
    length = min(subject.size, 200_000)
    for turns in _TURNS:
        buf = bytearray([DIRT]) * length
        if not await _cancelled(subject.backend.pread_into(0, memoryview(buf)), turns):
            subject.compare(0, buf, subject.model[:length], "read that was too fast to be cancelled")
        mark = bytes([0x3C]) * length
        buf[:] = mark
        await _turn(2 * _TURNS[-1])
        await subject.expect_all(f"a read cancelled after {turns} turns of the loop")
        await _settle(subject.node)
        if buf != mark:
            raise Violation(f"a read cancelled after {turns} turns of the loop filled its buffer after it had ended")


@check(writes=True)
async def check_cancelled_write(subject: Subject) -> None:
    """A cancelled write leaves old or new bytes in its range and the rest unchanged; later writes are not undone."""
    await subject.load()
    await subject.write(0, subject.fill(subject.size))
    offset = min(300, subject.size // 3)
    length = min(subject.size - offset, 150_000)
    for turns in _TURNS:
        old = bytes(subject.model[offset : offset + length])
        new = old.translate(_NEXT)
        source = bytearray(new)
        what = f"a write of {length} bytes at {offset}, cancelled after {turns} turns of the loop"
        if not await _cancelled(subject.backend.pwrite(offset, memoryview(source)), turns):
            old = new
        source[:] = bytes(length)  # the caller's again: zeroes must not reach the disk
        await _settle(subject.node)
        found = await subject.read(offset, length)
        _each_of(offset, found, [old, new], what)
        subject.model[offset : offset + length] = found
        await _turn(2 * _TURNS[-1])
        await subject.expect_all(f"{what}, a little later")
        await subject.write(offset, subject.fill(length))
        await _turn(2 * _TURNS[-1])
        await subject.expect_all(f"a write after {what}")


async def _cancelled(request: Coroutine[Any, Any, object], turns: int) -> bool:
    """Start the request, cancel it after some turns of the loop and wait for its end. False: it had ended before."""
    task = asyncio.ensure_future(request)
    await _turn(turns)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False


async def _turn(times: int) -> None:
    """Let everything else that is ready run."""
    for _ in range(times):
        await asyncio.sleep(0)


async def _settle(node: Node) -> None:
    """Until nothing is in flight on the node and below it."""
    for each in _below(node):
        await each.wait_idle()


def _below(node: Node) -> Iterable[Node]:
    seen: dict[int, Node] = {}
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if id(each) not in seen:
            seen[id(each)] = each
            waiting += [child.node for child in each.children.values()]
    return seen.values()


def _each_of(offset: int, found: bytes, allowed: list[bytes], what: str) -> None:
    at = first_foreign(found, allowed)
    if at is not None:
        raise Violation(f"{what}: byte {offset + at} is {found[at]:#04x}, which nobody wrote")
