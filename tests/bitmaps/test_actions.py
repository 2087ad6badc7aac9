# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Changes of bitmaps, one by one and several in one transaction."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.loop import in_loop

import blockgraph
from blockgraph.api import AsyncGraph
from blockgraph.bitmaps.actions import (
    AddBitmap,
    BitmapName,
    ClearBitmap,
    EnableBitmap,
    MergeBitmaps,
    RemoveBitmap,
    TakeView,
)
from blockgraph.errors import GraphError, NodeInUse
from blockgraph.graph.action import Abort, Action

GRANULE = 64 << 10
SIZE = 16 * GRANULE


def memory(name: str, size: int = SIZE) -> dict[str, Any]:
    return {"node-name": name, "driver": "memory", "size": size}


@asynccontextmanager
async def disks(*nodes: dict[str, Any]) -> AsyncIterator[AsyncGraph]:
    async with await blockgraph.aopen({"nodes": list(nodes or [memory("disk"), memory("other")])}) as graph:
        yield graph


async def acted(graph: AsyncGraph, *actions: Action) -> None:
    """One transaction."""
    async with graph.transaction() as change:
        for action in actions:
            change.act(action)


def dirty(graph: AsyncGraph, node: str, name: str) -> list[tuple[int, int]]:
    return list(graph.bitmap(node, name).contents().dirty_extents())


@in_loop
async def test_operations_on_a_bitmap() -> None:
    async with disks() as graph:
        root = await graph.backend("disk", writable=True)
        root.use_map()
        await graph.add_bitmap("disk", "b0")
        await graph.add_bitmap("disk", "fine", granularity=4096)
        await root.pwrite(GRANULE, b"x")
        assert dirty(graph, "disk", "b0") == [(GRANULE, GRANULE)]
        assert dirty(graph, "disk", "fine") == [(GRANULE, 4096)]
        await graph.enable_bitmap("disk", "b0", enabled=False)
        await root.pwrite(2 * GRANULE, b"x")
        assert dirty(graph, "disk", "b0") == [(GRANULE, GRANULE)]
        await graph.enable_bitmap("disk", "b0")
        await root.discard(4 * GRANULE, GRANULE)
        await root.write_zeroes(6 * GRANULE, GRANULE)
        assert dirty(graph, "disk", "b0") == [(n * GRANULE, GRANULE) for n in (1, 4, 6)]
        await graph.clear_bitmap("disk", "b0")
        assert dirty(graph, "disk", "b0") == []
        await graph.add_bitmap("other", "sum")
        await graph.merge_bitmaps("other", "sum", [("disk", "fine"), ("disk", "b0")])
        assert dirty(graph, "other", "sum") == [(GRANULE, 2 * GRANULE), (4 * GRANULE, GRANULE), (6 * GRANULE, GRANULE)]
        await graph.remove_bitmap("disk", "fine")
        with pytest.raises(GraphError, match=r"no bitmap 'fine' \(there are: 'b0'\)"):
            graph.bitmap("disk", "fine")


@in_loop
async def test_transaction_that_fails_leaves_every_bitmap_as_it_was() -> None:
    async with disks() as graph:
        root = await graph.backend("disk", writable=True)
        root.use_map()
        for name in ("a", "b", "c"):
            await graph.add_bitmap("disk", name)
        await root.pwrite(0, b"x")
        await graph.clear_bitmap("disk", "b")
        before = {name: dirty(graph, "disk", name) for name in ("a", "b", "c")}
        a, b, c = (BitmapName("disk", name) for name in ("a", "b", "c"))
        with pytest.raises(GraphError, match="asked to abort"):
            await acted(
                graph,
                AddBitmap(BitmapName("disk", "new")),
                TakeView(a, "test", "on-success"),
                MergeBitmaps(b, [a]),
                ClearBitmap(a),
                EnableBitmap(c, enabled=False),
                RemoveBitmap(c),
                Abort(),
            )
        assert list(graph.node("disk").bitmaps) == ["a", "b", "c"]
        assert {name: dirty(graph, "disk", name) for name in ("a", "b", "c")} == before
        assert graph.bitmap("disk", "c").enabled
        assert graph.bitmap("disk", "a").holders == []
        await root.pwrite(GRANULE, b"x")
        assert dirty(graph, "disk", "c") == [(0, 2 * GRANULE)]


@in_loop
async def test_merge_with_a_wrong_source_changes_nothing() -> None:
    async with disks(memory("disk"), memory("small", GRANULE)) as graph:
        root = await graph.backend("disk", writable=True)
        for name in ("a", "b"):
            await graph.add_bitmap("disk", name)
        await graph.add_bitmap("small", "s")
        await root.pwrite(0, b"x")
        await graph.clear_bitmap("disk", "b")
        with pytest.raises(GraphError, match="covers 65536 bytes, bitmap 'b' 1048576"):
            await graph.merge_bitmaps("disk", "b", [("disk", "a"), ("small", "s")])
        assert dirty(graph, "disk", "b") == []


@in_loop
async def test_view_is_taken_while_native_writes_go_on(tmpfs: Path) -> None:
    (tmpfs / "disk").write_bytes(bytes(SIZE))
    async with disks({"node-name": "disk", "driver": "file", "filename": str(tmpfs / "disk")}) as graph:
        root = await graph.backend("disk", writable=True)
        extents = root.use_map().extents
        await graph.add_bitmap("disk", "b0")
        await root.pwrite(0, b"x")
        assert extents.pwrite(GRANULE, b"y")
        await acted(graph, taken := TakeView(BitmapName("disk", "b0"), "job 'j'", "on-success"))
        if not extents.pwrite(5 * GRANULE, b"z"):
            await root.pwrite(5 * GRANULE, b"z")
        assert extents.pwrite(6 * GRANULE, b"z")
        assert list(taken.view.bits.dirty_extents()) == [(0, 2 * GRANULE)]
        with pytest.raises(NodeInUse, match="job 'j'"):
            await graph.remove_bitmap("disk", "b0")
        taken.view.end(succeeded=True)
        assert dirty(graph, "disk", "b0") == [(5 * GRANULE, 2 * GRANULE)]


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("b0", {}, "already is a bitmap 'b0'"),
        ("", {}, "name of 0 bytes"),
        ("é" * 512, {}, "name of 1024 bytes"),
        ("b1", {"granularity": 1000}, "1000 is not a power of two"),
        ("b1", {"granularity": 256}, "256 is not a power of two from 512"),
        ("b1", {"granularity": 1 << 32}, "is not a power of two"),
        ("b1", {"persistent": True}, "no place for persistent bitmaps"),
    ],
    ids=["taken", "empty", "long", "no-power", "small", "large", "no-store"],
)
@in_loop
async def test_bitmap_that_can_not_be_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    async with disks() as graph:
        await graph.add_bitmap("disk", "b0")
        with pytest.raises(GraphError, match=message):
            await graph.add_bitmap("disk", name, **options)
        assert list(graph.node("disk").bitmaps) == ["b0"]
