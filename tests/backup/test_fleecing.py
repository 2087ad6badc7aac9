# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Fleecing: the target is an overlay over the live disk, and shows the disk as it was.

guest --> top --file----> disk (inject-error) --> disk-bytes (file)
           `--target---> target (qcow2) --backing--> disk
                             ^
reader ----------------------'
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from helpers.backup import CLUSTER, Shuffle, fault, memory, pattern, settle, top_over
from helpers.loop import driver_of, graph_of, in_loop

from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.create import create_file
from blockgraph.filters.backup_top import BackupTop
from blockgraph.filters.inject_error import InjectError
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions

SIZE = 8 * CLUSTER


@asynccontextmanager
async def fleecing(
    tmpfs: Path, cluster: int = CLUSTER, align: int = 1
) -> AsyncIterator[tuple[AsyncGraph, bytes, Backend, Backend]]:
    """The graph, the disk's old bytes, the guest and the reader."""
    image = str(tmpfs / "target.qcow2")
    await create_file(image, SIZE, "qcow2", replace=False, cluster_size=cluster)
    async with graph_of(
        memory("disk-bytes", SIZE),
        fault("disk", "disk-bytes", align=align),
        {"driver": "qcow2", "node-name": "target", "backing": "disk", "file": {"driver": "file", "filename": image}},
    ) as graph:
        old = pattern(SIZE)
        guest = await graph.backend("disk", writable=True)
        await guest.pwrite(0, old)
        await graph.insert_filter(top_over(), above="disk")
        yield graph, old, guest, await graph.backend("target")


@pytest.mark.parametrize("cluster", [4096, CLUSTER, 4 * CLUSTER], ids=["small", "same", "large"])
def test_reader_of_the_target_never_sees_new_data(tmpfs: Path, cluster: int) -> None:
    @in_loop
    async def run() -> None:
        async with fleecing(tmpfs, cluster) as (graph, old, guest, reader):
            assert driver_of(graph, "top", BackupTop).copy.serialising
            assert await reader.pread(0, SIZE) == old
            for offset, length in ((10, 5), (CLUSTER - 1, 2), (3 * CLUSTER, 2 * CLUSTER), (SIZE - 1, 1)):
                await guest.pwrite(offset, b"n" * length)
                assert await reader.pread(0, SIZE) == old
            await guest.write_zeroes(5 * CLUSTER, CLUSTER)
            await guest.discard(6 * CLUSTER, CLUSTER)
            assert await reader.pread(0, SIZE) == old

    run()


@in_loop
async def _race(tmpfs: Path) -> None:
    async with fleecing(tmpfs) as (graph, old, guest, reader):
        disk = driver_of(graph, "disk", InjectError)
        disk.break_at("preadv", "reader", offset=0)
        read = asyncio.ensure_future(reader.pread(0, 2 * CLUSTER))  # target says: unallocated, ask the disk
        await disk.wait_break("reader")
        write = asyncio.ensure_future(guest.pwrite(0, b"new"))
        await settle()
        assert not write.done()  # or the reader would now read new bytes
        disk.resume("reader")
        assert await read == old[: 2 * CLUSTER]
        await write
        assert await reader.pread(0, CLUSTER) == old[:CLUSTER]


def test_reader_on_its_way_through_the_target_holds_the_copy(tmpfs: Path) -> None:
    _race(tmpfs)


@in_loop
async def _late(tmpfs: Path) -> None:
    async with fleecing(tmpfs) as (graph, old, guest, reader):
        disk = driver_of(graph, "disk", InjectError)
        disk.break_at("preadv", "copy", offset=0)
        write = asyncio.ensure_future(guest.pwrite(0, b"new"))
        await disk.wait_break("copy")
        read = asyncio.ensure_future(reader.pread(0, CLUSTER))
        await settle()
        disk.resume("copy")
        assert await read == old[:CLUSTER]
        await write


def test_reader_that_comes_during_the_copy_sees_old_data(tmpfs: Path) -> None:
    _late(tmpfs)


def test_unaligned_writes_and_readers_together_come_to_an_end(tmpfs: Path) -> None:
    @in_loop
    async def run() -> None:
        async with fleecing(tmpfs, 512, align=4096) as (_, old, guest, reader):
            writes = [guest.pwrite(offset, b"n" * 3) for offset in range(1, SIZE, SIZE // 64)]
            reads = [reader.pread(offset, SIZE // 8) for offset in range(0, SIZE, SIZE // 8)]
            results = await asyncio.gather(*writes, *reads)
            assert results[len(writes) :] == [old[at : at + SIZE // 8] for at in range(0, SIZE, SIZE // 8)]
            assert await reader.pread(0, SIZE) == old

    run()


@in_loop
async def _through_a_filter(tmpfs: Path) -> None:
    async with fleecing(tmpfs) as (graph, old, guest, reader):
        # The filter goes between top and disk only; the target still reads the disk itself.
        async with graph.transaction() as change:
            change.add({"driver": "delay", "node-name": "slow", "file": "disk"})
            change.set_child("top", "file", "slow")
        assert driver_of(graph, "top", BackupTop).copy.serialising
        await guest.pwrite(0, b"new")
        assert await reader.pread(0, SIZE) == old


def test_serialising_is_known_through_filters_over_the_disk(tmpfs: Path) -> None:
    _through_a_filter(tmpfs)


@pytest.mark.parametrize("cluster", [512, CLUSTER, 4 * CLUSTER], ids=["small", "same", "large"])
@pytest.mark.parametrize("with_job", [False, True], ids=["alone", "job"])
def test_readers_of_the_target_see_the_point_in_time_in_every_interleaving(
    tmpfs: Path, cluster: int, with_job: bool
) -> None:
    async def write(guest: Backend, rng: random.Random) -> None:
        for _ in range(25):
            offset = rng.randrange(SIZE)
            length = rng.randint(1, min(CLUSTER, SIZE - offset))
            kind = rng.randrange(4)
            if kind == 0:
                await guest.write_zeroes(offset, length)
            elif kind == 1:
                await guest.discard(offset, length)
            else:
                await guest.pwrite(offset, rng.randbytes(length))

    async def read(reader: Backend, rng: random.Random, old: bytes) -> None:
        for _ in range(25):
            offset = rng.randrange(SIZE)
            length = rng.randint(1, min(3 * CLUSTER, SIZE - offset))
            assert await reader.pread(offset, length) == old[offset : offset + length]

    @in_loop
    async def run() -> None:
        for seed in range(5):
            rng = random.Random(seed)
            directory = tmpfs / str(seed)
            directory.mkdir()
            async with fleecing(directory, cluster, align=512 if seed % 2 else 1) as (graph, old, guest, reader):
                await graph.insert_filter({"driver": "shuffle", "node-name": "shuffle", "file": "disk"}, above="disk")
                driver_of(graph, "shuffle", Shuffle).rng = rng
                work = [write(guest, random.Random(seed * 10 + n)) for n in range(3)]
                work += [read(reader, random.Random(seed * 10 + 5 + n), old) for n in range(3)]
                if with_job:
                    options = BackupOptions(device="top", sync="full", max_chunk=CLUSTER)
                    job = await JobManager(graph).backup(options)
                    work.append(job.wait())
                await asyncio.wait_for(asyncio.gather(*work), 60)
                assert await reader.pread(0, SIZE) == old

    run()
