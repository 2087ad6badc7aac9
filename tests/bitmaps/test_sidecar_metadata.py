# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Sidecars beside qcow2 images: what changes the image though no guest writes, and what its size is meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from helpers.loop import in_loop
from helpers.qcow2 import create, described
from helpers.sidecar import MIB, sidecar

import blockgraph
from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.bitmaps import identity
from blockgraph.formats.qcow2 import Qcow2

CLUSTER = 64 << 10


@asynccontextmanager
async def guest_of(path: Path) -> AsyncIterator[tuple[AsyncGraph, Backend]]:
    """A qcow2 disk of 64 MiB with a crash-safe bitmap, to which native first writes were made."""
    await create(path, 64 * MIB)
    async with await blockgraph.aopen({"nodes": [described(path)]}) as graph:
        await graph.attach_sidecar("disk", f"{path}.sidecar", crash_safe=True)
        await graph.add_bitmap("disk", "b0", persistent=True)
        guest = await graph.backend("disk", writable=True, resize=True)
        guest.use_map()
        for at in (0, MIB, 2 * MIB):
            await guest.pwrite(at, b"x" * CLUSTER)
        yield graph, guest


async def reader(graph: AsyncGraph, guest: Backend) -> None:
    """It comes and goes."""
    other = await graph.backend("disk")
    other.use_map()
    await other.pread(2 * MIB, 512)
    await graph.close_backend(other)
    await guest.flush()


async def drain(graph: AsyncGraph, guest: Backend) -> None:
    async with graph.drained():
        pass
    await guest.flush()


async def insert(graph: AsyncGraph, guest: Backend) -> None:
    await graph.insert_filter({"driver": "delay", "node-name": "filter", "file": "disk"}, "disk")
    await graph.remove_filter("filter")
    await guest.flush()


@pytest.mark.parametrize("event", [reader, drain, insert])
@in_loop
async def test_metadata_is_not_written_while_the_sidecar_says_clean(
    tmp_path: Path, event: Callable[[AsyncGraph, Backend], Awaitable[None]]
) -> None:
    """The reserve of first writes is given back: after a kill nobody could tell that from a stranger's change."""
    async with guest_of(tmp_path / "disk") as (graph, guest):
        store = sidecar(graph)
        for _ in range(100):
            await store.turn()
            if not store._begun:
                break
        assert not store._begun
        before = identity.times_of(guest.node)
        await event(graph, guest)
        assert identity.times_of(guest.node) == before or store._begun


@in_loop
async def test_turn_of_the_clock_during_a_resize_knows_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with guest_of(tmp_path / "disk") as (graph, guest):
        store, truncate, seen = sidecar(graph), Qcow2.truncate, []

        async def slow(self: Qcow2, size: int) -> None:
            for step in (asyncio.sleep(0), truncate(self, size)):
                await step
                guest.node.bitmaps["b0"].version += 1
                await store.turn()
                slot = store._now.slot
                seen.append((slot.in_use, slot.image.size, slot.next_size))
                seen.append(store._now.entries["b0"].inconsistent)

        monkeypatch.setattr(Qcow2, "truncate", slow)
        await guest.truncate(32 * MIB)
        assert seen == [(True, 64 * MIB, 32 * MIB), None] * 2
        slot = store._now.slot
        assert (slot.image.size, slot.next_size) == (32 * MIB, 32 * MIB)
        assert store._now.entries["b0"].inconsistent is None
