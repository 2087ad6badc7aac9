# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Nodes that become longer by being written: their bitmaps reach as far, and mark all that is new."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.loop import in_loop
from helpers.qcow2 import create
from helpers.sidecar import after, dirty, disk, session

import blockgraph
from blockgraph.api import AsyncGraph
from blockgraph.errors import IOFailure, OutOfRange
from blockgraph.flags import Flag
from blockgraph.formats.qcow2 import resize
from blockgraph.node import Child
from blockgraph.protocols.file import File

GRANULE = 64 << 10
SIZE = 4 * GRANULE
MIB = 1 << 20


def new(directory: Path, size: int = SIZE) -> Path:
    path = directory / "disk"
    path.write_bytes(b"a" * size)
    return path


@asynccontextmanager
async def growable(path: Path, driver: str) -> AsyncIterator[tuple[AsyncGraph, Child]]:
    """The node "disk", and an edge that may make it longer."""
    node: dict[str, Any] = {"driver": "file", "filename": str(path)}
    if driver == "raw":
        node = {"driver": "raw", "file": node}
    if driver == "memory":
        node = {"driver": "memory", "size": SIZE}
    async with await blockgraph.aopen({"nodes": [{"node-name": "disk", **node}]}) as graph:
        backend = await graph.backend("disk", writable=True, resize=True)
        backend.root.grows = True  # as a format's edge does
        yield graph, backend.root


def marked(graph: AsyncGraph, name: str, node: str = "disk") -> list[tuple[int, int]]:
    bitmap = graph.bitmap(node, name)
    assert bitmap.size == graph.node(node).size()
    return list(bitmap.contents().dirty_extents())


@pytest.mark.parametrize("driver", ["raw", "file", "memory"])
@pytest.mark.parametrize("zeroes", [False, True], ids=["data", "zeroes"])
@in_loop
async def test_written_past_the_end_marks_all_that_is_new(tmp_path: Path, driver: str, zeroes: bool) -> None:
    async with growable(new(tmp_path), driver) as (graph, root):
        await graph.add_bitmap("disk", "b0")
        await graph.add_bitmap("disk", "fine", granularity=512)
        await graph.add_bitmap("disk", "off", enabled=False)
        at, length = SIZE + 10 * GRANULE, 1000
        if zeroes:
            await root.pwrite_zeroes(at, length, Flag.NONE)
        else:
            await root.pwrite(at, memoryview(b"x" * length))
        end = at + length
        assert root.node.size() == end
        assert marked(graph, "b0") == marked(graph, "fine") == [(SIZE, end - SIZE)]
        assert marked(graph, "off") == []
        await root.pwrite(0, memoryview(b"x"))
        await root.pwrite(end - 1, memoryview(b"xy"))  # a part of it is inside
        assert marked(graph, "b0") == [(0, GRANULE), (SIZE, end + 1 - SIZE)]
        assert marked(graph, "fine") == [(0, 512), (SIZE, end + 1 - SIZE)]
        assert marked(graph, "off") == []


@in_loop
async def test_writes_at_once_past_the_end_miss_nothing(tmp_path: Path) -> None:
    async with growable(new(tmp_path), "raw") as (graph, root):
        await graph.add_bitmap("disk", "b0", granularity=512)
        ends = [SIZE + n * GRANULE for n in (9, 3, 7, 1, 5)]
        await asyncio.gather(*(root.pwrite(end - 512, memoryview(b"x" * 512)) for end in ends))
        assert root.node.size() == max(ends)
        assert marked(graph, "b0") == [(SIZE, max(ends) - SIZE)]
    contents = (tmp_path / "disk").read_bytes()
    assert all(contents[end - 512 : end] == b"x" * 512 for end in ends)
    assert contents.count(b"x") == 512 * len(ends)


@in_loop
async def test_grown_disk_is_marked_by_native_writes_too(tmp_path: Path) -> None:
    async with growable(new(tmp_path), "raw") as (graph, root):
        await graph.add_bitmap("disk", "b0")
        await graph.add_bitmap("disk", "b1", granularity=4096)
        guest = await graph.backend("disk", writable=True)
        extents = guest.use_map().extents
        await guest.pwrite(0, b"x")
        assert extents.pwrite(1, b"x")
        await root.pwrite(SIZE + 7 * GRANULE, memoryview(b"x" * GRANULE))
        for name in ("b0", "b1"):
            await graph.clear_bitmap("disk", name)
        await guest.pwrite(SIZE + GRANULE, b"y")  # the map learns of it
        await graph.clear_bitmap("disk", "b0")
        await guest.pwrite(SIZE + GRANULE, b"y")
        assert extents.pwrite(SIZE + 3 * GRANULE, b"y")
        assert marked(graph, "b0") == [(SIZE + GRANULE, GRANULE), (SIZE + 3 * GRANULE, GRANULE)]
        assert marked(graph, "b1") == [(SIZE + GRANULE, 4096), (SIZE + 3 * GRANULE, 4096)]


