# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A random workload, the same for the same seed, beside a bytearray."""

from __future__ import annotations

from collections import deque
from contextlib import suppress

from blockgraph.errors import Unsupported
from blockgraph.extent import Status
from blockgraph.flags import Flag
from blockgraph.testing.checks.mapping import map_node, resolve
from blockgraph.testing.checks.subject import Subject, Violation, check

_STEPS = 300
_OPS = ("write", "write", "write", "fua", "zero", "unmap", "try zero", "discard", "flush", "read", "status", "map")


@check(writes=True)
async def check_workload(subject: Subject) -> None:
    """After any sequence of requests the node reads as a bytearray to which the same was done."""
    await subject.load()
    history: deque[str] = deque(maxlen=6)
    for step in range(_STEPS):
        op = subject.rng.choice(_OPS)
        offset, length = subject.some_range()
        history.append(f"{op} {offset}+{length}")
        try:
            await _step(subject, op, offset, length)
            if step % 50 == 49:
                await subject.expect_all("the last requests")
        except Violation as error:
            raise Violation(f"step {step}: {error}; the last requests: {', '.join(history)}") from error
    await subject.expect_all(f"{_STEPS} random requests")


async def _step(subject: Subject, op: str, offset: int, length: int) -> None:
    if op in ("write", "fua"):
        await subject.write(offset, subject.fill(length), Flag.FUA if op == "fua" else Flag.NONE)
    elif op in ("zero", "unmap"):
        await subject.zero(offset, length, Flag.MAY_UNMAP if op == "unmap" else Flag.NONE)
    elif op == "try zero":
        with suppress(Unsupported):
            await subject.zero(offset, length, Flag.NO_FALLBACK)
    elif op == "discard":
        await subject.discard(offset, length)
    elif op == "flush":
        await subject.backend.flush()
    elif op == "status":
        status = await subject.backend.block_status(offset, length)
        if status.zero and any(subject.model[offset : offset + status.length]):
            raise Violation(f"block status of {length} bytes at {offset} says zeroes for data")
    elif op == "map":
        extent = (await map_node(subject.node, offset, length)).clip(offset, length)
        if extent.status is Status.ZERO and any(subject.model[offset : offset + extent.length]):
            raise Violation(f"map({offset}, {length}) says ZERO for data")
        found = await resolve(subject.node, offset, length)
        subject.compare(offset, found, subject.model[offset : offset + length], f"following map({offset}, {length})")
    await subject.expect_around(offset, length, op)
