# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Requests of which Python only looks up the place: each is done and answered once, whatever comes between."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.fragmented import fragmented
from helpers.loop import graph_of

from blockgraph.backend import Backend
from blockgraph.errors import BlockGraphError, IOFailure
from blockgraph.exports.nbd import NbdExport, NbdServer
from blockgraph.formats.qcow2.mapping import Mapping
from blockgraph.testing.nbd_client import NbdClient
from tests.helpers.mapped_disk import MappedDisk
from tests.helpers.nbd import Served, run_async, serving

MIB = 1 << 20


@asynccontextmanager
async def serving_scattered(**how: Any) -> AsyncIterator[tuple[Served, MappedDisk]]:
    """A disk whose reads are all looked up."""
    disk = MappedDisk(4 * MIB)
    disk.data[:] = random.Random(3).randbytes(4 * MIB)
    disk.scattered = True
    async with serving(disk, threads=2) as served:
        yield served, disk
    disk.close()


def ops(disk: MappedDisk) -> list[str]:
    return [call.op for call in disk.calls]


@pytest.mark.parametrize("length", [1, 4096, 64 << 10, 300_000, MIB])
@run_async
async def test_read_is_looked_up_and_done_natively(length: int) -> None:
    async with serving_scattered() as (served, disk), await served.client() as client:
        assert await client.pread(777, length) == disk.data[777 : 777 + length]
        assert ops(disk) == ["look_up"]
        served_now = await served.counted(hits=1)
        assert (served_now.requests, served_now.hits, served_now.faults) == (1, 1, 0)
        assert await client.pread(777, length) == disk.data[777 : 777 + length]
        assert ops(disk) == ["look_up"]


@run_async
async def test_what_the_look_up_did_not_find_is_read_by_python_once() -> None:
    async with serving_scattered() as (served, disk), await served.client() as client:
        disk.tells = False
        reads = [client.pread(at, 4096) for at in range(0, MIB, 4096)]
        assert b"".join(await asyncio.gather(*reads)) == disk.data[:MIB]
        assert ops(disk).count("look_up") == ops(disk).count("pread") == 256
        assert ((await served.counted(faults=256)).hits, served.stats().faults) == (0, 256)


@run_async
async def test_failing_look_up_is_not_the_clients_concern() -> None:
    async with serving_scattered() as (served, disk), await served.client() as client:
        disk.errors["look_up"] = IOFailure("bad table", node="disk", errno=errno.EIO)
        assert await client.pread(0, 4096) == disk.data[:4096]
        assert ops(disk) == ["look_up", "pread"]
        disk.errors["pread"] = IOFailure("bad sector", node="disk", errno=errno.EIO)
        with pytest.raises(IOFailure):
            await client.pread(4096, 4096)
        assert ops(disk) == ["look_up", "pread"] * 2


@pytest.mark.parametrize("length", [1, 4096, 64 << 10, 300_000, MIB])
@run_async
async def test_write_is_looked_up_and_done_natively(length: int) -> None:
    async with serving_scattered() as (served, disk), await served.client() as client:
        data = random.Random(length).randbytes(length)
        await client.pwrite(777, data)
        assert disk.data[777 : 777 + length] == data
        assert ops(disk) == ["look_up"]
        served_now = await served.counted(hits=1)
        assert (served_now.requests, served_now.hits, served_now.faults) == (1, 1, 0)


@run_async
async def test_write_to_what_was_looked_up_but_may_only_be_read_is_done_by_python_once() -> None:
    async with serving_scattered() as (served, disk), await served.client() as client:
        disk.tells = False
        disk.reveal(0, MIB, writable=False)
        await asyncio.gather(*(client.pwrite(at, at.to_bytes(4) * 128) for at in range(0, MIB, 4096)))
        assert ops(disk).count("look_up") == ops(disk).count("pwrite") == 256
        assert all(disk.data[at : at + 512] == at.to_bytes(4) * 128 for at in range(0, MIB, 4096))
        assert ((await served.counted(faults=256)).hits, served.stats().faults) == (0, 256)


@run_async
async def test_other_requests_are_not_looked_up() -> None:
    async with serving_scattered() as (served, disk), await served.client() as client:
        await client.flush()
        await client.pwrite(0, b"x" * 512, fua=True)
        await client.trim(4096, 4096)
        await client.block_status(0, 8192)
        assert "look_up" not in ops(disk)


@run_async
async def test_requests_during_a_look_up_go_on() -> None:
    async with serving_scattered() as (served, disk), await served.client() as client:
        disk.reveal(8192, 4096)
        with disk.hold("look_up") as held:
            read = asyncio.ensure_future(client.pread(0, 4096))
            await held.arrived()
            await client.pwrite(8192, b"x" * 512)
            await client.flush()
            assert not read.done()
        assert await read == disk.data[:4096]


@pytest.mark.parametrize("tells", [True, False])
@run_async
async def test_client_that_is_gone_before_its_read_was_looked_up(tells: bool) -> None:
    async with serving_scattered() as (served, disk):
        disk.tells = tells
        client = await served.client()
        with disk.hold("look_up") as held:
            reads = [asyncio.ensure_future(client.pread(at, 4096)) for at in range(0, 1 << 16, 4096)]
            await held.arrived()
            await client.abort()
        for read in reads:
            with pytest.raises((BlockGraphError, ConnectionError)):
                await read
        await served.idle()
        async with await served.client() as other:
            assert await other.pread(0, 4096) == disk.data[:4096]