@in_loop
async def test_storage_of_a_format_grows_and_its_bitmaps_follow(tmp_path: Path) -> None:
    """First writes would be done by native code, which tells nobody how long the file has become."""
    path = tmp_path / "disk"
    nodes = [
        {"node-name": "file", "driver": "file", "filename": str(path)},
        {"node-name": "disk", "driver": "qcow2", "file": "file"},
    ]
    await create(path, 64 * MIB)
    async with await blockgraph.aopen({"nodes": nodes}) as graph:
        await graph.add_bitmap("file", "b0", granularity=512)
        await graph.add_bitmap("file", "off", granularity=512, enabled=False)
        guest = await graph.backend("disk", writable=True)
        guest.use_map()
        before = path.read_bytes()
        for at in range(0, 16 * MIB, MIB):
            await guest.pwrite(at, b"x" * 100_000)
        await graph.enable_bitmap("file", "b0", enabled=False)
        enough = path.read_bytes()
        for at in range(32 * MIB, 48 * MIB, MIB):
            await guest.pwrite(at, b"x" * 100_000)
        await guest.flush()
        assert marked(graph, "off", "file") == []
        extents = marked(graph, "b0", "file")
        for at in range(0, len(enough), 512):
            if enough[at : at + 512] != before[at : at + 512].ljust(512, b"\0"):
                assert any(start <= at < start + length for start, length in extents), at
        assert graph.node("file").size() > len(enough)


@in_loop
async def test_disk_that_grew_below_its_bitmap_is_recorded(tmp_path: Path) -> None:
    """Another parent has made the file longer: so is the node above, whose bitmap learns of it at a write."""
    nodes = [
        {"node-name": "file", "driver": "file", "filename": str(new(tmp_path))},
        {"node-name": "disk", "driver": "raw", "file": "file"},
    ]
    async with await blockgraph.aopen({"nodes": nodes}) as graph:
        await graph.add_bitmap("disk", "b0")
        guest = await graph.backend("disk", writable=True)
        extents = guest.use_map().extents
        await guest.pwrite(0, b"x")
        below = await graph.backend("file", writable=True, resize=True)
        await below.truncate(2 * SIZE)
        await guest.pread(2 * SIZE - 1, 1)  # the map learns of it
        assert not extents.pwrite(2 * SIZE - 1, b"y")  # not natively: it would not be marked
        await guest.pwrite(2 * SIZE - 1, b"y")
        assert marked(graph, "b0") == [(0, GRANULE), (SIZE, SIZE)]


@pytest.mark.parametrize("crash_safe", [True, False], ids=["crash-safe", "plain"])
@in_loop
async def test_bitmaps_that_are_kept_grow_with_the_disk(tmp_path: Path, crash_safe: bool) -> None:
    path = new(tmp_path, SIZE)
    async with disk(path) as graph:
        await graph.attach_sidecar("disk", crash_safe=crash_safe)
        await graph.add_bitmap("disk", "b0", persistent=True)
        await graph.add_bitmap("disk", "off", persistent=True, enabled=False)
        await graph.add_bitmap("disk", "e", persistent=True, epochs=True)
    async with session(path) as (graph, kill):
        root = (await graph.backend("disk", writable=True, resize=True)).root
        root.grows = True  # as the edge of a format does
        epoch = await graph.advance_epoch("disk", "e")
        await root.pwrite(SIZE + 3 * MIB, memoryview(b"x"))
        await root.node.flush()
        if crash_safe:
            async with after(path, kill()) as left:
                for name in ("b0", "e"):
                    held = left.bitmap("disk", name)
                    assert not held.inconsistent, held.reason
                    assert held.size == SIZE + 3 * MIB + 1
                    (extent,) = held.contents().dirty_extents()
                    assert extent[0] <= SIZE
                    assert sum(extent) == held.size
        await graph.clear_bitmap("disk", "b0")
        await root.pwrite(SIZE + 5 * MIB, memoryview(b"x"))
    size = SIZE + 5 * MIB + 1
    async with disk(path) as graph:
        assert not any(info.inconsistent for info in graph.bitmaps())
        first = (SIZE + 3 * MIB + 1) // GRANULE * GRANULE
        assert marked(graph, "b0") == [(first, size - first)]
        assert marked(graph, "off") == []
        assert list(graph.bitmap("disk", "e").since(epoch).dirty_extents()) == [(SIZE, size - SIZE)]


@in_loop
async def test_disk_cut_off_and_grown_again_has_changed_there(tmp_path: Path) -> None:
    async with growable(new(tmp_path), "raw") as (graph, root):
        await graph.add_bitmap("disk", "b0")
        await root.truncate(2 * GRANULE)
        await root.truncate(SIZE)
        assert marked(graph, "b0") == [(2 * GRANULE, 2 * GRANULE)]
    assert (tmp_path / "disk").read_bytes()[2 * GRANULE :] == bytes(2 * GRANULE)


