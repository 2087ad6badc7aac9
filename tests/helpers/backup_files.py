# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A backup-top over files, which native guest writes reach.

guest ==extent map==> disk (raw) -> file
  `--> top --file--> disk,  --target--> target (raw) -> file
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.create import create_file
from blockgraph.native import ExtentMap
from helpers.backup import CLUSTER, Guarded, pattern, top_over
from helpers.loop import graph_of

SIZE = 16 * CLUSTER + 512


def image(path: Path, name: str, driver: str = "raw", **more: Any) -> dict[str, Any]:
    """A description of an image file."""
    return {"driver": driver, "node-name": name, "file": {"driver": "file", "filename": str(path / name)}, **more}


class Setup(Guarded):
    """Over files, and the map of its guest knows the disk."""

    def __init__(self, graph: AsyncGraph, guest: Backend, old: bytes, path: Path) -> None:
        super().__init__(graph, guest, old)
        self._path = path

    @property
    def extents(self) -> ExtentMap:
        """What native requests of the guest use."""
        return self.guest.use_map().extents

    async def learn(self, cluster: int = 0) -> None:
        """Let the maps know both sides: the first write that has to be copied goes through Python."""
        await self.guest.pwrite(cluster * CLUSTER, self.old[cluster * CLUSTER :][:1])

    def kept(self) -> bytes:
        """What the target holds."""
        return (self._path / "target").read_bytes()

    def live(self) -> bytes:
        """What the disk holds."""
        return (self._path / "disk").read_bytes()


@asynccontextmanager
async def files(
    path: Path, target: dict[str, Any] | None = None, size: int = SIZE, **more: Any
) -> AsyncIterator[Setup]:
    """A disk of random bytes below a backup-top. `more`: members of that."""
    old = pattern(size)
    for name in ("disk", "target"):
        await create_file(str(path / name), size, "raw", replace=True)
    (path / "disk").write_bytes(old)
    async with graph_of(image(path, "disk"), target or image(path, "target")) as graph:
        await graph.insert_filter(top_over(**more), above="disk")
        guest = await graph.backend("top", writable=True)
        guest.use_map()
        yield Setup(graph, guest, old, path)
