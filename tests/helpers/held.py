# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A memory node whose requests are written down, let others run, and can be held or failed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from blockgraph.errors import IOFailure
from blockgraph.flags import Flag
from blockgraph.protocols.memory import Memory


class Call(NamedTuple):
    """A request that reached the driver."""

    op: str
    offset: int
    length: int


class Held:
    """Requests that wait for `release`."""

    def __init__(self, wanted: Callable[[Call], bool]) -> None:
        self.wanted = wanted
        self.arrived = asyncio.Event()
        self._go = asyncio.Event()

    async def stop(self) -> None:
        """Wait here."""
        self.arrived.set()
        await self._go.wait()

    def release(self) -> None:
        """Let go of all requests."""
        self._go.set()


class HeldMemory(Memory):
    """See the module's text.

    Attributes:
        calls: every request, in the order in which they came.
        fail: requests that fail.
    """

    name = "held-memory"

    async def open(self) -> None:
        await super().open()
        self.calls: list[Call] = []
        self.fail: Callable[[Call], bool] = lambda call: False
        self._holds: list[Held] = []

    @contextmanager
    def hold(self, wanted: Callable[[Call], bool]) -> Iterator[Held]:
        """Hold requests of this kind inside the block."""
        held = Held(wanted)
        self._holds.append(held)
        try:
            yield held
        finally:
            self._holds.remove(held)
            held.release()

    async def _note(self, op: str, offset: int = 0, length: int = 0) -> None:
        call = Call(op, offset, length)
        self.calls.append(call)
        await asyncio.sleep(0)  # a real disk would let others run, too
        for held in list(self._holds):
            if held.wanted(call):
                await held.stop()
        if self.fail(call):
            raise IOFailure("planned", node=self.node.name, op=op, offset=offset, length=length)

    async def pread(self, offset: int, buf: memoryview) -> None:
        await self._note("pread", offset, len(buf))
        await super().pread(offset, buf)

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        await self._note("pwrite", offset, len(buf))
        await super().pwrite(offset, buf, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self._note("discard", offset, length)
        await super().discard(offset, length)

    async def flush(self) -> None:
        await self._note("flush")
        await super().flush()
