# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""An NBD server over disks in memory, and programs run against it."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

from blockgraph.exports.nbd import NbdExport, NbdServer
from blockgraph.native import Bitmap
from blockgraph.native.nbd_loop import NbdStats
from blockgraph.testing.memory_backend import MemoryBackend, MemoryMap
from blockgraph.testing.nbd_client import NbdClient, NbdWire

SIZE = 1 << 20
#: Ways to serve a connection: native threads that find nothing mapped, Python's thread in native code, Python alone.
SERVED_BY = ("thread", "caller", "python")
#: The one that `serving` uses unless told otherwise; see tests/exports/conftest.py.
served_by = "thread"
P = ParamSpec("P")


def run_async(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test; fails when it leaves tasks or readers of the loop behind."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(_checked(test(*args, **kwargs)))

    return run


async def _checked(test: Coroutine[Any, Any, None]) -> None:
    loop = asyncio.get_running_loop()
    trouble: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: trouble.append(context))
    await test
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks left behind: {left}"
    assert not trouble, f"exceptions in callbacks: {trouble}"


@dataclass
class Served:
    """A server with one export, 'disk'."""

    server: NbdServer
    disk: MemoryBackend
    path: str

    async def client(self, export: str = "disk", **how: Any) -> NbdClient:
        """A client in the transmission phase."""
        return await NbdClient.connect_unix(self.path, export, **how)

    async def wire(self) -> NbdWire:
        """A connection on which nothing was said yet."""
        return await NbdWire.unix(self.path)

    async def greeted(self) -> NbdWire:
        """A connection that may send options."""
        wire = await self.wire()
        await wire.greet()
        return wire

    def stats(self) -> NbdStats:
        """Counters of the native loop."""
        native = self.server._native
        assert native is not None
        return native.stats

    async def counted(self, **least: int) -> NbdStats:
        """The counters, once they are at least so high: a reply may arrive before it is counted."""
        async with asyncio.timeout(20):
            while any(getattr(self.stats(), name) < value for name, value in least.items()):  # noqa: ASYNC110
                await asyncio.sleep(0)
        return self.stats()

    async def idle(self) -> None:
        """Until the server has no connection left."""
        while self.server.connections:  # noqa: ASYNC110  # the server announces it to nobody
            await asyncio.sleep(0)

    def uri(self, export: str = "disk") -> str:
        """For libnbd's tools and qemu."""
        return self.server.uri(export)


async def raw_client(served: Served, **how: Any) -> NbdClient:
    """A client whose replies the test reads itself."""
    client = await served.client(**how)
    await leave_replies(client)
    return client


async def leave_replies(client: NbdClient) -> None:
    """The test reads the client's replies itself from now on."""
    assert client._task is not None
    client._task.cancel()
    await asyncio.wait([client._task])


@asynccontextmanager
async def serving(
    disk: MemoryBackend | None = None,
    *,
    writable: bool = True,
    size: int = SIZE,
    tcp: bool = False,
    bitmaps: Mapping[str, Bitmap] | None = None,
    allocation_depth: bool = False,
    **server_args: Any,
) -> AsyncIterator[Served]:
    """A server at a unix socket (or a TCP port of this machine), closed at the end."""
    disk = disk or MemoryBackend(size)
    if served_by == "thread" and disk.map is None:
        disk.map = MemoryMap(disk.size())
    server = NbdServer(threads=server_args.pop("threads", 0 if served_by == "python" else 2), **server_args)
    with tempfile.TemporaryDirectory(prefix="nbd") as directory:
        path = str(Path(directory) / "s")
        await (server.listen_tcp("127.0.0.1", 0) if tcp else server.listen_unix(path))
        server.add_export(
            NbdExport(
                "disk",
                disk.as_backend(),
                description="a test disk",
                writable=writable,
                bitmaps=bitmaps,
                allocation_depth=allocation_depth,
            )
        )
        try:
            yield Served(server, disk, path)
        finally:
            await server.close()


async def run_tool(program: str, *args: str, ok: bool = True, env: dict[str, str] | None = None) -> str:
    """Run a program while the loop goes on; its output. `ok`: it must succeed, or must fail."""
    process = await asyncio.create_subprocess_exec(
        program, *args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env
    )
    output = (await process.communicate())[0].decode()
    assert (process.returncode == 0) is ok, f"{program} {' '.join(args)}: exit {process.returncode}\n{output}"
    return output
