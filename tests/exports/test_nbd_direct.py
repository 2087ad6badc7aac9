# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""An export of an image opened with cache.direct: aligned requests are at the device while the loop goes on, and never
reach Python; whatever ends in the middle of them leaves whole writes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import blockgraph
from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.create import create_file
from blockgraph.exports.nbd import NbdExport, NbdServer
from blockgraph.testing.nbd_client import NbdClient
from tests.helpers.nbd import run_async

PAGE = 4096
CLUSTER = 64 << 10
SIZE = 4 << 20
formats = pytest.mark.parametrize("fmt", ["raw", "qcow2"])


class Exported(NamedTuple):
    graph: AsyncGraph
    guest: Backend
    server: NbdServer
    socket: str

    def counts(self) -> tuple[int, int, int]:
        """Hits, of these those that had to wait, and faults."""
        found = self.server.stats
        assert found is not None
        return found.hits, found.blocked, found.faults


@asynccontextmanager
async def exported(path: Path, fmt: str) -> AsyncIterator[Exported]:
    """A new disk full of b"o", all of it mapped."""
    image = path / "disk"
    await create_file(str(image), SIZE, fmt, replace=False)
    node = {
        "driver": fmt,
        "node-name": "disk",
        "file": {"driver": "file", "filename": str(image), "cache": {"direct": True}},
    }
    async with await blockgraph.aopen({"nodes": [node]}) as graph:
        guest = await graph.backend("disk", writable=True)
        guest.use_map()
        for offset in range(0, SIZE, 1 << 20):
            await guest.pwrite(offset, b"o" * (1 << 20))
        await guest.pread(0, SIZE)
        server = NbdServer(threads=1)
        await server.listen_unix(str(path / "socket"))
        server.add_export(NbdExport("disk", guest, writable=True))
        yield Exported(graph, guest, server, str(path / "socket"))
        await server.close()


@formats
@run_async
async def test_many_aligned_requests_at_once_never_reach_python(tmp_path: Path, fmt: str) -> None:
    async with exported(tmp_path, fmt) as disk:
        model = bytearray(b"o" * SIZE)
        clients = [await NbdClient.connect_unix(disk.socket, "disk") for _ in range(2)]
        source = random.Random(fmt)
        hits, blocked, faults = disk.counts()
        for _ in range(4):
            places = source.sample(range(SIZE // PAGE), 96)
            writes = {at * PAGE: source.randbytes(PAGE) for at in places[:48]}
            reads = [at * PAGE for at in places[48:]]
            answers = await asyncio.gather(
                *(clients[at % 2].pwrite(offset, data) for at, (offset, data) in enumerate(writes.items())),
                *(clients[at % 2].pread(offset, PAGE) for at, offset in enumerate(reads)),
            )
            assert answers[48:] == [model[offset : offset + PAGE] for offset in reads]
            for offset, data in writes.items():
                model[offset : offset + PAGE] = data
        for length in (CLUSTER, 5 * CLUSTER, 2 << 20):  # of which the last is not for the loop, but for its pool
            data = source.randbytes(length)
            await clients[0].pwrite(PAGE, data)
            model[PAGE : PAGE + length] = data
            assert await clients[1].pread(0, length + 2 * PAGE) == model[: length + 2 * PAGE]
        assert disk.counts() == (hits + 390, blocked + 390, faults)
        # Others are Python's, and the rest of their blocks stays.
        await asyncio.gather(*(clients[0].pwrite(at * PAGE + 100, b"part") for at in range(20)))
        for at in range(20):
            model[at * PAGE + 100 : at * PAGE + 104] = b"part"
        assert disk.counts()[2] == faults + 20
        assert await clients[0].pread(0, SIZE) == model
        for client in clients:
            await client.disconnect()


def whole(disk: bytes, unit: int, kinds: bytes) -> None:
    """Every write of a unit is there, or not."""
    for at in range(0, len(disk), unit):
        block = disk[at : at + unit]
        assert block == block[:1] * unit
        assert block[0] in kinds


async def interrupted(disk: Exported, image: Path, unit: int, kinds: bytes) -> None:
    """Writes of a unit each, among which a drain comes, which waits for them, clients leave, or the server is closed.

    Args:
        image: the disk's file.
        kinds: what the disk is full of, a byte each.
    """
    for number in range(1, 9):
        kinds += bytes([number])
        client = await NbdClient.connect_unix(disk.socket, "disk")
        data = bytes([number]) * unit
        writes = [asyncio.ensure_future(client.pwrite(at * unit, data)) for at in range(64)]
        await client.pread(0, PAGE)
        if number % 3 == 0:
            async with disk.graph.drained():
                before = await asyncio.to_thread(image.read_bytes)
                await asyncio.sleep(0.01)
                assert await asyncio.to_thread(image.read_bytes) == before
            await asyncio.gather(*writes)
            kinds = bytes([number])
            await client.disconnect()
        else:
            if number == 8:
                await disk.server.close()
            await client.abort()
        await asyncio.gather(*writes, return_exceptions=True)
        while disk.server.connections:  # noqa: ASYNC110  # the server announces it to nobody
            await asyncio.sleep(0)
        whole(await disk.guest.pread(0, 64 * unit), unit, kinds)


@formats
@run_async
async def test_what_ends_among_requests_at_the_device_leaves_whole_writes(tmp_path: Path, fmt: str) -> None:
    async with exported(tmp_path, fmt) as disk:
        await interrupted(disk, tmp_path / "disk", 4 * PAGE, b"o")
