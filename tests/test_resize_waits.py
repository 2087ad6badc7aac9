# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Requests that arrive while a disk becomes shorter: they see the new end, whoever made it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.loop import in_loop

import blockgraph
from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.create import create_file
from blockgraph.errors import GraphError, OutOfRange

SIZE = 1 << 20
SHORT = SIZE // 4
BEHIND = SIZE - (64 << 10)
#: The last cluster of the short disk and the first behind it.
ACROSS = SHORT - 512


@asynccontextmanager
async def two_guests(
    path: Path, driver: str, *, bitmap: bool = False
) -> AsyncIterator[tuple[AsyncGraph, Backend, Backend]]:
    """A graph, and two who write to its disk, which is full of b"o", over a backing file full of b"B" (qcow2 only); the
    second one may make it shorter or longer."""
    options: dict[str, Any] = {}
    if driver == "qcow2":
        base = path.with_name("base")
        base.write_bytes(b"B" * SIZE)
        options = {"backing_file": str(base), "backing_fmt": "raw"}
    await create_file(str(path), SIZE, driver, replace=False, **options)
    disk: dict[str, Any] = {
        "driver": driver,
        "node-name": "disk",
        "discard": "unmap",
        "file": {"driver": "file", "filename": str(path), "discard": "unmap"},
    }
    if driver == "qcow2":
        file = {"driver": "file", "filename": str(base), "read-only": True}
        disk["backing"] = {"driver": "raw", "read-only": True, "file": file}
    async with await blockgraph.aopen({"nodes": [disk]}) as graph:
        guest = await graph.backend("disk", writable=True)
        other = await graph.backend("disk", writable=True, resize=True)
        if bitmap:
            await graph.add_bitmap("disk", "b0")
        await guest.pwrite(0, b"o" * SIZE)
        await guest.flush()
        yield graph, guest, other


CHANGES: dict[str, Callable[[Backend], Awaitable[Any]]] = {
    "write": lambda guest: guest.pwrite(BEHIND, b"x" * 4096),
    "unaligned write": lambda guest: guest.pwrite(SIZE - 100, b"x" * 100),
    "write across": lambda guest: guest.pwrite(ACROSS, b"x" * 1024),
    "zeroes": lambda guest: guest.write_zeroes(BEHIND, 65536),
    "discard": lambda guest: guest.discard(BEHIND, 65536),
}


@pytest.mark.parametrize("by", ["guest", "who-resizes"])
@pytest.mark.parametrize("bitmap", [False, True])
@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("driver", ["raw", "qcow2"])
@in_loop
async def test_change_behind_the_new_end_is_refused(
    tmp_path: Path, driver: str, change: str, bitmap: bool, by: str
) -> None:
    """Also while the disk is about to end there; nothing is made longer, and what grows again is zero."""
    async with two_guests(tmp_path / "disk", driver, bitmap=bitmap) as (_, guest, other):
        shorter = asyncio.ensure_future(other.truncate(SHORT))
        await asyncio.sleep(0)
        with pytest.raises(OutOfRange, match="past the end"):
            await CHANGES[change](guest if by == "guest" else other)
        await shorter
        assert guest.size() == SHORT
        await other.truncate(SIZE)
        assert await guest.pread(0, SIZE) == b"o" * SHORT + bytes(SIZE - SHORT)


@pytest.mark.parametrize("driver", ["raw", "qcow2"])
@in_loop
async def test_read_behind_the_new_end_is_zero(tmp_path: Path, driver: str) -> None:
    async with two_guests(tmp_path / "disk", driver) as (_, guest, other):
        shorter = asyncio.ensure_future(other.truncate(SHORT))
        await asyncio.sleep(0)
        behind, across, status = await asyncio.gather(
            guest.pread(BEHIND, 4096), guest.pread(ACROSS, 1024), guest.block_status(BEHIND, 4096)
        )
        await shorter
        assert behind == bytes(4096)
        assert across == b"o" * 512 + bytes(512)
        assert (status.length, status.data, status.zero) == (4096, False, True)