@pytest.mark.parametrize("above", ["raw", "delay"])
@in_loop
async def test_disk_is_not_cut_off_below_a_bitmap_that_records(tmp_path: Path, above: str) -> None:
    """Cut off and grown again below, it would have the size the bitmap knows, and other bytes."""
    nodes = [
        {"node-name": "disk", "driver": "file", "filename": str(new(tmp_path))},
        {"node-name": "beside", "driver": "delay", "file": "disk"},
        {"node-name": "shows", "driver": above, "file": "disk"},
        {"node-name": "top", "driver": "delay", "file": "shows"},
    ]
    async with await blockgraph.aopen({"nodes": nodes}) as graph:
        ways = [await graph.backend(node, writable=True, resize=True) for node in ("disk", "beside", "shows", "top")]
        below, beside, shows, top = ways
        await graph.add_bitmap("top", "b0")
        for refused in (below, beside, shows):
            with pytest.raises(OutOfRange, match=r"bitmap 'b0' of node 'top'.*resize 'top' instead"):
                await refused.truncate(SIZE - 1)
        assert graph.node("disk").size() == SIZE
        assert not any(graph.node(node).busy for node in ("disk", "beside", "shows", "top"))
        await below.truncate(2 * SIZE)  # it has none of what is new
        await below.truncate(SIZE)
        await top.truncate(2 * GRANULE)
        await shows.truncate(SIZE)
        await top.pwrite(SIZE - 1, b"x")
        assert marked(graph, "b0", "top") == [(2 * GRANULE, SIZE - 2 * GRANULE)]
        await graph.enable_bitmap("top", "b0", enabled=False)
        await below.truncate(GRANULE)


@in_loop
async def test_disk_that_failed_to_become_shorter_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """qcow2 empties what is to be cut off, and then could not store the size."""
    await create(tmp_path / "disk", SIZE)
    image = {"driver": "qcow2", "file": {"driver": "file", "filename": str(tmp_path / "disk")}}
    async with await blockgraph.aopen({"nodes": [{"node-name": "disk", **image}]}) as graph:
        backend = await graph.backend("disk", writable=True, resize=True)
        await backend.pwrite(0, b"x" * SIZE)
        await graph.add_bitmap("disk", "b0")

        async def fail(*_: object) -> None:
            raise IOFailure("no", node="disk")

        monkeypatch.setattr(resize, "_set_size", fail)
        with pytest.raises(IOFailure):
            await backend.truncate(GRANULE)
        assert graph.node("disk").size() == SIZE
        assert bytes(await backend.pread(0, SIZE)) == b"x" * GRANULE + bytes(SIZE - GRANULE)
        assert marked(graph, "b0") == [(GRANULE, SIZE - GRANULE)]


@in_loop
async def test_disk_whose_cutting_off_was_cancelled_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with growable(new(tmp_path), "raw") as (graph, root):
        await graph.add_bitmap("disk", "b0")
        truncate = os.ftruncate

        def cancelling(fd: int, size: int) -> None:
            loop.call_soon_threadsafe(cutting.cancel)
            truncate(fd, size)

        loop = asyncio.get_running_loop()
        with monkeypatch.context() as patch:
            patch.setattr(os, "ftruncate", cancelling)
            cutting = asyncio.ensure_future(root.truncate(GRANULE))
            with pytest.raises(asyncio.CancelledError):
                await cutting
        assert graph.node("disk").size() == GRANULE
        await root.truncate(SIZE)
        assert marked(graph, "b0") == [(GRANULE, SIZE - GRANULE)]


@in_loop
async def test_kill_while_a_disk_is_cut_off_marks_what_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be empty already, while the disk still is as long as before."""
    path = new(tmp_path, 64 * MIB)
    async with session(path) as (graph, kill):
        await graph.add_bitmap("disk", "b0", persistent=True, sidecar=True)
        backend = await graph.backend("disk", writable=True, resize=True)
        truncate, left = File.truncate, list[int]()

        async def killed(driver: File, size: int) -> None:
            async with after(path, kill()) as other:
                left.extend(dirty(other))
            await truncate(driver, size)

        monkeypatch.setattr(File, "truncate", killed)
        await backend.truncate(GRANULE)
        assert set(range(1, 64 * MIB // GRANULE)) <= set(left)


@in_loop
async def test_disk_full_while_it_grows_leaves_bitmaps_as_they_were(tmp_path: Path) -> None:
    """The file system has no room for so long a file."""
    async with growable(new(tmp_path), "raw") as (graph, root):
        await graph.add_bitmap("disk", "b0")
        with pytest.raises(blockgraph.errors.IOFailure):
            await root.pwrite(1 << 62, memoryview(b"x"))
        assert marked(graph, "b0") == []
        await root.pwrite(0, memoryview(b"x"))
        assert marked(graph, "b0") == [(0, GRANULE)]
