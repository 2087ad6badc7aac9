# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Sidecars of disks whose requests go past the page cache (O_DIRECT), and of block devices."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.loop import in_loop

import blockgraph
from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.bitmaps import identity
from blockgraph.node import Node

MIB = 1 << 20
SIZE = 16 * MIB
GRANULE = 64 << 10

KINDS = ["file-direct", "device", "device-direct", "device-4096-direct"]


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Description of a node for the bytes of a disk of zeroes."""
    kind: str = request.param
    if kind == "file-direct":
        (tmp_path / "disk").write_bytes(bytes(SIZE))
        name = str(tmp_path / "disk")
    else:
        make: Callable[..., str] = request.getfixturevalue("loop_device")
        name = make(SIZE, "--sector-size", "4096" if "4096" in kind else "512")
    driver = "file" if kind.startswith("file") else "host_device"
    yield {"driver": driver, "filename": name, "cache": {"direct": kind.endswith("direct")}}
    Path(f"{name}.bitmaps").unlink(missing_ok=True)  # beside a device, too


@asynccontextmanager
async def disk(storage: dict[str, Any], sidecar: str | None = None) -> AsyncIterator[tuple[AsyncGraph, Backend]]:
    """A session.

    Args:
        sidecar: None: one that is found beside the disk.
    """
    async with await blockgraph.aopen({"nodes": [{"node-name": "disk", "driver": "raw", "file": storage}]}) as graph:
        if sidecar is not None:
            await graph.attach_sidecar("disk", sidecar)
        guest = await graph.backend("disk", writable=True)
        guest.use_map()
        yield graph, guest


def granules(graph: AsyncGraph, name: str = "b0") -> set[int]:
    info = next(each for each in graph.bitmaps("disk") if each.name == name)
    assert not info.inconsistent, info.reason
    return {
        number
        for offset, length in graph.dirty_extents("disk", name)
        for number in range(offset // GRANULE, -(-(offset + length) // GRANULE))
    }


@pytest.mark.parametrize("place", ["found", "named"])
@in_loop
async def test_bitmaps_are_kept_through_sessions(storage: dict[str, Any], tmp_path: Path, place: str) -> None:
    """Writes of any alignment, by the native path where there is one; each session finds what the last one left."""
    source = random.Random(place)
    sidecar = str(tmp_path / "side") if place == "named" else None
    expected: set[int] = set()
    for session in range(3):
        async with disk(storage, sidecar) as (graph, guest):
            if not session:
                await graph.add_bitmap("disk", "b0", persistent=True, sidecar=sidecar or True)
            assert granules(graph) == expected
            for _ in range(20):
                offset = source.randrange(SIZE)
                length = min(source.choice([1, 512, 4096, 10_000]), SIZE - offset)
                if source.random() < 0.3:
                    await guest.write_zeroes(offset, length)
                else:
                    await guest.pwrite(offset, source.randbytes(length))
                expected |= set(range(offset // GRANULE, -(-(offset + length) // GRANULE)))
            assert granules(graph) == expected
            if session == 1:
                await graph.clear_bitmap("disk", "b0")
                expected.clear()


@in_loop
async def test_bitmaps_after_a_kill_have_every_change(storage: dict[str, Any], tmp_path: Path) -> None:
    side = tmp_path / "side"
    async with disk(storage, str(side)) as (graph, guest):
        await graph.add_bitmap("disk", "b0", persistent=True)
        await guest.pwrite(5 * MIB + 7, b"x" * 100)
    async with disk(storage, str(side)) as (graph, guest):
        await guest.pwrite(9 * MIB - 1, b"yy")
        await guest.flush()
        shutil.copy(side, tmp_path / "left")  # as a kill would leave it now
    node = {"driver": "raw", "node-name": "disk", "file": storage | {"read-only": True}, "read-only": True}
    async with await blockgraph.aopen({"nodes": [node]}) as graph:
        await graph.attach_sidecar("disk", str(tmp_path / "left"))
        held = granules(graph)
        assert held >= {5 * MIB // GRANULE, 9 * MIB // GRANULE - 1, 9 * MIB // GRANULE}
        assert held <= set(range(5 * 16, 6 * 16)) | set(range(8 * 16, 10 * 16)), "no more than whole regions"


@in_loop
async def test_disk_changed_behind_its_back_is_noticed(storage: dict[str, Any], tmp_path: Path) -> None:
    """A file by its times; a device, which has none, by samples: all of it is overwritten here."""
    side = str(tmp_path / "side")
    async with disk(storage, side) as (graph, guest):
        await graph.add_bitmap("disk", "b0", persistent=True)
        await guest.pwrite(0, b"x")
    fd = os.open(storage["filename"], os.O_WRONLY)
    try:
        os.write(fd, b"z" * SIZE)
        os.fsync(fd)
    finally:
        os.close(fd)
    async with disk(storage, side) as (graph, _):
        (info,) = graph.bitmaps("disk")
        assert info.inconsistent
        assert "somebody else" in info.reason


@in_loop
async def test_disk_becomes_shorter_while_the_bitmaps_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a disk that is no whole file some bytes are read then: not by waiting for who waits for the sidecar."""
    (tmp_path / "disk").write_bytes(b"x" * (MIB + 512))
    file = {"driver": "file", "filename": str(tmp_path / "disk")}
    nodes = [{"node-name": "disk", "driver": "raw", "offset": 512, "file": file}]
    async with await blockgraph.aopen({"nodes": nodes}) as graph:
        guest = await graph.backend("disk", writable=True, resize=True)
        await graph.attach_sidecar("disk", str(tmp_path / "sidecar"), crash_safe=True)
        bitmap = await graph.add_bitmap("disk", "b0", persistent=True, granularity=4096)
        store = guest.node.bitmap_store
        assert store is not None
        await store.save()
        bitmap.version += 1
        sample, shorter = identity._sample, []

        async def sampled(node: Node) -> bytes:
            if not shorter:
                shorter.append(asyncio.ensure_future(guest.truncate(65536)))
                for _ in range(10):
                    await asyncio.sleep(0)
            return await sample(node)

        monkeypatch.setattr(identity, "_sample", sampled)
        await asyncio.wait_for(store.save(), 20)
        await asyncio.wait_for(shorter[0], 20)
        assert (guest.size(), bitmap.size) == (65536, 65536)
