# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The copying loop: how often it asks where bytes are, and that the file system does the copying where it can."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.loop import graph_of, in_loop

from blockgraph import trace
from blockgraph.api import AsyncGraph
from blockgraph.block_copy import BlockCopy
from blockgraph.create import create_file
from blockgraph.filters.backup_top import BackupTop
from blockgraph.jobs import copy_loop
from blockgraph.jobs.backup import BackupJob
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions

MIB = 1 << 20
CLUSTER = 64 << 10
SIZE = 64 * MIB
CHUNK = 8 * MIB


def node(name: str, path: Path, driver: str) -> dict[str, Any]:
    """A description of an image file."""
    file = {"driver": "file", "node-name": f"{name}-file", "filename": str(path)}
    return {"driver": driver, "node-name": name, "file": file}


async def make(path: Path, driver: str, pieces: int) -> bytes:
    """An image in which every second of so many pieces is data."""
    data = bytearray(SIZE)
    step = SIZE // pieces
    for start in range(0, SIZE, 2 * step):
        data[start : start + step] = random.Random(start).randbytes(step)
    await create_file(str(path), SIZE, driver, replace=False)
    async with graph_of(node("disk", path, driver)) as graph:
        disk = await graph.backend("disk", writable=True)
        for start in range(0, SIZE, 2 * step):
            await disk.pwrite(start, data[start : start + step])
    return bytes(data)


async def start(graph: AsyncGraph, **options: Any) -> tuple[BackupJob, BlockCopy]:
    job = await JobManager(graph).backup(BackupOptions(device="disk", target="target", sync="full", **options))
    top = graph.node(job.filter_name).driver
    assert isinstance(top, BackupTop)
    return job, top.copy


@pytest.mark.parametrize("pieces", [1, 16])
@pytest.mark.parametrize("target", ["raw", "qcow2"])
@pytest.mark.parametrize("source", ["raw", "qcow2"])
def test_status_of_both_sides_is_asked_once_for_each_extent_of_a_chunk(
    tmpfs: Path, source: str, target: str, pieces: int
) -> None:
    @in_loop
    async def run() -> None:
        data = await make(tmpfs / "disk", source, pieces)
        await create_file(str(tmpfs / "target"), SIZE, target, replace=False)
        async with graph_of(node("disk", tmpfs / "disk", source), node("target", tmpfs / "target", target)) as graph:
            with trace.record() as events:
                job, _ = await start(graph, max_chunk=CHUNK)
                await job.wait()
            assert job.error is None
            asked = Counter((event.op, event.node) for event in events)
            data_chunks = sum(any(data[at : at + CHUNK]) for at in range(0, SIZE, CHUNK))
            assert asked["map", "disk"] == max(pieces, SIZE // CHUNK)
            assert asked["block_status", "disk"] == 0
            assert asked["map", "target"] == data_chunks
            assert asked["block_status", "target"] <= data_chunks  # whether it is zero where zeroes go
            # Nothing was read or written through a node: all of it was copied natively.
            assert not [key for key in asked if key[0] in ("pread", "pwrite") and not key[1].endswith("-file")]
            backend = await graph.backend("target")
            assert await backend.pread(0, SIZE) == data

    run()


@pytest.mark.parametrize("target", ["raw", "qcow2"])
@pytest.mark.parametrize("source", ["raw", "qcow2"])
def test_blocks_are_shared_where_the_file_system_can_and_guest_writes_stay_apart(
    reflinks: Path, source: str, target: str
) -> None:
    @in_loop
    async def run() -> None:
        data = await make(reflinks / "disk", source, 4)
        await create_file(str(reflinks / "target"), SIZE, target, replace=False)
        async with graph_of(
            node("disk", reflinks / "disk", source), node("target", reflinks / "target", target)
        ) as graph:
            guest = await graph.backend("disk", writable=True)
            job, copy = await start(graph)
            for cluster in range(0, SIZE // CLUSTER, 7):
                await guest.pwrite(cluster * CLUSTER, b"new")
                await asyncio.sleep(0)
            await job.wait()
            assert job.error is None
            # The job had all of it but what guest writes copied.
            assert copy.bytes_shared > 0
            assert copy.bytes_shared + copy.bytes_for_guest >= SIZE // 2
            backend = await graph.backend("target")
            assert await backend.pread(0, SIZE) == data
            for cluster in range(0, SIZE // CLUSTER, 7):
                assert await guest.pread(cluster * CLUSTER, 3) == b"new"

    run()


def waited_for(monkeypatch: pytest.MonkeyPatch, copy: BlockCopy) -> None:
    copy.waits += 1


def slow(monkeypatch: pytest.MonkeyPatch, copy: BlockCopy) -> None:
    monkeypatch.setattr(copy_loop, "_SLOW", 0)


def neither(monkeypatch: pytest.MonkeyPatch, copy: BlockCopy) -> None:
    monkeypatch.setattr(copy_loop, "_QUICK", 0)


@pytest.mark.parametrize(
    "change, chunks",
    [
        (waited_for, [8, 16, 32, 16, 8, 8, 16, 32]),
        (slow, [8, 16, 32, 16, 8, 8, 16, 32]),
        (neither, [8, 16, 32, 32, 32, 32, 64, 64]),
    ],
)
@in_loop
async def test_chunks_grow_while_they_are_quick_and_nobody_waits_for_them(
    tmpfs: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[pytest.MonkeyPatch, BlockCopy], None],
    chunks: list[int],
) -> None:
    asked: list[int] = []
    copy_next = BlockCopy.copy_next

    async def recorded(self: BlockCopy, chunk: int) -> int | None:
        asked.append(chunk // MIB)
        monkeypatch.setattr(copy_loop, "_QUICK", math.inf)
        monkeypatch.setattr(copy_loop, "_SLOW", math.inf)
        if len(asked) in (3, 4, 5):
            change(monkeypatch, self)
        return await copy_next(self, chunk)

    monkeypatch.setattr(BlockCopy, "copy_next", recorded)
    (tmpfs / "disk").write_bytes(b"d" * 512 * MIB)
    await create_file(str(tmpfs / "target"), 512 * MIB, "raw", replace=False)
    async with graph_of(node("disk", tmpfs / "disk", "raw"), node("target", tmpfs / "target", "raw")) as graph:
        job, _ = await start(graph, max_workers=1)
        await job.wait()
    assert asked[:8] == chunks


@in_loop
async def test_the_last_chunks_are_small_so_no_worker_is_left_alone_with_a_large_one(
    tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    copy_next = BlockCopy.copy_next

    async def recorded(self: BlockCopy, chunk: int) -> int | None:
        if self.left:
            asked.append((chunk, self.left))
        return await copy_next(self, chunk)

    monkeypatch.setattr(BlockCopy, "copy_next", recorded)
    monkeypatch.setattr(copy_loop, "_QUICK", math.inf)
    monkeypatch.setattr(copy_loop, "_SLOW", math.inf)
    (tmpfs / "disk").write_bytes(b"d" * 512 * MIB)
    await create_file(str(tmpfs / "target"), 512 * MIB, "raw", replace=False)
    async with graph_of(node("disk", tmpfs / "disk", "raw"), node("target", tmpfs / "target", "raw")) as graph:
        job, _ = await start(graph, max_workers=4)
        await job.wait()
    assert max(chunk for chunk, _ in asked) > CHUNK
    assert all(chunk <= max(CHUNK, left // 8) for chunk, left in asked)
    assert asked[-1][0] == CHUNK
