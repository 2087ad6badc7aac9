# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Several backups of one disk at once, each with its own point in time, some of them from one bitmap.

guests --> top of job 0 --> top of job 1 --> top of job 2 --> disk      started in this order, ended in any
               `--> t0          `--> t1          `--> t2
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers.backup import CLUSTER, content, fill, memory, pattern, settle
from helpers.loop import graph_of, in_loop

from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.graph.action import Action
from blockgraph.graph.transaction import Transaction
from blockgraph.jobs.backup import BackupJob
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions

CLUSTERS = 24
SIZE = CLUSTERS * CLUSTER
NOTHING = b"?"


@dataclass
class Instant(Action):
    """What the disk and its bitmap hold at the instant of the transaction.

    Attributes:
        data: bytes of the disk.
        marked: clusters.
    """

    data: bytes = b""
    marked: set[int] = field(default_factory=set)

    def nodes(self) -> list[str]:
        return ["disk"]

    async def prepare(self, change: Transaction) -> None:
        self.data = await content(change.graph, "disk")  # type: ignore[arg-type]
        extents = change.node("disk").bitmaps["b0"].contents().dirty_extents()
        self.marked = {number for at, length in extents for number in range(at // CLUSTER, (at + length) // CLUSTER)}

    def expected(self, sync: str) -> bytes:
        """What a backup of that instant holds, over a target of NOTHING."""
        kept = self.marked if sync != "full" else range(CLUSTERS)
        return b"".join(
            self.data[n * CLUSTER : (n + 1) * CLUSTER] if n in kept else NOTHING * CLUSTER for n in range(CLUSTERS)
        )


async def started(
    graph: AsyncGraph, manager: JobManager, name: str, sync: str, **more: Any
) -> tuple[BackupJob, Instant]:
    """A backup to the target of that name, and what it has to hold."""
    bitmap = {} if sync == "full" else {"bitmap": "b0"}
    options = BackupOptions(
        job_id=name, device="disk", target=name, sync=sync, max_chunk=CLUSTER, max_workers=2, **bitmap, **more
    )
    async with graph.transaction() as change:
        change.act(instant := Instant())
        job = await manager.add(change, options)
    return job, instant


class Guest:
    """Writes at random until it is told to stop."""

    def __init__(self, backend: Backend, seed: int, *, native: bool) -> None:
        self._backend = backend
        self._rng = random.Random(seed)
        self._native = native
        self.going = True

    async def run(self) -> None:
        """Until `going` is False."""
        rng = self._rng
        while self.going:
            length = rng.choice([1, 512, 4096, CLUSTER, 2 * CLUSTER])
            offset = rng.randrange(SIZE - length)
            what = rng.random()
            if what < 0.1:
                await self._backend.write_zeroes(offset, length)
            elif what < 0.15:
                await self._backend.discard(offset, length)
            else:
                await self._write(offset, rng.randbytes(length))
            await asyncio.sleep(0)

    async def _write(self, offset: int, data: bytes) -> None:
        extents = self._backend.use_map().extents
        if not (self._native and await asyncio.to_thread(extents.pwrite, offset, data)):
            await self._backend.pwrite(offset, data)


@pytest.mark.parametrize("native", [False, True], ids=["python", "native"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_backups_of_one_disk_each_keep_their_own_instant(tmpfs: Path, seed: int, count: int, native: bool) -> None:
    rng = random.Random(seed * 10 + count)

    @in_loop
    async def run() -> None:
        names = [f"t{number}" for number in range(count)]
        if native:
            nodes = []
            for name in ("disk", *names):
                (tmpfs / name).write_bytes(bytes(SIZE))
                nodes.append({"driver": "file", "node-name": name, "filename": str(tmpfs / name)})
        else:
            nodes = [memory(f"{name}-bytes", SIZE) for name in ("disk", *names)]
            nodes += [{"driver": "shuffle", "node-name": n, "file": f"{n}-bytes"} for n in ("disk", *names)]
        async with graph_of(*nodes) as graph:
            await fill(graph, "disk", pattern(SIZE, seed))
            for name in names:
                await fill(graph, name, NOTHING * SIZE)
            if not native:
                for name in ("disk", *names):
                    graph.node(name).driver.rng = random.Random(rng.random())  # type: ignore[attr-defined]
            await graph.add_bitmap("disk", "b0", granularity=CLUSTER)
            guests = [Guest(await graph.backend("disk", writable=True), rng.randrange(1 << 30), native=native)]
            guests.append(Guest(await graph.backend("disk", writable=True), rng.randrange(1 << 30), native=native))
            writing = [asyncio.ensure_future(guest.run()) for guest in guests]
            manager = JobManager(graph)
            jobs: dict[str, tuple[BackupJob, Instant, str]] = {}
            for name in names:
                for _ in range(rng.randrange(60)):
                    await asyncio.sleep(0)
                sync = rng.choice(["full", "incremental", "differential"])
                job, instant = await started(graph, manager, name, sync, auto_finalize=False)
                jobs[name] = job, instant, sync
            ending = list(jobs.values())
            rng.shuffle(ending)  # filters are taken out in any order, while others copy
            for job, _, _ in ending:
                while not (job.state == "pending" or job.ending):
                    await settle()
                job.finalize()
                await job.wait()
                assert job.error is None
            for guest in guests:
                guest.going = False
            await asyncio.gather(*writing)
            assert not [node.name for node in graph.nodes() if node.driver.name == "backup-top"]
            for name, (_, instant, sync) in jobs.items():
                if not native:
                    graph.node(name).driver.rng = None  # type: ignore[attr-defined]
                assert await content(graph, name) == instant.expected(sync), name

    run()


@in_loop
async def test_bitmap_shared_by_jobs_is_cleared_when_the_last_has_succeeded() -> None:
    async with graph_of(*(memory(name, SIZE) for name in ("disk", "t0", "t1", "t2"))) as graph:
        guest = await graph.backend("disk", writable=True)
        await graph.add_bitmap("disk", "b0", granularity=CLUSTER)
        manager = JobManager(graph)
        jobs = []
        for number in range(3):
            await guest.pwrite(number * CLUSTER, b"x")
            sync = "differential" if number == 1 else "incremental"
            job, _ = await started(graph, manager, f"t{number}", sync, auto_finalize=False)
            jobs.append(job)
        bitmap = graph.bitmap("disk", "b0")
        assert bitmap.holders == ["job 't0'", "job 't1'", "job 't2'"]
        await guest.pwrite(3 * CLUSTER, b"x")
        for job in jobs:
            while job.state != "pending":
                await settle()
        marked = {number * CLUSTER for number in range(4)}
        jobs[2].finalize()
        await jobs[2].wait()
        assert {at for at in range(0, SIZE, CLUSTER) if bitmap.contents().get(at)} == marked  # t0 wants to clear, too
        jobs[0].finalize()
        await jobs[0].wait()
        # What came after the earliest of those that succeeded: fit for a next backup after either.
        assert {at for at in range(0, SIZE, CLUSTER) if bitmap.contents().get(at)} == marked - {0}
        jobs[1].finalize()
        await jobs[1].wait()
        assert {at for at in range(0, SIZE, CLUSTER) if bitmap.contents().get(at)} == marked - {0}
