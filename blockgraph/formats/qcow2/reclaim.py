# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Reclaim: when a host cluster that lost its last user may be used again.

```
    unlinked in memory ──write-back──► unlinked on disk ──requests of that time have ended──► refcount drops, free
```

Not earlier: before the first step a crash would bring the old entry back, and it must not show another cluster's
data; before the second a request may still read or write where it found the cluster.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from blockgraph.errors import BlockGraphError
from blockgraph.formats.qcow2.image import run_all
from blockgraph.node import Node

log = logging.getLogger(__name__)

#: A write-back is worth while for this many clusters' entries, or bytes, that wait for it.
_MANY_RUNS = 4096
_MANY_BYTES = 256 << 20
#: Runs that the storage is told about at a time.
_AT_ONCE = 16


class Freed(NamedTuple):
    """Clusters without a user.

    Attributes:
        host: host offset, of any byte of the first cluster.
        clusters: how many.
        since: requests from this number on have never known them.
        discard: the guest asked for it: the storage below may be told.
    """

    host: int
    clusters: int
    since: int
    discard: bool


class Reclaim:
    """See the module's text.

    Args:
        node: its requests are those that may still use a cluster.
        cluster_size: bytes.
        free: drops refcounts by one; told (host, clusters).
        discard: tells the storage that [host, length) is not needed; None: it is not told.
    """

    def __init__(self, node: Node, cluster_size: int, free: Callable[[int, int], Awaitable[None]]) -> None:
        self._node = node
        self._cluster_size = cluster_size
        self._free = free
        self.discard: Callable[[int, int], Awaitable[None]] | None = None
        self._unlinked: list[Freed] = []
        self._unlinked_clusters = 0
        self._ready: deque[Freed] = deque()
        #: of each `release` that is at it
        self._releasing: set[asyncio.Event] = set()

    def unlink(self, host: int, clusters: int, *, discard: bool = False) -> None:
        """An entry that is still on disk was the last to refer to these clusters."""
        self._unlinked.append(Freed(host, clusters, self._node.next_request, discard))
        self._unlinked_clusters += clusters

    def unused(self, host: int, clusters: int) -> None:
        """Nothing on disk refers to these clusters."""
        self._ready.append(Freed(host, clusters, self._node.next_request, False))

    @property
    def many(self) -> bool:
        """So much waits for a write-back that one is worth while."""
        return len(self._unlinked) >= _MANY_RUNS or self._unlinked_clusters * self._cluster_size >= _MANY_BYTES

    @property
    def pending(self) -> bool:
        """Something is not free yet."""
        return bool(self._unlinked or self._ready)

    def save(self) -> list[Freed]:
        """What the write-back that begins now unlinks on disk; follow with `settle` or `restore`."""
        saved, self._unlinked = self._unlinked, []
        self._unlinked_clusters = 0
        return saved

    def settle(self, saved: list[Freed]) -> None:
        """It is unlinked on disk."""
        self._ready.extend(saved)

    def restore(self, saved: list[Freed]) -> None:
        """It may still be linked on disk."""
        self._unlinked = saved + self._unlinked
        self._unlinked_clusters += sum(freed.clusters for freed in saved)

    async def release(self) -> bool:
        """Free what no request can use any more; returns whether there was something.

        A failure costs the clusters, which stay allocated, and nothing else.
        """
        some = False
        while runs := self._take_ready():
            some = True
            self._releasing.add(over := asyncio.Event())
            try:
                while runs:
                    # Before the refcounts drop: afterwards they may hold something else.
                    await run_all([self._discard(freed) for freed in runs[:_AT_ONCE] if freed.discard])
                    for freed in runs[:_AT_ONCE]:
                        del runs[0]
                        await self._free_run(freed)
            finally:
                self._ready.extendleft(runs)
                self._releasing.discard(over)
                over.set()
        return some

    async def released(self) -> bool:
        """Wait until what others are about to free is free, or ready again; returns whether there was something."""
        under_way = list(self._releasing)
        for over in under_way:
            await over.wait()
        return bool(under_way)

    def _take_ready(self) -> list[Freed]:
        """What no request can use any more, by host offset, neighbours as one."""
        oldest = self._node.oldest_request()
        ready = []
        while self._ready and self._ready[0].since <= oldest:
            ready.append(self._ready.popleft())
        ready.sort()
        runs: list[Freed] = []
        for freed in ready:
            last = runs[-1] if runs else None
            if last and last.discard == freed.discard and last.host + last.clusters * self._cluster_size == freed.host:
                runs[-1] = Freed(last.host, last.clusters + freed.clusters, max(last.since, freed.since), freed.discard)
            else:
                runs.append(freed)
        return runs

    async def _free_run(self, freed: Freed) -> None:
        try:
            await self._free(freed.host, freed.clusters)
        except BlockGraphError as error:
            log.warning(
                "node '%s': %d clusters at host offset %d stay allocated: %s",
                self._node.name,
                freed.clusters,
                freed.host,
                error,
            )

    async def _discard(self, freed: Freed) -> None:
        if self.discard is None:
            return
        try:
            await self.discard(freed.host, freed.clusters * self._cluster_size)
        except BlockGraphError as error:
            log.debug("node '%s': discard below failed: %s", self._node.name, error)
