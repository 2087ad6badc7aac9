# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""delay: a filter that makes its child slow.

Simulates a remote or tired disk: each request waits, then goes on to the child. Requests wait side by side, so a delay
costs latency, not bandwidth.

        guest --> delay --(after N ms)--> disk

Options; the times in milliseconds, 0 (nothing happens) when omitted:

    file         the node that is slowed down
    read-ms      reads
    write-ms     writes
    zero-ms      write-zeroes
    trim-ms      discards
    flush-ms     flushes
    extents-ms   block status
    open-ms      opening the node
    close-ms     closing it

Example:

    [[nodes]]
    node-name = "slow"
    driver = "delay"
    file = "disk"
    read-ms = 10
    write-ms = 30

All of them can be changed by a reopen. Without read-ms (without write-ms) the bytes stay readable (writable) past the
filter, at full speed.

Limits: a request waits before it reaches the child, never after; a drain waits for waiting requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, ClassVar

import msgspec

from blockgraph.driver import Filter
from blockgraph.extent import BlockStatus
from blockgraph.flags import Flag
from blockgraph.options import NodeOptions, NodeRef

#: An hour: longer is a mistake.
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=3_600_000)]


class DelayOptions(NodeOptions, kw_only=True, frozen=True):
    """See the module's text."""

    file: NodeRef
    read_ms: Milliseconds = 0
    write_ms: Milliseconds = 0
    zero_ms: Milliseconds = 0
    trim_ms: Milliseconds = 0
    flush_ms: Milliseconds = 0
    extents_ms: Milliseconds = 0
    open_ms: Milliseconds = 0
    close_ms: Milliseconds = 0


class Delay(Filter):
    """See the module's text."""

    name = "delay"
    Options = DelayOptions
    options: DelayOptions

    #: how to wait, seconds; a test puts its own clock here
    sleep: ClassVar[Callable[[float], Awaitable[None]]] = asyncio.sleep

    async def _wait(self, ms: int) -> None:
        if ms:
            await type(self).sleep(ms / 1000)

    async def open(self) -> None:
        await self._wait(self.options.open_ms)

    async def close(self) -> None:
        await self._wait(self.options.close_ms)

    def reopen_check(self, options: NodeOptions) -> None:
        """Everything may change."""

    @property
    def intercepts_reads(self) -> bool:
        return self.options.read_ms > 0

    @property
    def intercepts_writes(self) -> bool:
        return self.options.write_ms > 0

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        await self._wait(self.options.extents_ms)
        return await super().block_status(offset, length)

    async def pread(self, offset: int, buf: memoryview) -> None:
        await self._wait(self.options.read_ms)
        await super().pread(offset, buf)

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        await self._wait(self.options.write_ms)
        await super().pwrite(offset, buf, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        await self._wait(self.options.zero_ms)
        await super().pwrite_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self._wait(self.options.trim_ms)
        await super().discard(offset, length)

    async def flush(self) -> None:
        await self._wait(self.options.flush_ms)
        await super().flush()
