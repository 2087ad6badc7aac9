# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Short runs here and there: looked up and copied natively, many at once, and never otherwise than one by one."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest
from helpers.backup import CLUSTER, pattern
from helpers.loop import driver_of, graph_of, in_loop

from blockgraph.api import AsyncGraph
from blockgraph.create import create_file
from blockgraph.formats.qcow2.driver import Qcow2
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions
from blockgraph.native import Bitmap, Copier, CopierMode, CopierSide, ExtentMap, L2Parts, MapExtent

#: An L2 table is for 2 MiB.
IMAGE_CLUSTER = 4096
SIZE = 96 << 20
RUNS = SIZE // CLUSTER


def image(path: Path, name: str, **more: Any) -> dict[str, Any]:
    """A description of a qcow2 image."""
    return {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": str(path / name)}, **more}


def raw(path: Path, name: str) -> dict[str, Any]:
    """A description of a raw file."""
    return {"driver": "file", "node-name": name, "filename": str(path / name)}


async def create(path: Path, name: str, driver: str = "qcow2", **options: Any) -> None:
    """An empty image, of small clusters if it has any."""
    if driver == "qcow2":
        options["cluster_size"] = IMAGE_CLUSTER
    await create_file(str(path / name), SIZE, driver, replace=False, **options)


async def create_full(path: Path) -> bytes:
    """An image "disk" without holes, and a new "target"; returns what the disk holds."""
    held = pattern(SIZE)
    await create(path, "disk")
    await create(path, "target", "raw")
    async with graph_of(image(path, "disk")) as graph:
        guest = await graph.backend("disk", writable=True)
        await guest.pwrite(0, held)
        await graph.close_backend(guest)
    return held


async def scribble(graph: AsyncGraph, node: str, rng: random.Random, held: bytearray) -> None:
    """Data and zeroes of all lengths, at places of no alignment."""
    guest = await graph.backend(node, writable=True)
    for _ in range(400):
        length = rng.choice([512, 5000, IMAGE_CLUSTER, 3 * IMAGE_CLUSTER, CLUSTER])
        offset = rng.randrange((SIZE - length) // 512) * 512
        if rng.random() < 0.25:
            await guest.write_zeroes(offset, length)
            data = bytes(length)
        else:
            data = rng.randbytes(length)
            await guest.pwrite(offset, data)
        held[offset : offset + length] = data
    await graph.close_backend(guest)


async def back_up(graph: AsyncGraph, marked: list[int], **more: Any) -> None:
    """These clusters of "disk" to "target"."""
    bitmap = await graph.add_bitmap("disk", "b", granularity=CLUSTER)
    for cluster in marked:
        bitmap.record(cluster * CLUSTER, CLUSTER)
    options = BackupOptions(device="disk", target="target", sync="differential", bitmap="b", **more)
    job = await JobManager(graph).backup(options)
    await job.wait()
    assert job.error is None


def expected(held: bytes | bytearray, marked: list[int]) -> bytes:
    """What the target holds then."""
    target = bytearray(SIZE)
    for cluster in marked:
        part = slice(cluster * CLUSTER, (cluster + 1) * CLUSTER)
        target[part] = held[part]
    return bytes(target)


@pytest.mark.parametrize("cached", [False, True], ids=["tables-on-disk", "tables-changed-in-memory"])
@pytest.mark.parametrize("backed", [False, True], ids=["alone", "with-backing"])
@pytest.mark.parametrize("workers", [1, 4])
@in_loop
async def test_scattered_runs_of_an_image_are_copied(tmpfs: Path, cached: bool, backed: bool, workers: int) -> None:
    rng = random.Random(workers)
    held = bytearray(SIZE)
    await create(tmpfs, "disk")
    await create(tmpfs, "target", "raw")
    disk = image(tmpfs, "disk", backing=None)
    if backed:
        await create(tmpfs, "base")
        async with graph_of(image(tmpfs, "base")) as graph:
            await scribble(graph, "base", rng, held)
        disk["backing"] = image(tmpfs, "base", **{"read-only": True})
    async with graph_of(disk) as graph:
        await scribble(graph, "disk", rng, held)
    marked = sorted(rng.sample(range(RUNS), RUNS // 3))
    async with graph_of(disk, raw(tmpfs, "target")) as graph:
        if cached:
            await scribble(graph, "disk", rng, held)
        await back_up(graph, marked, max_workers=workers)
    assert (tmpfs / "target").read_bytes() == expected(held, marked)


@in_loop
async def test_lookup_reads_entries_and_no_tables(tmpfs: Path) -> None:
    """What a backup wants to know of an image does not push out what the guest uses."""
    held = await create_full(tmpfs)
    marked = list(range(0, RUNS, 32))  # one in each table
    async with graph_of(image(tmpfs, "disk", **{"read-only": True}), raw(tmpfs, "target")) as graph:
        tables = driver_of(graph, "disk", Qcow2).mapping.tables
        await back_up(graph, marked, max_workers=1)
        loaded = [index for index in range(len(marked)) if tables.get(index) is not None]
        assert loaded == [0]  # it makes the nodes known to the map
    assert (tmpfs / "target").read_bytes() == expected(held, marked)


@in_loop
async def test_lookup_leaves_out_a_table_that_lacked_native_writes(
    tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come into the table, and it goes to disk and out of memory, all while its entries are being read."""
    await create(tmpfs, "disk")
    async with graph_of(image(tmpfs, "disk")) as graph:
        guest = await graph.backend("disk", writable=True)
        extents = guest.use_map().extents
        await guest.pwrite(0, b"a" * IMAGE_CLUSTER)
        await guest.flush()
        driver = driver_of(graph, "disk", Qcow2)
        driver.mapping.tables.forget(0)
        assert extents.pwrite(IMAGE_CLUSTER, b"b" * IMAGE_CLUSTER)
        assert driver.mapping.is_behind(0)
        loop = asyncio.get_running_loop()

        async def write_back() -> None:
            await driver.writeback.run()
            driver.mapping.tables.forget(0)

        read_at_last = L2Parts.read

        def read(parts: L2Parts, fd: int) -> None:
            read_at_last(parts, fd)
            asyncio.run_coroutine_threadsafe(write_back(), loop).result()

        monkeypatch.setattr(L2Parts, "read_now", lambda parts, fd: False)
        monkeypatch.setattr(L2Parts, "read", read)
        found = await driver.look_up([(IMAGE_CLUSTER, 2 * IMAGE_CLUSTER), (4 << 20, 5 << 20)])
        assert found is not None
        assert [found.parts.dropped(number) for number in range(2)] == [True, False]


@in_loop
async def test_lookup_keeps_what_a_table_in_memory_said_when_it_goes_meanwhile(
    tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While entries of another table are being read, those of the one that was in memory need no table any more."""
    held = await create_full(tmpfs)
    async with graph_of(image(tmpfs, "disk", **{"read-only": True}), raw(tmpfs, "target")) as graph:
        tables = driver_of(graph, "disk", Qcow2).mapping.tables
        read_at_last, gone = L2Parts.read, []

        def read(parts: L2Parts, fd: int) -> None:
            gone.extend(index for index in parts.indexes if tables.get(index) is not None)
            for index in parts.indexes:
                tables.forget(index)
            read_at_last(parts, fd)

        monkeypatch.setattr(L2Parts, "read_now", lambda parts, fd: False)
        monkeypatch.setattr(L2Parts, "read", read)
        marked = list(range(0, RUNS, 16))  # two in each table, the first of which makes the nodes known
        await back_up(graph, marked, max_workers=1)
        assert gone
    assert (tmpfs / "target").read_bytes() == expected(held, marked)


@pytest.mark.parametrize("seed", range(3))
@in_loop
async def test_guest_writes_meanwhile_are_not_in_the_backup(tmpfs: Path, seed: int) -> None:
    rng = random.Random(seed)
    held = bytearray(SIZE)
    await create(tmpfs, "disk")
    await create(tmpfs, "target", "raw")
    marked = sorted(rng.sample(range(RUNS), RUNS // 3))
    async with graph_of(image(tmpfs, "disk"), raw(tmpfs, "target")) as graph:
        await scribble(graph, "disk", rng, held)
        kept = bytes(held)
        guest = await graph.backend("disk", writable=True)
        guest.use_map()
        bitmap = await graph.add_bitmap("disk", "b", granularity=CLUSTER)
        for cluster in marked:
            bitmap.record(cluster * CLUSTER, CLUSTER)
        options = BackupOptions(device="disk", target="target", sync="differential", bitmap="b")
        job = await JobManager(graph).backup(options)
        job_ended = asyncio.ensure_future(job.wait())
        while not job_ended.done():
            offset, data = rng.randrange(SIZE // 512 - 16) * 512, rng.randbytes(8192)
            if not await asyncio.to_thread(guest.use_map().extents.pwrite, offset, data):
                await guest.pwrite(offset, data)
            held[offset : offset + len(data)] = data
        await job_ended
        assert job.error is None
        assert await guest.pread(0, SIZE) == held
        await graph.close_backend(guest)
    assert (tmpfs / "target").read_bytes() == expected(kept, marked)


class Sides:
    """A copier over two files of 16 clusters, whose maps know nothing yet."""

    def __init__(self, path: Path) -> None:
        self.size = 16 * CLUSTER
        self.old = pattern(self.size)
        (path / "source").write_bytes(self.old)
        (path / "target").write_bytes(bytes(self.size))
        self.fds = [os.open(path / name, os.O_RDWR) for name in ("source", "target")]
        self.todo, self.done = Bitmap(self.size, CLUSTER), Bitmap(self.size, CLUSTER)
        self.source, self.target = ExtentMap(self.size, 1 << 20), ExtentMap(self.size, 1 << 20)
        self.copier = Copier(self.todo, self.done, self.source, self.target)
        self.copier.set_mode(CopierMode.ON)
        self.path = path

    def learn(self, extents: ExtentMap, first: int, end: int) -> None:
        """Enter clusters [first, end)."""
        fd = self.fds[extents is self.target]
        slot = extents.add_slot(fd)
        found = MapExtent(first * CLUSTER, (end - first) * CLUSTER, slot, first * CLUSTER, extents is self.target)
        assert extents.insert(extents.generation(), [found]) == 1

    def mark(self, *clusters: int) -> None:
        """These are to be copied."""
        for cluster in clusters:
            self.todo.set(cluster * CLUSTER, CLUSTER)

    def close(self) -> None:
        """The descriptors."""
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def sides(tmpfs: Path) -> Any:
    made = Sides(tmpfs)
    yield made
    made.close()


def test_runs_are_found_up_to_a_long_one_a_number_or_a_size(sides: Sides) -> None:
    sides.mark(1, 3, 4, 6, 8, 9, 10, 11)
    find = sides.copier.find_runs
    bounds = [(runs.start // CLUSTER, runs.end // CLUSTER, len(runs)) for runs in (find(0, 4 * CLUSTER, 1 << 30, 9),)]
    assert bounds == [(1, 7, 3)]
    assert len(find(0, 5 * CLUSTER, 1 << 30, 9)) == 4
    assert len(find(0, 5 * CLUSTER, 1 << 30, 2)) == 2
    cut = find(0, 5 * CLUSTER, 2 * CLUSTER, 9)
    assert (len(cut), cut.end) == (2, 4 * CLUSTER)
    assert not find(7 * CLUSTER, 4 * CLUSTER, 1 << 30, 9)
    with pytest.raises(ValueError, match="no runs"):
        find(0, 5 * CLUSTER, CLUSTER - 1, 9)


@in_loop
async def test_runs_that_the_maps_do_not_know_are_left(sides: Sides) -> None:
    sides.mark(1, 3, 5)
    sides.learn(sides.source, 0, 4)
    sides.learn(sides.target, 2, 16)
    runs = sides.copier.find_runs(0, 1 << 30, 1 << 30, 9)
    assert sides.copier.check_runs(runs) == CopierSide.SOURCE | CopierSide.TARGET
    assert runs.unmapped(CopierSide.SOURCE) == [(5 * CLUSTER, 6 * CLUSTER)]
    assert runs.unmapped(CopierSide.TARGET) == [(CLUSTER, 2 * CLUSTER)]
    assert await sides.copier.copy_runs(runs) == (False, CLUSTER, CLUSTER)
    assert runs.missed() == CLUSTER
    assert runs.released() == [(3 * CLUSTER, 4 * CLUSTER)]
    assert list(sides.todo.dirty_extents()) == [(CLUSTER, CLUSTER), (5 * CLUSTER, CLUSTER)]
    assert (sides.path / "target").read_bytes()[3 * CLUSTER : 4 * CLUSTER] == sides.old[3 * CLUSTER : 4 * CLUSTER]


@in_loop
async def test_what_others_copy_or_read_is_not_released(sides: Sides) -> None:
    sides.mark(1, 2, 3, 5)
    for extents in (sides.source, sides.target):
        sides.learn(extents, 0, 16)
    runs = sides.copier.find_runs(0, 1 << 30, 1 << 30, 9)
    theirs = sides.copier.take(2 * CLUSTER, 3 * CLUSTER)
    frozen = sides.copier.freeze(5 * CLUSTER + 7, 1)
    assert theirs is not None
    assert await sides.copier.copy_runs(runs) == (True, 3 * CLUSTER, 3 * CLUSTER)
    assert runs.released() == []
    assert list(sides.done.dirty_extents()) == [(CLUSTER, CLUSTER), (3 * CLUSTER, CLUSTER)]
    sides.copier.thaw(frozen)
    sides.copier.finish(theirs.number, copied=False)
    assert list(sides.todo.dirty_extents()) == [(2 * CLUSTER, CLUSTER)]


@in_loop
async def test_what_a_slow_guest_write_has_made_done_is_not_released_to_native_ones_while_it_is_read(
    sides: Sides,
) -> None:
    """Python's guest write has copied, and waits for the reader; a native one must do so, too."""
    sides.mark(1)
    for extents in (sides.source, sides.target):
        sides.learn(extents, 0, 16)
    runs = sides.copier.find_runs(0, 1 << 30, 1 << 30, 9)
    frozen = sides.copier.freeze(CLUSTER, CLUSTER)
    assert sides.copier.copy(CLUSTER, 2 * CLUSTER).whole
    sides.done.set(CLUSTER, CLUSTER)
    assert (await sides.copier.copy_runs(runs)).whole
    assert runs.released() == []
    sides.copier.thaw(frozen)
    assert (await sides.copier.copy_runs(runs)).whole
    assert runs.released() == [(CLUSTER, 2 * CLUSTER)]
