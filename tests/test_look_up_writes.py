# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Clusters that are looked up to be written: entered as writable only where nobody has to be asked or told."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.loop import graph_of, in_loop

from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.create import create_file
from blockgraph.native import MapExtent

CLUSTER = 64 << 10
#: The second table is for what is written first.
SECOND = CLUSTER // 8 * CLUSTER
SIZE = SECOND + CLUSTER
#: Written before: looked up afterwards.
AT = 9 * CLUSTER


def image(path: Path, **more: Any) -> dict[str, Any]:
    return {
        "driver": "qcow2",
        "node-name": "disk",
        "file": {"driver": "file", "node-name": "file", "filename": str(path)},
    } | more


async def full(path: Path) -> Path:
    """An image with no two clusters in a row."""
    await create_file(str(path), SIZE, "qcow2", replace=False)
    async with graph_of(image(path)) as graph:
        backend = await graph.backend("disk", writable=True)
        for cluster in [*range(0, 64, 2), *range(1, 64, 2)]:
            await backend.pwrite(cluster * CLUSTER, bytes([cluster]) * CLUSTER)
        await backend.pwrite(SECOND, b"x" * CLUSTER)
        await graph.close_backend(backend)
    return path


async def look_up(backend: Backend, *, first: bool = True) -> MapExtent | None:
    """What the map has of a cluster that was looked up to be written; `first`: after another was written in Python."""
    extents = backend.use_map().extents
    if first:
        await backend.pwrite(SECOND, b"x" * 512)
    extents.start_invalidate(AT, CLUSTER)
    await backend.look_up([(AT, AT + 4096)])
    return extents.find(AT)


@in_loop
async def test_data_in_a_cluster_of_the_image_alone_may_be_written(tmp_path: Path) -> None:
    async with graph_of(image(await full(tmp_path / "d"))) as graph:
        backend = await graph.backend("disk", writable=True)
        found = await look_up(backend)
        assert found is not None
        assert (found.writable, found.copy, found.allocate) == (True, False, False)
        assert backend.use_map().extents.pwrite(AT, b"y" * 4096)
        assert await backend.pread(AT, 8192) == b"y" * 4096 + bytes([9]) * 4096


@in_loop
async def test_nothing_may_be_written_before_python_has_written_there(tmp_path: Path) -> None:
    async with graph_of(image(await full(tmp_path / "d"))) as graph:
        found = await look_up(await graph.backend("disk", writable=True), first=False)
        assert found is not None
        assert not found.writable


Prepare = Callable[[AsyncGraph], Awaitable[object]]
WAYS: dict[str, tuple[dict[str, Any], Prepare | None]] = {
    "detect-zeroes": ({"detect-zeroes": "on"}, None),
    "bitmap below": ({}, lambda graph: graph.add_bitmap("file", "b", granularity=CLUSTER)),
    "copy before write": (
        {},
        lambda graph: graph.insert_filter(
            {"driver": "backup-top", "node-name": "top", "file": "disk", "target": "kept"}, "disk"
        ),
    ),
}


@pytest.mark.parametrize("way", WAYS)
@in_loop
async def test_who_has_to_see_writes_sees_them(tmp_path: Path, way: str) -> None:
    options, prepare = WAYS[way]
    await create_file(str(tmp_path / "kept"), SIZE, "qcow2", replace=False)
    kept = image(tmp_path / "kept") | {"node-name": "kept"}
    kept["file"] = kept["file"] | {"node-name": "kept-file"}
    async with graph_of(kept, image(await full(tmp_path / "d"), **options)) as graph:
        backend = await graph.backend("disk", writable=True)
        await look_up(backend)
        if prepare is not None:
            await prepare(graph)
        found = await look_up(backend)
        assert found is None or not found.writable


@in_loop
async def test_bitmap_that_the_map_knows_records_what_is_written_natively(tmp_path: Path) -> None:
    async with graph_of(image(await full(tmp_path / "d"))) as graph:
        backend = await graph.backend("disk", writable=True)
        await look_up(backend)
        bitmap = await graph.add_bitmap("disk", "b", granularity=CLUSTER)
        found = await look_up(backend)
        assert found is not None
        assert found.writable
        assert bitmap.contents().next_dirty(0) == (SECOND, CLUSTER)
        assert backend.use_map().extents.pwrite(AT, b"y" * 4096)
        assert bitmap.contents().next_dirty(0) == (AT, CLUSTER)


def entries(path: Path) -> tuple[int, int, int]:
    """Offsets of the L1 entry and of the L2 entry for `AT`, and of the refcount table."""
    with path.open("rb") as file:
        l1_at, refcounts_at = struct.unpack(">QQ", file.read(56)[40:])
        file.seek(l1_at)
        l2_at = struct.unpack(">Q", file.read(8))[0] & 0x00FFFFFFFFFFFE00
    return l1_at, l2_at + AT // CLUSTER * 8, refcounts_at


@pytest.mark.parametrize("shared", ["cluster", "table"])
@in_loop
async def test_what_is_not_the_images_alone_is_for_reading(tmp_path: Path, shared: str) -> None:
    path = await full(tmp_path / "d")
    l1_at, l2_at, _ = entries(path)
    with path.open("r+b") as file:
        file.seek(l1_at if shared == "table" else l2_at)
        entry = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([entry & 0x7F]))  # not COPIED
    async with graph_of(image(path)) as graph:
        backend = await graph.backend("disk", writable=True)
        found = await look_up(backend)
        assert found is not None
        assert not found.writable


@in_loop
async def test_cluster_with_metadata_is_for_reading(tmp_path: Path) -> None:
    path = await full(tmp_path / "d")
    _, l2_at, refcounts_at = entries(path)
    with path.open("r+b") as file:
        file.seek(l2_at)
        file.write(struct.pack(">Q", 1 << 63 | refcounts_at))
    async with graph_of(image(path)) as graph:
        found = await look_up(await graph.backend("disk", writable=True))
        assert found is None or not found.writable
