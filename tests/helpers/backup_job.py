# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A backup job over fault filters, for its tests.

guest --> (top) --file----> disk (inject-error) --> disk-bytes
           `----target---> target (inject-error) -> target-bytes
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.filters.inject_error import InjectError
from blockgraph.jobs.backup import BackupJob
from blockgraph.jobs.job import JobEvent
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions
from helpers.backup import CLUSTER, disk_and_target, fill, pattern
from helpers.loop import driver_of, graph_of

SIZE = 8 * CLUSTER


class Setup:
    """A running graph, its jobs, and what they have told.

    Attributes:
        old: the disk's bytes.
        guest: a writable root over the disk.
        sleeps: pauses before an ignored error was tried again, seconds.
    """

    def __init__(self, graph: AsyncGraph, guest: Backend, old: bytes) -> None:
        self.graph = graph
        self.guest = guest
        self.old = old
        self.manager = JobManager(graph)
        self.events: list[JobEvent] = []
        self.sleeps: list[float] = []
        self.manager.listeners.append(self.events.append)
        self._before = sorted(name for name, _ in graph.model.vertices())

    async def start(self, **more: Any) -> BackupJob:
        """Start a backup of the disk to the target, unless `more` says otherwise."""
        options = {"device": "disk", "target": "target", "sync": "full", "max_chunk": CLUSTER, "max_workers": 1, **more}
        job = await self.manager.backup(BackupOptions(**options))
        assert job._loop is not None
        job._loop.sleep = self._sleep
        return job

    async def _sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        await asyncio.sleep(0)

    @property
    def disk(self) -> InjectError:
        """The fault filter of the disk."""
        return driver_of(self.graph, "disk", InjectError)

    @property
    def target(self) -> InjectError:
        """The fault filter of the target."""
        return driver_of(self.graph, "target", InjectError)

    def kinds(self) -> list[str]:
        """Events, without states."""
        return [event.kind for event in self.events if event.kind != "state"]

    async def check_clean(self) -> None:
        """The graph is as it was, and the guest can write."""
        assert sorted(name for name, _ in self.graph.model.vertices()) == self._before
        assert self.guest.node.name == "disk"
        await self.guest.pwrite(0, b"still works")
        writer = await self.graph.backend("target", writable=True, resize=True)  # nothing holds permissions
        await self.graph.close_backend(writer)


@asynccontextmanager
async def setup(**more: Any) -> AsyncIterator[Setup]:
    """`disk`, `target` in `more`: members of the fault filters."""
    async with graph_of(*disk_and_target(SIZE, **more)) as graph:
        old = pattern(SIZE)
        await fill(graph, "disk-bytes", old)
        yield Setup(graph, await graph.backend("disk", writable=True), old)


def fails(event: str, iotype: str, **more: Any) -> dict[str, Any]:
    """An inject-error rule."""
    return {"inject-error": [{"event": event, "iotype": iotype, "errno": "EIO", **more}]}
