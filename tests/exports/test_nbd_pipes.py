# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Long writes to files in memory, whose payloads go from the socket into the file through pipes, or are stored where
it is mapped: nothing else becomes of them than of others, whatever happens to client, graph and storage meanwhile."""

from __future__ import annotations

import asyncio
import random
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import blockgraph
from blockgraph.create import create_file
from blockgraph.errors import NoSpace
from blockgraph.exports.nbd import NbdExport, NbdServer
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions
from blockgraph.native.nbd_loop import NbdStats
from blockgraph.testing.nbd_client import NbdClient
from tests.exports.test_nbd_direct import Exported, interrupted, whole
from tests.helpers.limits import files_end_at
from tests.helpers.nbd import run_async

PAGE = 4096
CLUSTER = 64 << 10
SIZE = 8 << 20
formats = pytest.mark.parametrize("fmt", ["raw", "qcow2"])
ways = pytest.mark.parametrize("mapped", [False, True], ids=["piped", "stored"])


@asynccontextmanager
async def exported(path: Path, fmt: str, mapped: bool = False) -> AsyncIterator[Exported]:
    """A new disk, an image in memory, some of it mapped."""
    image = path / "disk"
    await create_file(str(image), SIZE, fmt, replace=False)
    node = {"driver": fmt, "node-name": "disk", "file": {"driver": "file", "filename": str(image), "mapped": mapped}}
    async with await blockgraph.aopen({"nodes": [node]}) as graph:
        guest = await graph.backend("disk", writable=True)
        guest.use_map()
        await guest.pwrite(0, b"o" * (SIZE // 2))
        server = NbdServer(threads=2)
        await server.listen_unix(str(path / "socket"))
        server.add_export(NbdExport("disk", guest, writable=True))
        yield Exported(graph, guest, server, str(path / "socket"))
        await server.close()


def stats(disk: Exported) -> NbdStats:
    found = disk.server.stats
    assert found is not None
    return found


def passed(disk: Exported, mapped: bool) -> int:
    """Writes that went the way that is tested."""
    return stats(disk).stored if mapped else stats(disk).piped


@formats
@ways
@run_async
async def test_many_long_writes_are_found_where_they_belong(
    tmpfs: Path, fmt: str, mapped: bool, require_tool: Callable[[str], str]
) -> None:
    """First writes to clusters, whole and in part, and others; of four connections, among short requests."""
    async with exported(tmpfs, fmt, mapped) as disk:
        model = bytearray(b"o" * (SIZE // 2) + bytes(SIZE // 2))
        clients = [await NbdClient.connect_unix(disk.socket, "disk") for _ in range(4)]
        source = random.Random(fmt)

        async def work(number: int) -> None:
            """In a quarter of the disk."""
            part = SIZE // 4
            for _ in range(40):
                writes: dict[int, bytes] = {}
                at = number * part + source.randrange(0, part // 8, 512)
                while len(writes) < 8:
                    length = source.choice([CLUSTER, CLUSTER, 2 * CLUSTER, 256 << 10, 40_000, 512])
                    at += source.choice([-at % CLUSTER, 0, 4096])
                    if at + length > (number + 1) * part:
                        break
                    writes[at] = source.randbytes(length)
                    at += length
                client = clients[number]
                durable = {offset for offset in writes if source.random() < 0.05}
                await asyncio.gather(*(client.pwrite(at, data, fua=at in durable) for at, data in writes.items()))
                for offset, data in writes.items():
                    model[offset : offset + len(data)] = data
                if source.random() < 0.2:
                    await clients[number].flush()
                offset = number * part + source.randrange(part - CLUSTER)
                assert await clients[number].pread(offset, CLUSTER) == model[offset : offset + CLUSTER]

        await asyncio.gather(*(work(number) for number in range(4)))
        assert passed(disk, mapped) > 100
        assert await disk.guest.pread(0, SIZE) == model
        for client in clients:
            await client.disconnect()
    (tmpfs / "model").write_bytes(model)
    qemu_img = require_tool("qemu-img")
    same = [qemu_img, "compare", "-f", "raw", "-F", fmt, tmpfs / "model", tmpfs / "disk"]
    await asyncio.to_thread(subprocess.run, same, check=True, capture_output=True)
    if fmt == "qcow2":
        await asyncio.to_thread(subprocess.run, [qemu_img, "check", tmpfs / "disk"], check=True, capture_output=True)


@formats
@ways
@run_async
async def test_what_ends_in_the_middle_of_long_writes_leaves_whole_writes(tmpfs: Path, fmt: str, mapped: bool) -> None:
    async with exported(tmpfs, fmt, mapped) as disk:
        await interrupted(disk, tmpfs / "disk", CLUSTER, b"o")
        assert passed(disk, mapped) > 0


@formats
@ways
@run_async
async def test_a_point_in_time_holds_while_long_writes_go_on(tmpfs: Path, fmt: str, mapped: bool) -> None:
    """backup-top put over and taken away while two clients write: each image has all of a write or nothing of it."""
    async with exported(tmpfs, fmt, mapped) as disk:
        await disk.guest.pwrite(0, b"\x01" * SIZE)
        clients = [await NbdClient.connect_unix(disk.socket, "disk") for _ in range(2)]
        over = False

        async def write(number: int) -> None:
            kind = 1
            source = random.Random(number)
            while not over:
                kind = kind % 200 + 1
                places = source.sample(range(number * SIZE // 2 // CLUSTER, (number + 1) * SIZE // 2 // CLUSTER), 8)
                await asyncio.gather(*(clients[number].pwrite(at * CLUSTER, bytes([kind]) * CLUSTER) for at in places))

        writers = [asyncio.ensure_future(write(number)) for number in range(2)]
        jobs = JobManager(disk.graph)
        for number in range(5):
            image = tmpfs / f"image{number}"
            await create_file(str(image), SIZE, "raw", replace=False)
            await disk.graph.add_node(
                {"driver": "raw", "node-name": f"t{number}", "file": {"driver": "file", "filename": str(image)}}
            )
            job = await jobs.backup(BackupOptions(device="disk", target=f"t{number}", sync="full"))
            await job.wait()
            seen = passed(disk, mapped)
            while passed(disk, mapped) < seen + 80:  # noqa: ASYNC110  # the server announces it to nobody
                await asyncio.sleep(0)
            whole(await asyncio.to_thread(image.read_bytes), CLUSTER, bytes(range(1, 201)))
        over = True
        await asyncio.gather(*writers)
        for client in clients:
            await client.disconnect()


@formats
@run_async
async def test_storage_that_fails_in_the_middle_of_a_payload_python_does_it_again(tmpfs: Path, fmt: str) -> None:
    async with exported(tmpfs, fmt) as disk, await NbdClient.connect_unix(disk.socket, "disk") as client:
        await disk.guest.pwrite(0, b"o" * SIZE)
        await client.pwrite(0, b"a" * CLUSTER)
        await client.pwrite(0, b"b" * CLUSTER)
        before = stats(disk)
        assert before.piped > 0
        with files_end_at(SIZE // 2 + PAGE):
            with pytest.raises(NoSpace, match="File too large"):
                await client.pwrite(SIZE // 2, b"c" * (4 * CLUSTER))
            await client.pwrite(0, b"d" * CLUSTER)
        after = stats(disk)
        assert after.faults > before.faults
        await client.pwrite(SIZE // 2, b"e" * (4 * CLUSTER))
        content = await client.pread(0, SIZE)
        assert content[:CLUSTER] == b"d" * CLUSTER
        assert content[SIZE // 2 : SIZE // 2 + 4 * CLUSTER] == b"e" * (4 * CLUSTER)
