# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""RangeLock: overlapping requests of a filter one after the other, all others at once.

A node lets ordinary overlapping requests run together. A filter that does two things per request (log-writes: write and
log; verify: write here and there) needs both in the same order.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class _Held:
    __slots__ = ("end", "exclusive", "released", "start")

    def __init__(self, start: int, end: int, exclusive: bool) -> None:
        self.start = start
        self.end = end
        self.exclusive = exclusive
        self.released = asyncio.Event()


class RangeLock:
    """Locks on byte ranges, granted in the order they were asked for, shared or exclusive."""

    def __init__(self) -> None:
        self._held: list[_Held] = []

    @asynccontextmanager
    async def hold(self, offset: int, length: int, *, exclusive: bool = True) -> AsyncIterator[None]:
        """Hold [offset, offset + length) inside the block; exclusively, or shared with other shared holders.

        Waits only for those who asked earlier, so there is no deadlock as long as a holder takes no second range.
        Cancelled: nothing is held.
        """
        mine = _Held(offset, offset + length, exclusive)
        earlier = [
            other
            for other in self._held
            if (exclusive or other.exclusive) and other.start < mine.end and mine.start < other.end
        ]
        self._held.append(mine)
        try:
            for other in earlier:
                await other.released.wait()
            yield
        finally:
            self._held.remove(mine)
            mine.released.set()