@asynccontextmanager
async def looking_up(**server_args: Any) -> AsyncIterator[tuple[Served, MappedDisk, asyncio.Future[bytes]]]:
    """A read that is being looked up until the block ends, which will find nothing."""
    disk = MappedDisk(MIB)
    disk.scattered, disk.tells = True, False
    async with serving(disk, threads=2, **server_args) as served:
        client = await served.client()
        with disk.hold("look_up") as held:
            read = asyncio.ensure_future(client.pread(0, 4096))
            await held.arrived()
            yield served, disk, read
        await client.abort()
    disk.close()


@run_async
async def test_server_that_closes_too_late_for_a_look_up_cancels_it() -> None:
    async with looking_up(close_timeout=0.05) as (served, disk, read):
        await served.server.close()
        with pytest.raises((BlockGraphError, ConnectionError)):
            await read
        assert ops(disk) == ["look_up"]


@run_async
async def test_hard_removal_cancels_a_look_up_and_what_would_come_of_it() -> None:
    async with looking_up(close_timeout=0.05) as (served, disk, read):
        with disk.hold("pread"):
            await served.server.remove_export("disk", hard=True)
        with pytest.raises((BlockGraphError, ConnectionError)):
            await read
        assert ops(disk) == ["look_up"]


@run_async
async def test_closing_server_lets_what_is_looked_up_end() -> None:
    async with looking_up() as (served, disk, read):
        closing = asyncio.ensure_future(served.server.close())
        await asyncio.sleep(0.05)
        disk._holds["look_up"].release()
        assert await read == bytes(4096)
        await closing
        assert ops(disk) == ["look_up", "pread"]


# A fragmented image, for whose map there is no room.

CLUSTER = 4096
CLUSTERS = 1 << 17
SIZE = CLUSTERS * CLUSTER
SMALL_MAP = 256 << 10  # half of what it takes


def content(cluster: int) -> bytes:
    """Of the first bytes of a cluster. Most are holes in the file, not to fill the disk."""
    return bytes(512) if cluster % 16 else cluster.to_bytes(8, "big") * 64


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full image in which no two neighbours of the disk are neighbours in the file."""
    path = tmp_path_factory.mktemp("scattered") / "disk.qcow2"
    return fragmented(path, SIZE, 12, {cluster: content(cluster) for cluster in range(0, CLUSTERS, 16)})


@asynccontextmanager
async def serving_image(path: Path, tmp_path: Path) -> AsyncIterator[tuple[NbdClient, Backend, NbdServer]]:
    node = {
        "driver": "qcow2",
        "node-name": "disk",
        "read-only": True,
        "l2-cache-size": 128 << 10,
        "file": {"driver": "file", "filename": str(path)},
    }
    async with graph_of(node) as graph:
        backend = await graph.backend("disk", extent_map_size=SMALL_MAP)
        backend.use_map()
        server = NbdServer(threads=2)
        server.add_export(NbdExport("disk", backend, writable=False))
        try:
            await server.listen_unix(str(tmp_path / "s"))
            async with await NbdClient.connect_unix(str(tmp_path / "s"), "disk") as client:
                yield client, backend, server
        finally:
            await server.close()


async def read_all(client: NbdClient, clusters: list[int], depth: int = 16) -> None:
    for at in range(0, len(clusters), depth):
        some = clusters[at : at + depth]
        found = await asyncio.gather(*(client.pread(cluster * CLUSTER, 512) for cluster in some))
        assert found == [content(cluster) for cluster in some]


async def fill_map(client: NbdClient, backend: Backend, rng: random.Random) -> None:
    """Until the map has no room for all that is read."""
    while backend.stats().evictions == 0:
        await read_all(client, [rng.randrange(CLUSTERS) for _ in range(512)])


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tables that were loaded, by index."""
    loaded: list[int] = []
    load = Mapping._load

    async def counted(self: Mapping, index: int, host: int) -> Any:
        loaded.append(index)
        return await load(self, index, host)

    monkeypatch.setattr(Mapping, "_load", counted)
    return loaded


def test_full_map_is_not_filled_with_what_random_reads_do_not_need(
    image: Path, tmp_path: Path, loads: list[int]
) -> None:
    rng = random.Random(11)

    async def run() -> None:
        async with serving_image(image, tmp_path) as (client, backend, server):
            await fill_map(client, backend, rng)
            await read_all(client, [rng.randrange(CLUSTERS) for _ in range(512)])
            loads.clear()
            before, native = backend.stats(), server._native.stats
            await read_all(client, [rng.randrange(CLUSTERS) for _ in range(4000)])
            after = backend.stats()
            assert after.misses - before.misses > 1000, "there is no room for all"
            assert len(loads) < 100
            assert server._native.stats.faults - native.faults < 100
            assert after.bytes <= SMALL_MAP

    asyncio.run(run())


def test_reading_on_in_a_full_map_enters_whole_tables(image: Path, tmp_path: Path, loads: list[int]) -> None:
    rng = random.Random(12)

    async def run() -> None:
        async with serving_image(image, tmp_path) as (client, backend, _):
            await fill_map(client, backend, rng)
            await read_all(client, [rng.randrange(CLUSTERS) for _ in range(2000)])
            before = backend.stats()
            first = rng.randrange(CLUSTERS - 6400)
            await read_all(client, list(range(first, first + 6400)), depth=1)
            # A table has 512 entries, of which some are looked up before it is found to be local.
            assert backend.stats().misses - before.misses < 6400 // 4

    asyncio.run(run())
