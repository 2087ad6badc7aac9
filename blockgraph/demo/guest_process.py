# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The guest's process, seen from the scenario."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path

from blockgraph.demo.guest import Counters
from blockgraph.errors import BlockGraphError

#: A guest that does not answer for so long has died or hangs, seconds.
_PATIENCE = 60.0


class GuestProcess:
    """Talks with guest.py."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def begun(self) -> Counters:
        """Wait for its first writes."""
        return await self._hear("begun")

    async def now(self) -> Counters:
        """What it has done so far."""
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(b"\n")
            await self._process.stdin.drain()
        return await self._hear("now")

    async def watch(self, other: Awaitable[None]) -> None:
        """Wait for something else, but not longer than the guest lives.

        Raises:
            BlockGraphError: the guest died first.
        """
        work, death = asyncio.ensure_future(other), asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait({work, death}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise self._dead()
            work.result()
        finally:
            for task in (work, death):
                task.cancel()
            await asyncio.gather(work, death, return_exceptions=True)

    async def _hear(self, event: str) -> Counters:
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(_PATIENCE):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise BlockGraphError(f"the guest has said nothing for {_PATIENCE:.0f} s", op="demo") from None
        if not line:
            await self._process.wait()
            raise self._dead()
        said = json.loads(line)
        assert said.pop("event") == event
        return Counters(**said)

    def _dead(self) -> BlockGraphError:
        return BlockGraphError(
            f"the guest has died (exit status {self._process.returncode}); what it said stands above", op="demo"
        )


@asynccontextmanager
async def started(socket: Path, export: str, seed: int) -> AsyncIterator[GuestProcess]:
    """Start the guest; it has disconnected, or was killed, when the block ends."""
    command = [sys.executable, "-P", "-m", "blockgraph.demo.guest", str(socket), export, str(seed)]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=PIPE, stdout=PIPE, stderr=None, start_new_session=True
    )
    assert process.stdin is not None
    try:
        yield GuestProcess(process)
        process.stdin.close()
        async with asyncio.timeout(_PATIENCE):
            await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise BlockGraphError(f"the guest failed (exit status {process.returncode})", op="demo")
