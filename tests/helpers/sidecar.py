# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Disks with sidecars, in files: sessions, and what a kill in the middle of one would leave."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import blockgraph
from blockgraph.api import AsyncGraph
from blockgraph.bitmaps.sidecar import Sidecar
from blockgraph.graph.action import Action

GRANULE = 64 << 10
SIZE = 64 << 20
MIB = 1 << 20


def raw(path: Path, **options: Any) -> dict[str, Any]:
    return {
        "nodes": [
            {"node-name": "disk", "driver": "raw", "file": {"driver": "file", "filename": str(path)}, **options},
        ]
    }


@asynccontextmanager
async def disk(path: Path, **options: Any) -> AsyncIterator[AsyncGraph]:
    async with await blockgraph.aopen(raw(path, **options)) as graph:
        yield graph


def new_disk(directory: Path) -> Path:
    path = directory / "disk"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


async def written(path: Path, *offsets: int, name: str = "b0", **add: Any) -> None:
    """A session that adds a bitmap, where there is none of that name, and writes."""
    async with disk(path) as graph:
        if name not in graph.node("disk").bitmaps:
            await graph.add_bitmap("disk", name, persistent=True, sidecar=True, **add)
        root = await graph.backend("disk", writable=True)
        for offset in offsets:
            await root.pwrite(offset, b"x")


async def acted(graph: AsyncGraph, *actions: Action) -> None:
    """One transaction."""
    async with graph.transaction() as change:
        for action in actions:
            change.act(action)


def dirty(graph: AsyncGraph, name: str = "b0") -> list[int]:
    """Granules."""
    bitmap = graph.bitmap("disk", name)
    extents = bitmap.contents().dirty_extents()
    return [
        n for at, length in extents for n in range(at // bitmap.granularity, -(-(at + length) // bitmap.granularity))
    ]


def sidecar(graph: AsyncGraph) -> Sidecar:
    store = graph.node("disk").bitmap_store
    assert isinstance(store, Sidecar)
    return store


@asynccontextmanager
async def session(path: Path) -> AsyncIterator[tuple[AsyncGraph, Callable[[], Path]]]:
    """The disk in use, and what copies the sidecar as a kill would leave it now; returns the copy."""
    copies = 0

    def kill() -> Path:
        nonlocal copies
        copies += 1
        return Path(shutil.copy(f"{path}.bitmaps", path.with_name(f"left-{copies}")))

    async with disk(path) as graph:
        yield graph, kill


@asynccontextmanager
async def after(path: Path, left: Path) -> AsyncIterator[AsyncGraph]:
    """The disk with the sidecar that a kill left, read-only; its image is used by the session still."""
    node = {"node-name": "disk", "driver": "file", "filename": str(path), "read-only": True}
    async with await blockgraph.aopen({"nodes": [node]}) as graph:
        await graph.attach_sidecar("disk", str(left))
        yield graph
