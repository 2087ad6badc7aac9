# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A native write that is under way while its map is emptied is marked all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
from helpers.loop import graph_of, in_loop
from helpers.native_request import native_request

from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.create import create_file
from blockgraph.native import ExtentMap

SIZE = 1 << 20
GRANULE = 64 << 10
AT = 3 * GRANULE


async def insert_filter(graph: AsyncGraph, _: Backend) -> None:
    async with graph.transaction() as change:
        change.add({"driver": "null-co", "node-name": "kept", "size": SIZE})
        change.add({"driver": "backup-top", "node-name": "top", "file": "disk", "target": "kept"})
        change.insert("top", above="disk")


async def add_bitmap(graph: AsyncGraph, _: Backend) -> None:
    await graph.add_bitmap("disk", "another")


async def clear_another(graph: AsyncGraph, _: Backend) -> None:
    await graph.clear_bitmap("disk", "other")


@asynccontextmanager
async def written_disk(directory: Path, image_format: str) -> AsyncIterator[tuple[AsyncGraph, Backend, ExtentMap]]:
    """A disk that is mapped, and has clean bitmaps "b0" and "other"."""
    await create_file(str(directory / "disk"), SIZE, image_format, replace=False)
    file = {"driver": "file", "filename": str(directory / "disk")}
    async with graph_of({"driver": image_format, "node-name": "disk", "file": file}) as graph:
        guest = await graph.backend("disk", writable=True, resize=True)
        extents = guest.use_map().extents
        await guest.pwrite(0, b"a" * SIZE)
        for name in ("b0", "other"):
            await graph.add_bitmap("disk", name, granularity=GRANULE)
        await graph.clear_bitmap("disk", "b0")
        await guest.pread(0, 1)
        yield graph, guest, extents


async def as_far_as_it_gets() -> None:
    """Let everything run that does not wait for a native request."""
    for _ in range(100):
        await asyncio.sleep(0)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("event", [insert_filter, add_bitmap, clear_another])
@in_loop
async def test_write_under_way_is_marked(
    tmp_path: Path, event: Callable[[AsyncGraph, Backend], Awaitable[None]], image_format: str
) -> None:
    async with written_disk(tmp_path, image_format) as (graph, guest, extents):
        with native_request(extents, AT, 512, write=True):
            changing = asyncio.create_task(event(graph, guest))
            await as_far_as_it_gets()
            assert extents.find(AT) is None
            assert not changing.done()
        await changing
        assert dict(graph.dirty_extents("disk", "b0")) == {AT: GRANULE}


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@in_loop
async def test_write_that_began_while_the_disk_begins_to_grow_is_marked(tmp_path: Path, image_format: str) -> None:
    async with written_disk(tmp_path, image_format) as (graph, guest, extents):
        with ExitStack() as later:
            with native_request(extents, 0, 512, write=True):
                growing = asyncio.create_task(guest.truncate(SIZE + GRANULE))
                await as_far_as_it_gets()
                later.enter_context(native_request(extents, AT, 512, write=True))
            await as_far_as_it_gets()
            assert not growing.done()
        await growing
        assert dict(graph.dirty_extents("disk", "b0")) == {0: GRANULE, AT: GRANULE, SIZE: GRANULE}


@in_loop
async def test_disk_that_grows_below_the_bitmaps_node_goes_on(tmp_path: Path) -> None:
    """The map has a bitmap of the filter, which the node below it knows nothing of."""
    await create_file(str(tmp_path / "disk"), SIZE, "raw", replace=False)
    file = {"driver": "file", "filename": str(tmp_path / "disk"), "node-name": "disk"}
    async with graph_of(file, {"driver": "delay", "node-name": "top", "file": "disk"}) as graph:
        guest = await graph.backend("top", writable=True)
        below = await graph.backend("disk", writable=True, resize=True)
        await graph.add_bitmap("top", "b0", granularity=GRANULE)
        extents = guest.use_map().extents
        await guest.pread(0, 1)
        with native_request(extents, AT, 512, write=True):
            growing = asyncio.create_task(below.truncate(2 * SIZE))
            await as_far_as_it_gets()
            assert not growing.done()
        await growing
        assert not graph.node("disk").in_flight
        assert guest.size() == 2 * SIZE
        await guest.pwrite(2 * SIZE - 1, b"x")
        assert dict(graph.dirty_extents("top", "b0")) == {AT: GRANULE, SIZE: SIZE}


@in_loop
async def test_bitmap_that_can_not_be_given_to_the_map_is_given_at_the_next_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with written_disk(tmp_path, "raw") as (graph, guest, extents):
        await graph.add_bitmap("disk", "another", granularity=GRANULE)  # empties the map
        with monkeypatch.context() as patch:

            def refuse(bitmaps: object) -> int:
                raise MemoryError

            patch.setattr(extents, "start_set_bitmaps", refuse)
            with pytest.raises(MemoryError):
                await guest.pread(0, 1)
        await guest.pread(0, 1)
        assert extents.pwrite(AT, b"x")
        assert dict(graph.dirty_extents("disk", "b0")) == {AT: GRANULE}
