# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Events that a format tells its file, seen by inject-error: the same rules as with QEMU's blkdebug."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from helpers.loop import driver_of, graph_of, in_loop

from blockgraph.backend import Backend
from blockgraph.errors import IOFailure, NoSpace
from blockgraph.filters.inject_error import InjectError
from blockgraph.formats.qcow2 import create_image

SIZE = 1 << 20


@asynccontextmanager
async def image(*rules: dict[str, Any], backing: bool = False) -> AsyncIterator[tuple[Backend, InjectError]]:
    """A new qcow2 image over inject-error over memory."""
    nodes: list[dict[str, Any]] = [
        {"node-name": "store", "driver": "memory", "size": 0},
        {"node-name": "base", "driver": "pattern", "size": SIZE},
    ]
    async with graph_of(*nodes) as graph:
        store = await graph.backend("store", writable=True, resize=True)
        await create_image(store, SIZE, cluster_size=4096)
        await graph.close_backend(store)
        fault = {"node-name": "fault", "driver": "inject-error", "image": "store", "inject-error": list(rules)}
        await graph.add_node(
            {"node-name": "it", "driver": "qcow2", "file": fault, "backing": "base" if backing else None}
        )
        yield await graph.backend("it", writable=True), driver_of(graph, "fault", InjectError)


@pytest.mark.parametrize("event", ["write_aio", "cluster_alloc"])
@in_loop
async def test_event_of_a_write_fails_it_and_the_next_one_succeeds(event: str) -> None:
    async with image({"event": event, "iotype": "write", "errno": "ENOSPC", "once": True}) as (disk, _):
        with pytest.raises(NoSpace) as caught:
            await disk.pwrite(0, b"x" * 4096)
        assert f"injected after event '{event}'" in str(caught.value)
        assert await disk.pread(0, 4096) == bytes(4096)
        await disk.pwrite(0, b"x" * 4096)
        assert await disk.pread(0, 4096) == b"x" * 4096


@in_loop
async def test_event_read_aio_comes_before_data_is_read() -> None:
    async with image({"event": "read_aio", "iotype": "read", "once": True}) as (disk, _):
        await disk.pread(0, 4096)  # unallocated: nothing is read
        await disk.pwrite(0, b"x" * 4096)
        with pytest.raises(IOFailure, match="read_aio"):
            await disk.pread(0, 4096)
        assert await disk.pread(0, 4096) == b"x" * 4096


@in_loop
async def test_event_read_backing_aio_comes_before_the_backing_is_read() -> None:
    async with image(backing=True) as (disk, fault):
        fault.break_at("read_backing_aio", "B")
        read = asyncio.ensure_future(disk.pread(8, 8))
        await fault.wait_break("B")
        fault.resume("B")
        assert await read == (8).to_bytes(8, "big")


@pytest.mark.parametrize("event", ["read_aio", "write_aio"])
@in_loop
async def test_event_of_raw_fails_its_request(event: str) -> None:
    rule = {"event": event, "once": True}
    nodes: list[dict[str, Any]] = [
        {
            "node-name": "fault",
            "driver": "blkdebug",
            "image": {"driver": "null-co", "size": 4096},
            "inject-error": [rule],
        },
        {"node-name": "it", "driver": "raw", "file": "fault"},
    ]
    async with graph_of(*nodes) as graph:
        disk = await graph.backend("it", writable=True)
        with pytest.raises(IOFailure, match=event):
            await (disk.pread(0, 512) if event == "read_aio" else disk.pwrite(0, bytes(512)))
        await disk.pread(0, 512)