@pytest.mark.parametrize("driver", ["raw", "qcow2"])
@in_loop
async def test_resizes_take_their_turn(tmp_path: Path, driver: str) -> None:
    """Longer and shorter at once: each is done to the disk that the one before has left."""
    async with two_guests(tmp_path / "disk", driver) as (_, guest, other):
        sizes = [2 * SIZE, SHORT, SIZE, SHORT // 2, 3 * SIZE]
        await asyncio.gather(*(other.truncate(size) for size in sizes))
        assert guest.size() == 3 * SIZE
        assert await guest.pread(0, 3 * SIZE) == b"o" * (SHORT // 2) + bytes(3 * SIZE - SHORT // 2)


@pytest.mark.parametrize("sidecar", [False, True])
@in_loop
async def test_write_that_makes_it_longer_again_is_recorded(tmp_path: Path, sidecar: bool) -> None:
    """It came before the disk was shorter, from a node that may make it longer: the bitmap follows."""
    async with two_guests(tmp_path / "disk", "raw") as (graph, _, other):
        if sidecar:
            await graph.attach_sidecar("disk", str(tmp_path / "sidecar"), crash_safe=True)
        bitmap = await graph.add_bitmap("disk", "b0", persistent=sidecar, granularity=4096)
        shorter = asyncio.ensure_future(other.truncate(SHORT))
        await asyncio.sleep(0)
        other.root.grows = True  # as the edge of a format does
        await other.root.pwrite(SIZE - 4096, memoryview(b"x" * 4096))
        await shorter
        assert (other.size(), bitmap.size) == (SIZE, SIZE)
        assert bitmap.contents().next_dirty(SIZE - 4096, SIZE) is not None


@pytest.mark.parametrize("change", ["write_zeroes", "discard"])
@in_loop
async def test_zeroes_up_to_the_old_end_keep_what_is_behind_it(tmp_path: Path, change: str) -> None:
    """The disk ended inside a cluster, all of which they would take: it becomes longer when they are over."""
    cluster, size = 64 << 10, 3 * (64 << 10) + 512
    base = tmp_path / "base"
    base.write_bytes(b"B" * SIZE)
    await create_file(str(tmp_path / "disk"), size, "qcow2", replace=False, backing_file=str(base), backing_fmt="raw")
    below = {"driver": "file", "filename": str(base), "read-only": True}
    disk = {
        "driver": "qcow2",
        "node-name": "disk",
        "discard": "unmap",
        "file": {"driver": "file", "filename": str(tmp_path / "disk")},
        "backing": {"driver": "raw", "node-name": "base", "read-only": True, "file": below},
    }
    async with await blockgraph.aopen({"nodes": [disk]}) as graph:
        guest = await graph.backend("disk", writable=True, resize=True)
        await guest.pwrite(3 * cluster, b"o" * 512)
        driver = graph.node("base").driver
        pread, go = driver.pread, asyncio.Event()

        async def slow(offset: int, buf: memoryview) -> None:
            await go.wait()
            await pread(offset, buf)

        driver.pread = slow  # type: ignore[method-assign]
        copied = asyncio.ensure_future(guest.pwrite(2 * cluster + 100, b"c" * 100))
        await asyncio.sleep(0)
        zeroed = asyncio.ensure_future(getattr(guest, change)(2 * cluster, cluster + 512))
        await asyncio.sleep(0)
        held = [request.end for request in guest.node.in_flight.values()]
        longer = asyncio.ensure_future(guest.truncate(4 * cluster))
        await asyncio.sleep(0)
        go.set()
        await longer
        await guest.pwrite(3 * cluster + 4096, b"W" * 4096)
        await asyncio.gather(copied, zeroed)
        assert 4 * cluster in held  # a resize waits for them
        assert await guest.pread(3 * cluster + 4096, 4096) == b"W" * 4096


@pytest.mark.parametrize("size", [1 << 63, 1 << 70, 1 << 48], ids=["2**63", "2**70", "too long for a bitmap"])
@in_loop
async def test_size_that_can_not_be_changes_nothing(tmp_path: Path, size: int) -> None:
    async with two_guests(tmp_path / "disk", "raw") as (graph, guest, other):
        fine = await graph.add_bitmap("disk", "fine", granularity=512)
        coarse = await graph.add_bitmap("disk", "coarse", granularity=1 << 20)
        with pytest.raises(OutOfRange, match="can not become"):
            await other.truncate(size)
        assert guest.size() == fine.size == coarse.size == SIZE
        assert await guest.pread(0, SIZE) == b"o" * SIZE


@in_loop
async def test_bitmap_of_more_bits_than_there_can_be_is_refused(tmp_path: Path) -> None:
    async with await blockgraph.aopen({"nodes": [{"driver": "memory", "node-name": "disk", "size": 1 << 60}]}) as graph:
        with pytest.raises(GraphError, match="larger granularity"):
            await graph.add_bitmap("disk", "b0", granularity=512)
        bitmap = await graph.add_bitmap("disk", "b1")
        assert bitmap.granularity == 1 << 22
