# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A disk with a chain of backups, and what it was at each of them."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from blockgraph.api import AsyncGraph, aopen
from blockgraph.backend import Backend
from blockgraph.chains import Chain
from blockgraph.jobs.backup import BackupJob
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions

MIB = 1 << 20


class ChainedDisk:
    """See the module's text.

    Attributes:
        path: of the chain.
        references: the disk's bytes at each backup, in order.
        jobs: starts the backups.
        guest: writes.
    """

    def __init__(self, directory: Path, size: int, graph: AsyncGraph, guest: Backend, image_format: str) -> None:
        self.path = directory / "chain"
        self.image = directory / "disk.img"
        self.size = size
        self.graph = graph
        self.guest = guest
        self.jobs = JobManager(graph)
        self.references: list[bytes] = []
        self._format = image_format

    async def start(self, sync: str = "incremental", **options: Any) -> BackupJob:
        """Take the point in time; the job runs."""
        given: dict[str, Any] = {"chain": str(self.path), "chain_format": self._format, **options}
        job = await self.jobs.backup(BackupOptions(device="disk", sync=sync, **given))  # type: ignore[arg-type]
        self.references.append(self.image.read_bytes())
        return job

    async def backup(self, sync: str = "incremental", **options: Any) -> BackupJob:
        """A backup that succeeds."""
        job = await self.start(sync, **options)
        await job.wait()
        assert job.error is None, job.error
        return job

    async def write(self, source: random.Random, count: int) -> None:
        """Change the disk at `count` places, with data or zeroes."""
        for _ in range(count):
            offset = source.randrange(self.size)
            length = min(source.randrange(1, 100_000), self.size - offset)
            if source.random() < 0.3:
                await self.guest.write_zeroes(offset, length)
            else:
                await self.guest.pwrite(offset, source.randbytes(length))

    def chain(self) -> Chain:
        """As it is now."""
        return Chain.load(os.fspath(self.path))


@asynccontextmanager
async def chained_disk(directory: Path, image_format: str, size: int = 6 * MIB + 512) -> AsyncIterator[ChainedDisk]:
    """A raw disk of zeroes, without backups so far."""
    directory.mkdir(exist_ok=True)
    (directory / "disk.img").touch(exist_ok=False)
    os.truncate(directory / "disk.img", size)
    disk = {"driver": "file", "filename": str(directory / "disk.img")}
    async with await aopen({"nodes": [{"node-name": "disk", "driver": "raw", "file": disk}]}) as graph:
        guest = await graph.backend("disk", writable=True)
        yield ChainedDisk(directory, size, graph, guest, image_format)


FORMATS = ("raw", "qcow2")
