# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Graphs with a backup-top, and a filter that shuffles requests.

guest --> top --file----> disk (inject-error) --> disk-bytes (memory)
           `--target---> target (inject-error) -> target-bytes (memory)
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import blockgraph
from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.block_copy import BlockCopy
from blockgraph.driver import Filter
from blockgraph.errors import IOFailure
from blockgraph.extent import BlockStatus
from blockgraph.filters.backup_top import BackupTop
from blockgraph.filters.inject_error import InjectError
from blockgraph.flags import Flag
from blockgraph.registry import register
from helpers.loop import driver_of

#: Default unit of copying, bytes.
CLUSTER = 64 << 10


def memory(name: str, size: int, **more: Any) -> dict[str, Any]:
    """A description of a memory node."""
    return {"driver": "memory", "node-name": name, "size": size, **more}


def fault(name: str, image: str | dict[str, Any], **more: Any) -> dict[str, Any]:
    """A description of an inject-error node."""
    return {"driver": "inject-error", "node-name": name, "image": image, **more}


def disk_and_target(size: int, **more: Any) -> list[dict[str, Any]]:
    """The nodes below backup-top, with fault filters. `disk` and `target` in `more`: members of those filters."""
    return [
        memory("disk-bytes", size),
        fault("disk", "disk-bytes", **more.get("disk", {})),
        memory("target-bytes", size),
        fault("target", "target-bytes", **more.get("target", {})),
    ]


def top_over(**more: Any) -> dict[str, Any]:
    """A description of the backup-top."""
    return {"driver": "backup-top", "node-name": "top", "file": "disk", "target": "target", **more}


def pattern(size: int, seed: int = 1) -> bytes:
    """Random bytes; no two clusters are alike."""
    return random.Random(seed).randbytes(size)


async def fill(graph: AsyncGraph, node: str, data: bytes) -> None:
    """Write the node from its start."""
    backend = await graph.backend(node, writable=True)
    await backend.pwrite(0, data)
    await graph.close_backend(backend)


async def content(graph: AsyncGraph, node: str) -> bytes:
    """Every byte of the node; without a root, which would wait for requests that a test holds."""
    data = bytearray(graph.node(node).size())
    await graph.node(node).pread(0, memoryview(data))
    return bytes(data)


class Guarded:
    """A running graph with a backup-top.

    Attributes:
        old: the disk's bytes when the filter was put in place.
        guest: a writable root over the filter.
    """

    def __init__(self, graph: AsyncGraph, guest: Backend, old: bytes) -> None:
        self.graph = graph
        self.guest = guest
        self.old = old

    @property
    def top(self) -> BackupTop:
        """The filter."""
        return driver_of(self.graph, "top", BackupTop)

    @property
    def copy(self) -> BlockCopy:
        """Its copying."""
        return self.top.copy


class Setup(Guarded):
    """In memory, with filters that fail."""

    @property
    def disk(self) -> InjectError:
        """The fault filter over the disk's bytes."""
        return driver_of(self.graph, "disk", InjectError)

    @property
    def target(self) -> InjectError:
        """The fault filter over the target's bytes."""
        return driver_of(self.graph, "target", InjectError)

    async def kept(self) -> bytes:
        """What the target holds."""
        return await content(self.graph, "target-bytes")

    async def live(self) -> bytes:
        """What the disk holds."""
        return await content(self.graph, "disk-bytes")

    def copied(self) -> list[int]:
        """Numbers of the clusters that are not to be copied any more."""
        unit = self.copy.cluster_size
        return [at // unit for at in range(0, self.copy.length, unit) if not self.copy.bitmap.get(at)]


@asynccontextmanager
async def backup_top(size: int = 8 * CLUSTER, **more: Any) -> AsyncIterator[Setup]:
    """A disk of random bytes below a backup-top. `disk`, `target`, `top` in `more`: members of those nodes."""
    async with await blockgraph.aopen({"nodes": disk_and_target(size, **more)}) as graph:
        old = pattern(size)
        await fill(graph, "disk-bytes", old)
        await graph.insert_filter(top_over(**more.get("top", {})), above="disk")
        yield Setup(graph, await graph.backend("top", writable=True), old)


async def settle() -> None:
    """Let every task go on as far as it gets by itself; for graphs in memory."""
    for _ in range(200):
        await asyncio.sleep(0)


class Shuffle(Filter):
    """Lets requests overtake each other, and fail now and then, as `rng` says; counts reads by cluster.

    Attributes:
        rng: None: requests go straight through.
        fail_rate: part of the writes that fail with EIO.
        reads: how often each cluster has been read.
    """

    name: ClassVar[str] = "shuffle"
    rng: random.Random | None = None
    fail_rate = 0.0

    async def open(self) -> None:
        self.reads: dict[int, int] = {}

    async def _shuffle(self, op: str) -> None:
        if self.rng is None:
            return
        for _ in range(self.rng.randrange(6)):
            await asyncio.sleep(0)
        if op != "pread" and self.rng.random() < self.fail_rate:
            raise IOFailure("shuffled away", node=self.node.name, op=op, errno=errno.EIO)

    async def pread(self, offset: int, buf: memoryview) -> None:
        for cluster in range(offset // CLUSTER, (offset + len(buf) - 1) // CLUSTER + 1):
            self.reads[cluster] = self.reads.get(cluster, 0) + 1
        await self._shuffle("pread")
        await super().pread(offset, buf)

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        await self._shuffle("pwrite")
        await super().pwrite(offset, buf, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        await self._shuffle("pwrite_zeroes")
        await super().pwrite_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self._shuffle("discard")
        await super().discard(offset, length)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        await self._shuffle("pread")
        return await super().block_status(offset, length)


register(Shuffle)


class Flake(IOFailure):
    """Injected."""


class Flaky(Filter):
    """Fails the next request of a kind; tells of every change that has come to its end.

    Attributes:
        failing: "pread", "pwrite" or "flush"; "": none.
        changed: called with offset and length, by the name under which they are removed again.
    """

    name: ClassVar[str] = "flaky"

    async def open(self) -> None:
        self.failing = ""
        self.changed: dict[str, Callable[[int, int], None]] = {}

    async def _pass(self, op: str) -> None:
        await asyncio.sleep(0)
        if self.failing == op:
            self.failing = ""
            raise Flake("flaky", node=self.node.name, op=op, errno=errno.EIO)

    def _changed(self, offset: int, length: int) -> None:
        for changed in self.changed.values():
            changed(offset, length)

    async def pread(self, offset: int, buf: memoryview) -> None:
        await self._pass("pread")
        await super().pread(offset, buf)

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        try:
            await self._pass("pwrite")
            await super().pwrite(offset, buf, flags)
        finally:
            self._changed(offset, len(buf))

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        await super().pwrite_zeroes(offset, length, flags)
        self._changed(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        await super().discard(offset, length)
        self._changed(offset, length)

    async def flush(self) -> None:
        await self._pass("flush")
        await super().flush()


register(Flaky)
