# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The point in time holds: many writers, discards and zeroes against a running backup, in many interleavings.

    guest --> top --file----> disk (shuffle) --> raw or qcow2 over a file, or memory
               `--target---> target (shuffle) -> the same

Each seed is one interleaving: the shuffle filters let requests overtake each other, and fail, as a random generator
says. In memory everything is deterministic. The reference is taken at the instant the filter goes in, by the test and
with another program's eyes: from the bytes below the disk.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.backup import CLUSTER, Shuffle, content, fill, memory
from helpers.loop import driver_of, graph_of, in_loop

from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.block_copy import BlockCopy
from blockgraph.create import create_file
from blockgraph.errors import IOFailure
from blockgraph.filters.backup_top import BackupTop
from blockgraph.flags import Flag
from blockgraph.jobs.job import Job
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions

#: A tail cluster that is cut by the end.
SIZE = 12 * CLUSTER + 5 * 512
BLOCK = 4096
WRITERS = 5


class Guest:
    """Writers of disjoint blocks, so that what the disk holds in the end is known.

    Attributes:
        model: what the disk holds, as far as requests have ended.
        errors: requests that failed and were tried again.
    """

    def __init__(self, graph: AsyncGraph, backend: Backend, model: bytes, seed: int) -> None:
        self.backend = backend
        self._bytes = graph.node("disk-bytes" if graph.model.has("disk-bytes") else "disk")
        self.model = bytearray(model)
        self.errors = 0
        self._seed = seed

    async def run(self, requests: int) -> None:
        """Every writer does so many requests."""
        await asyncio.gather(*(self._write(number, requests) for number in range(WRITERS)))

    async def _write(self, number: int, requests: int) -> None:
        rng = random.Random(self._seed * 100 + number)
        blocks = list(range(number * BLOCK, SIZE, WRITERS * BLOCK))
        for _ in range(requests):
            start = rng.choice(blocks)
            end = min(start + BLOCK, SIZE)
            offset = rng.randrange(start, end)
            length = rng.randint(1, end - offset)
            await self._request(rng, offset, length)

    async def _request(self, rng: random.Random, offset: int, length: int) -> None:
        kind = rng.choice(["write", "write", "write", "zero", "unmap", "discard", "flush"])
        data = rng.randbytes(length)
        while True:
            try:
                if kind == "write":
                    await self.backend.pwrite(offset, data)
                elif kind in ("zero", "unmap"):
                    flags = Flag.MAY_UNMAP if kind == "unmap" else Flag.NONE
                    await self.backend.write_zeroes(offset, length, flags)
                elif kind == "discard":
                    await self.backend.discard(offset, length)
                else:
                    await self.backend.flush()
            except IOFailure:
                self.errors += 1
                continue
            break
        if kind == "write":
            self.model[offset : offset + length] = data
        elif kind in ("zero", "unmap"):
            self.model[offset : offset + length] = bytes(length)
        elif kind == "discard":  # any old contents or zeroes
            await self._bytes.pread(offset, memoryview(self.model)[offset : offset + length])


class Reference:
    """What the disk held when a backup-top went in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.old = b""
        attached = BackupTop.attached

        async def taking(top: BackupTop) -> None:
            await attached(top)
            data = bytearray(top.size())
            below = top.file.node
            if isinstance(below.driver, Shuffle):
                below = below.driver.file.node
            await below.pread(0, memoryview(data))
            self.old = bytes(data)

        monkeypatch.setattr(BackupTop, "attached", taking)


def random_disk(rng: random.Random) -> bytes:
    """Clusters of noise, of zeroes, and of both."""
    data = bytearray(rng.randbytes(SIZE))
    for _ in range(4):
        start = rng.randrange(SIZE)
        length = min(rng.randrange(3 * CLUSTER), SIZE - start)
        data[start : start + length] = bytes(length)
    return bytes(data)


async def no_wait(_: float) -> None:
    """Instead of the pause before an ignored error is tried again."""
    await asyncio.sleep(0)


async def meddle(job: Job, rng: random.Random) -> None:
    """Pause and resume the job now and then."""
    while not job.ending:
        for _ in range(rng.randrange(40)):
            await asyncio.sleep(0)
        if job.state != "running":
            return
        job.pause()
        for _ in range(rng.randrange(40)):
            await asyncio.sleep(0)
        job.resume()


async def backup(
    graph: AsyncGraph, guest: Guest, rng: random.Random, *, fail_rate: float = 0.0, meddling: bool = False
) -> tuple[Job, BlockCopy]:
    """Write and back up at the same time; returns when both have ended."""
    shuffles = [node.driver for node in graph.nodes() if isinstance(node.driver, Shuffle)]
    for shuffle in shuffles:
        shuffle.rng = rng
    before = asyncio.ensure_future(guest.run(8))
    for _ in range(rng.randrange(60)):
        await asyncio.sleep(0)
    job = await JobManager(graph).backup(
        BackupOptions(
            device="disk",
            target="target",
            sync="full",
            filter_node_name="top",
            on_source_error="ignore",
            on_target_error="ignore",
            max_workers=rng.randint(1, 6),
            max_chunk=rng.choice([CLUSTER, 3 * CLUSTER, 0]),
        )
    )
    assert job._loop is not None
    job._loop.sleep = no_wait
    copy = driver_of(graph, "top", BackupTop).copy
    for shuffle in shuffles:
        shuffle.reads.clear()
        shuffle.fail_rate = fail_rate if shuffle.node.name == "target" else 0.0
    meddler = asyncio.ensure_future(meddle(job, rng)) if meddling else None
    await before
    await guest.run(8)
    await job.wait()
    if meddler is not None:
        await meddler
    for shuffle in shuffles:
        shuffle.rng = None
    return job, copy


Layer = Callable[[Path, str], Any]


async def in_memory(_: Path, name: str) -> dict[str, Any]:
    """A disk in memory."""
    return memory(name, SIZE)


async def in_blocks(_: Path, name: str) -> dict[str, Any]:
    """A disk in memory that takes blocks of 4096 bytes: whoever writes less reads, too, and holds the block."""
    return {"driver": "inject-error", "node-name": name, "align": 4096, "image": {"driver": "memory", "size": SIZE}}


async def raw_file(directory: Path, name: str) -> dict[str, Any]:
    """A raw image."""
    path = directory / f"{name}.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return {"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": str(path)}}


async def qcow2_file(directory: Path, name: str) -> dict[str, Any]:
    """A qcow2 image of clusters smaller than those that are copied."""
    path = str(directory / f"{name}.qcow2")
    await create_file(path, SIZE, "qcow2", replace=True, cluster_size=4096)
    return {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": path}}


async def qcow2_large(directory: Path, name: str) -> dict[str, Any]:
    """A qcow2 image of clusters larger than those that are copied elsewhere."""
    path = str(directory / f"{name}.qcow2")
    await create_file(path, SIZE, "qcow2", replace=True, cluster_size=4 * CLUSTER)
    return {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": path}}


async def interleave(
    seed: int, monkeypatch: pytest.MonkeyPatch, directory: Path, disk: Layer, target: Layer, **how: Any
) -> None:
    """One interleaving, from start to the comparison."""
    rng = random.Random(seed)
    nodes = []
    for name, layer in (("disk", disk), ("target", target)):
        nodes += [
            await layer(directory, f"{name}-bytes"),
            {"driver": "shuffle", "node-name": name, "file": f"{name}-bytes"},
        ]
    with monkeypatch.context() as patch:
        reference = Reference(patch)
        async with graph_of(*nodes) as graph:
            await judge(graph, rng, seed, reference, **how)
            # The comparison has read each once more.
            if not how.get("fail_rate") and disk is not in_blocks:
                assert max(driver_of(graph, "disk", Shuffle).reads.values()) <= 2


async def judge(graph: AsyncGraph, rng: random.Random, seed: int, reference: Reference, **how: Any) -> None:
    """Run, and compare."""
    first = random_disk(rng)
    guest = Guest(graph, await graph.backend("disk", writable=True), first, seed)
    await fill(graph, "disk", first)
    await fill(graph, "target", rng.randbytes(SIZE))
    job, copy = await backup(graph, guest, rng, **how)
    assert job.error is None
    assert not graph.model.has("top")
    assert await content(graph, "target") == reference.old
    assert await content(graph, "disk") == bytes(guest.model)
    assert copy.bytes_copied == SIZE
    assert job.progress.current == job.progress.total == SIZE
    if not how.get("fail_rate"):
        assert guest.errors == 0
        assert copy.bytes_moved <= SIZE


@pytest.mark.parametrize("chunk", range(10))
def test_point_in_time_in_memory(chunk: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @in_loop
    async def run() -> None:
        for seed in range(chunk * 20, chunk * 20 + 20):
            await interleave(seed, monkeypatch, tmp_path, in_memory, in_memory)

    run()


@pytest.mark.parametrize("chunk", range(5))
def test_point_in_time_with_errors_and_pauses(chunk: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @in_loop
    async def run() -> None:
        for seed in range(1000 + chunk * 20, 1020 + chunk * 20):
            await interleave(seed, monkeypatch, tmp_path, in_memory, in_memory, fail_rate=0.2, meddling=True)

    run()


@pytest.mark.parametrize("chunk", range(3))
def test_point_in_time_in_blocks(chunk: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @in_loop
    async def run() -> None:
        for seed in range(6000 + chunk * 10, 6010 + chunk * 10):
            await interleave(seed, monkeypatch, tmp_path, in_blocks, in_blocks, meddling=True)

    run()


PAIRS = {
    "raw-to-raw": (raw_file, raw_file),
    "raw-to-qcow2": (raw_file, qcow2_file),
    "raw-to-large-clusters": (raw_file, qcow2_large),
    "qcow2-to-raw": (qcow2_file, raw_file),
    "qcow2-to-qcow2": (qcow2_file, qcow2_file),
    "large-to-small-clusters": (qcow2_large, qcow2_file),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_point_in_time_of_images(pair: str, monkeypatch: pytest.MonkeyPatch, tmpfs: Path) -> None:
    @in_loop
    async def run() -> None:
        for seed in range(2000, 2006):
            await interleave(seed, monkeypatch, tmpfs, *PAIRS[pair])
        for seed in range(2100, 2104):
            await interleave(seed, monkeypatch, tmpfs, *PAIRS[pair], fail_rate=0.1, meddling=True)

    run()


@pytest.mark.parametrize("pair", PAIRS)
def test_point_in_time_of_images_copied_natively(pair: str, monkeypatch: pytest.MonkeyPatch, tmpfs: Path) -> None:
    """Without filters in the way: worker threads copy, and decide the order."""
    disk, target = PAIRS[pair]

    @in_loop
    async def run() -> None:
        for seed in range(3000, 3008):
            with monkeypatch.context() as patch:
                reference = Reference(patch)
                async with graph_of(await disk(tmpfs, "disk"), await target(tmpfs, "target")) as graph:
                    await judge(graph, random.Random(seed), seed, reference, meddling=seed % 2 == 0)

    run()


@pytest.mark.parametrize("chunk", range(5))
def test_cancel_anywhere_leaves_the_disk_to_its_guest(
    chunk: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def one(seed: int) -> None:
        rng = random.Random(seed)
        nodes = []
        for name in ("disk", "target"):
            nodes += [memory(f"{name}-bytes", SIZE), {"driver": "shuffle", "node-name": name, "file": f"{name}-bytes"}]
        async with graph_of(*nodes) as graph:
            first = random_disk(rng)
            guest = Guest(graph, await graph.backend("disk", writable=True), first, seed)
            await fill(graph, "disk", first)
            for name in ("disk", "target"):
                driver_of(graph, name, Shuffle).rng = rng
            writing = asyncio.ensure_future(guest.run(12))
            job = await JobManager(graph).backup(BackupOptions(device="disk", target="target", sync="full"))
            for _ in range(rng.randrange(300)):
                await asyncio.sleep(0)
            if rng.random() < 0.3 and job.state == "running":
                job.pause()
                await asyncio.sleep(0)
            if not job.ending:
                job.cancel()
            await job.wait()
            assert {vertex.name for vertex in graph.model.nodes()} == {node["node-name"] for node in nodes}
            assert [root.name for root in graph.model.roots()] == [guest.backend.name]
            await writing
            assert guest.errors == 0
            assert await content(graph, "disk") == bytes(guest.model)

    @in_loop
    async def run() -> None:
        for seed in range(4000 + chunk * 20, 4020 + chunk * 20):
            await one(seed)

    run()


@pytest.mark.parametrize("chunk", range(5))
def test_readers_of_the_snapshot_always_see_the_point_in_time(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def read(backend: Backend, rng: random.Random, old: bytes) -> None:
        for _ in range(30):
            offset = rng.randrange(SIZE)
            length = rng.randint(1, min(3 * CLUSTER, SIZE - offset))
            assert await backend.pread(offset, length) == old[offset : offset + length]
            status = await backend.block_status(offset, length)
            if status.zero:
                assert not any(old[offset : offset + status.length])

    async def one(seed: int, reference: Reference) -> None:
        rng = random.Random(seed)
        nodes = []
        for name in ("disk", "target"):
            nodes += [memory(f"{name}-bytes", SIZE), {"driver": "shuffle", "node-name": name, "file": f"{name}-bytes"}]
        async with graph_of(*nodes) as graph:
            first = random_disk(rng)
            guest = Guest(graph, await graph.backend("disk", writable=True), first, seed)
            await fill(graph, "disk", first)
            for name in ("disk", "target"):
                driver_of(graph, name, Shuffle).rng = rng
            writing = asyncio.ensure_future(guest.run(20))
            await asyncio.sleep(0)
            await graph.insert_filter(
                {"driver": "backup-top", "node-name": "top", "file": "disk", "target": "target"}, above="disk"
            )
            await graph.add_node({"driver": "snapshot-access", "node-name": "fleece", "file": "top"})
            reader = await graph.backend("fleece")
            reads = [read(reader, random.Random(seed + number), reference.old) for number in range(3)]
            job = None
            if seed % 2:
                job = await JobManager(graph).backup(BackupOptions(device="top", sync="full", max_chunk=CLUSTER))
            await asyncio.gather(*reads)
            await writing
            if job is not None:
                await job.wait()
                assert await content(graph, "target") == reference.old
            assert await content(graph, "disk") == bytes(guest.model)

    @in_loop
    async def run() -> None:
        for seed in range(5000 + chunk * 10, 5010 + chunk * 10):
            with monkeypatch.context() as patch:
                await one(seed, Reference(patch))

    run()
