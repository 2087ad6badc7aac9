# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Small writes beside each other with O_DIRECT: blocks that are read, changed and written back, and a file's tail,
which goes through the page cache. There is more to see where the file system asks for 512 bytes, and not 4096.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from helpers.loop import in_loop

import blockgraph
from blockgraph.backend import Backend
from blockgraph.create import create_file

CLUSTER = 64 << 10


def direct(path: Path) -> dict[str, Any]:
    return {"driver": "file", "node-name": "file", "filename": str(path), "cache": {"direct": True}}


async def write_all(guest: Backend, content: bytearray, writes: list[tuple[int, bytes]]) -> None:
    """At once; they do not overlap."""

    async def write(offset: int, data: bytes) -> None:
        await guest.pwrite(offset, data)
        content[offset : offset + len(data)] = data

    await asyncio.gather(*(write(*each) for each in writes))


@in_loop
async def test_small_writes_beside_one_to_a_new_cluster(tmp_path: Path) -> None:
    """With which the file gets an end inside a block."""
    for seed in range(5):
        source = random.Random(seed)
        await create_file(str(tmp_path / "disk"), 32 * CLUSTER, "qcow2", replace=True, cluster_size=CLUSTER)
        nodes = [{"driver": "qcow2", "node-name": "disk", "file": direct(tmp_path / "disk")}]
        async with await blockgraph.aopen({"nodes": nodes}) as graph:
            guest = await graph.backend("disk", writable=True)
            content = bytearray(32 * CLUSTER)
            await write_all(guest, content, [(0, source.randbytes(CLUSTER))])
            await guest.flush()
            small = [(page * 4096 + 3072 + source.randrange(1, 400), source.randbytes(50)) for page in range(8)]
            await write_all(guest, content, [*small, (CLUSTER * 5, source.randbytes(100))])
            assert await guest.pread(0, 32 * CLUSTER) == content


@in_loop
async def test_writes_while_somebody_gets_the_right_to_resize(tmp_path: Path) -> None:
    """What is read and changed before has smaller blocks than what comes after."""
    size = 256 << 10
    for seed in range(5):
        source = random.Random(seed)
        content = bytearray(source.randbytes(size))
        (tmp_path / "disk").write_bytes(content)
        nodes = [{"driver": "raw", "node-name": "disk", "file": direct(tmp_path / "disk")}]
        async with await blockgraph.aopen({"nodes": nodes}) as graph:
            guest = await graph.backend("disk", writable=True)

            async def writes(lane: int, guest: Backend = guest, content: bytearray = content) -> None:
                own = random.Random(lane)
                for _ in range(60):
                    offset = (own.randrange(size // 512 // 4) * 4 + lane) * 512 + own.choice([0, 100])
                    data = own.randbytes(own.choice([50, 412]))
                    await write_all(guest, content, [(offset, data)])

            guests = [asyncio.ensure_future(writes(lane)) for lane in range(4)]
            for extra in (100, 700, 0, 333):
                await asyncio.sleep(0.002)
                other = await graph.backend("disk", writable=True, resize=True)
                await other.truncate(size + extra)
                if extra:
                    await other.pwrite(size, b"t" * extra)
                await graph.close_backend(other)
            await asyncio.gather(*guests)
            assert await guest.pread(0, size + 333) == bytes(content) + b"t" * 333
        assert (tmp_path / "disk").read_bytes() == bytes(content) + b"t" * 333


@pytest.mark.parametrize("order", [["through", "beside"], ["beside", "through"]], ids="-".join)
@in_loop
async def test_writes_into_one_block_through_a_filter_and_beside_it(tmp_path: Path, order: list[str]) -> None:
    (tmp_path / "disk").write_bytes(bytes(8192))
    nodes = [
        direct(tmp_path / "disk"),
        {"driver": "delay", "node-name": "filter", "file": "file"},
        {"driver": "raw", "node-name": "through", "file": "filter"},
        {"driver": "raw", "node-name": "beside", "file": "file"},
    ]
    async with await blockgraph.aopen({"nodes": nodes}) as graph:
        guests = [await graph.backend(name, writable=True) for name in order]
        for number in range(20):
            first, second = bytes([65 + number]) * 100, bytes([97 + number]) * 100
            await asyncio.gather(guests[0].pwrite(0, first), guests[1].pwrite(200, second))
            assert await guests[0].pread(0, 300) == first + bytes(100) + second
