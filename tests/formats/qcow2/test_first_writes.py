# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""First writes by native threads: compared with a bytearray, with writes in Python, and judged by QEMU."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import require_tool
from helpers.harness import EVERYTHING, edge, opened
from helpers.loop import in_loop
from helpers.qcow2 import QEMU, check, create, described, over, qemu_img
from helpers.qcow2 import disk as disk_over
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import blockgraph
from blockgraph.api import SyncBackend, SyncGraph
from blockgraph.backend import Backend
from blockgraph.create import create_file
from blockgraph.errors import CorruptImage, NoSpace
from blockgraph.flags import Flag
from blockgraph.formats.qcow2 import Qcow2, first_writes
from blockgraph.formats.qcow2.refcount import Room
from blockgraph.native import Zeroing
from blockgraph.protocols.file import File

CLUSTER = 64 << 10
SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None


def make(path: Path, size: int, **options: Any) -> Path:
    """A new image."""
    asyncio.run(create_file(str(path), size, "qcow2", replace=True, **options))
    return path


def backing(path: Path) -> dict[str, Any]:
    """A read-only raw file."""
    return {
        "driver": "raw",
        "node-name": "base",
        "read-only": True,
        "file": {"driver": "file", "filename": str(path), "read-only": True},
    }


@pytest.mark.parametrize("kind", ["short", "small clusters"])
def test_extents_that_meet_inside_a_cluster(tmpfs: Path, kind: str) -> None:
    """The backing file ends there, or has smaller clusters: a write of both finds room for the cluster once."""
    edge_at = 100 << 10
    base = tmpfs / "base"
    if kind == "short":
        base.write_bytes(base_bytes(edge_at))
        below = backing(base)
    else:
        make(base, 1 << 20, cluster_size=4096)
        with blockgraph.open({"nodes": [described(base)]}) as graph:
            graph.backend("disk", writable=True).pwrite(0, base_bytes(edge_at))
        below = {**described(base), "node-name": "base", "read-only": True}
    image = make(tmpfs / "disk", 1 << 20)
    with blockgraph.open({"nodes": [described(image, backing=below)]}) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pwrite(512 << 10, b"x" * 512)  # has the reserve filled
        disk.pread(edge_at - 512, 512)
        disk.pread(edge_at, 512)
        extents = [disk._extents.find(at) for at in (edge_at - 512, edge_at)]
        assert [each.allocate for each in extents if each is not None] == [True, True]
        assert extents[0] != extents[1]
        with ThreadPoolExecutor() as pool:
            assert pool.submit(disk._extents.pwrite, edge_at - 512, b"n" * 1024).result(20)
        assert disk.pread(0, 2 * CLUSTER) == base_bytes(edge_at)[:-512] + b"n" * 1024 + bytes(
            2 * CLUSTER - edge_at - 512
        )


def test_end_of_the_file_inside_a_cluster_is_not_overstepped(tmpfs: Path) -> None:
    """Two extent maps: no native first writes. What one of them, or native code, writes there is seen by all."""
    cluster = 4096
    path = make(tmpfs / "disk", 8 << 20, cluster_size=cluster)
    with blockgraph.open({"nodes": [described(path)]}) as graph:
        disk, other = graph.backend("disk", writable=True), graph.backend("disk", writable=True)
        disk.pwrite(0, b"a" * cluster)
        other.pread(0, cluster)
        for i in range(2, 200, 2):  # a table of short runs
            disk.pwrite(i * cluster, b"a" * cluster)
        at = 300 * cluster
        disk.pwrite(at, b"h" * 512)  # the end of the file is in this cluster
        for i in range(40):  # until all of the table is entered
            disk.pread((2 + 4 * i) * cluster, 512)
        assert other.pread(at + 512, 1024) == bytes(1024)
        disk.pwrite(at + 512, b"T" * 1024)
        for reader in (other, disk, graph.backend("disk")):
            assert reader.pread(at, 2048) == b"h" * 512 + b"T" * 1024 + bytes(512)
            assert graph.call(reader._backend.pread(at, 2048)) == b"h" * 512 + b"T" * 1024 + bytes(512)


def qcow2_of(graph: SyncGraph, node: str = "disk") -> Qcow2:
    """The driver of a node."""
    driver = graph.graph.node(node).driver
    assert isinstance(driver, Qcow2)
    return driver


def base_bytes(length: int) -> bytes:
    """No byte is zero, and no two clusters are alike."""
    return bytes((i * 7 + i // 512) % 255 + 1 for i in range(length))


@pytest.fixture(params=[0, 700 << 10, 2 << 20], ids=["alone", "short-backing", "backing"])
def base(request: pytest.FixtureRequest, tmpfs: Path) -> tuple[bytes, dict[str, Any]]:
    """Bytes of a backing file, and options of the node for it."""
    data = base_bytes(request.param)
    if data:
        (tmpfs / "base").write_bytes(data)
    return data, {"backing": backing(tmpfs / "base")} if data else {"backing": None}


@QEMU
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_first_writes_are_native_and_keep_the_rest_of_their_clusters(
    tmpfs: Path, base: tuple[bytes, dict[str, Any]], cluster_size: int
) -> None:
    size = (1 << 20) + 1536  # the last cluster is cut off
    data, options = base
    names = {"backing_file": str(tmpfs / "base"), "backing_fmt": "raw"} if data else {}
    image = make(tmpfs / "disk", size, cluster_size=cluster_size, **names)
    model = bytearray(data[:size].ljust(size, b"\0"))
    rng = random.Random(cluster_size)
    with blockgraph.open({"nodes": [described(image, **options)]}) as graph:
        with graph.backend("disk", writable=True) as disk:
            for number in range(100):
                offset = rng.randrange(size - 1)
                length = min(rng.choice([1, 512, 4096, 70_000]), size - offset)
                block = bytes([number + 1]) * length
                disk.pwrite(offset, block)
                model[offset : offset + length] = block
            assert disk.stats().first_writes > 10
            assert b"".join(disk.pread(at, min(CLUSTER, size - at)) for at in range(0, size, CLUSTER)) == model
        driver = qcow2_of(graph)
        assert driver.node.maps == []
        assert driver.first_writes is not None
        assert driver.first_writes.reserve == 0
    check(image)
    (tmpfs / "raw").write_bytes(model)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", image, tmpfs / "raw")


def test_first_write_is_seen_by_block_status_and_by_another_root(tmpfs: Path) -> None:
    with blockgraph.open({"nodes": [described(make(tmpfs / "disk", 4 << 20))]}) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pwrite(0, b"a" * CLUSTER)
        disk.pwrite(5 * CLUSTER, b"b" * 10)
        assert disk.stats().first_writes == 1
        assert disk.block_status(5 * CLUSTER, CLUSTER).data
        assert disk.block_status(6 * CLUSTER, CLUSTER).zero
        other = graph.backend("disk", writable=True)
        assert other.pread(5 * CLUSTER, 12) == b"b" * 10 + b"\0\0"
        # Two maps lead here now: neither would learn of the other's first writes.
        for root, cluster in ((disk, 7), (other, 8), (disk, 9)):
            root.pwrite(cluster * CLUSTER, bytes([cluster]))
        assert disk.stats().first_writes == 1
        assert other.stats().first_writes == 0
        for cluster in (7, 8, 9):
            assert disk.pread(cluster * CLUSTER, 2) == other.pread(cluster * CLUSTER, 2) == bytes([cluster, 0])


@pytest.mark.parametrize("cluster_size", [4096, 65536])
def test_later_native_write_behind_the_end_of_the_file_is_seen_by_python(tmpfs: Path, cluster_size: int) -> None:
    image = make(tmpfs / "disk", 4 << 20, cluster_size=cluster_size)
    with blockgraph.open({"nodes": [described(image)]}) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pwrite(0, b"a" * cluster_size)
        at = 5 * cluster_size
        disk.pwrite(at, b"b" * 10)
        # The link is taken: Python knows where the cluster is. The file ends inside it.
        disk.block_status(at, 1)
        stats, length = disk.stats(), image.stat().st_size
        disk.pwrite(at + 3000, b"c" * 10)
        assert stats.first_writes == 1
        assert disk.stats().hits == stats.hits + 1
        assert image.stat().st_size == length + 3000
        other = graph.backend("disk")
        expected = (b"b" * 10).ljust(3000, b"\0") + b"c" * 10
        assert other.pread(at, 3010) == expected
        assert other.stats().hits == 0
        status = other.block_status(at + 3000, 10)
        assert status.data
        assert not status.zero
        assert status.length == 10
    with blockgraph.open({"nodes": [described(image, **{"read-only": True})]}) as graph:
        assert graph.backend("disk").pread(at, 3010) == expected


def test_disk_that_ends_inside_a_cluster_leaves_the_rest_of_it_alone(tmpfs: Path) -> None:
    """The image is larger than what a node above shows of it: its cluster has more than the disk."""
    (tmpfs / "base").write_bytes(base_bytes(8 * CLUSTER))
    names = {"backing_file": str(tmpfs / "base"), "backing_fmt": "raw"}
    image = described(make(tmpfs / "disk", 8 * CLUSTER, **names), backing=backing(tmpfs / "base"))
    top = {"driver": "raw", "node-name": "top", "size": 3 * CLUSTER + 512, "file": "disk"}
    model = bytearray(base_bytes(8 * CLUSTER))
    with blockgraph.open({"nodes": [image, top]}) as graph:
        disk = graph.backend("top", writable=True)
        for offset in (0, CLUSTER, 3 * CLUSTER, 2 * CLUSTER):
            disk.pread(offset, 512)
            disk.pwrite(offset, b"n" * 100)
            model[offset : offset + 100] = b"n" * 100
        assert disk.stats().first_writes >= 1
        assert graph.backend("disk").pread(0, 8 * CLUSTER) == model
        extents = disk._extents
        assert not extents.zero(3 * CLUSTER, 512, Zeroing.ZERO_RANGE | Zeroing.WRITE)
        disk.write_zeroes(3 * CLUSTER, 512)
        model[3 * CLUSTER : 3 * CLUSTER + 512] = bytes(512)
        assert graph.backend("disk").pread(0, 8 * CLUSTER) == model


KEPT = Zeroing.ZERO_RANGE | Zeroing.WRITE


@QEMU
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_zeroes_of_whole_clusters_are_native_and_keep_their_place(tmpfs: Path, cluster_size: int) -> None:
    clusters = 300  # of 512 bytes: five tables
    size = clusters * cluster_size
    image = make(tmpfs / "disk", size, cluster_size=cluster_size)
    model = bytearray(base_bytes(size))
    with blockgraph.open({"nodes": [described(image)]}) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pwrite(0, bytes(model))
        disk.pread(0, 1)
        extents, before = disk._extents, disk.stats()
        places = [disk.block_status(at * cluster_size, 1).host_offset for at in range(clusters)]
        bitmap = graph.call(graph.graph.add_bitmap("disk", "b0", granularity=4096)).recorder
        disk.pwrite(0, bytes(model[:1]))
        bitmap.clear()
        length = image.stat().st_size
        zeroed = set()
        for first, count in ((3, 1), (7, 1), (62, 5), (200, 64), (299, 1)):
            for cluster in range(first, first + count):
                disk.pread(cluster * cluster_size, 1)
            start, end = first * cluster_size, (first + count) * cluster_size
            assert extents.zero(start, end - start, KEPT)
            model[start:end] = bytes(end - start)
            zeroed.update(range(first, first + count))
            assert bitmap.count() >= end - start
        assert disk.stats().hits > before.hits
        assert not extents.zero(3 * cluster_size, cluster_size, KEPT)  # they are zeroes
        assert not extents.zero(10 * cluster_size, cluster_size, KEPT | Zeroing.PUNCH)  # to be given up
        assert b"".join(disk.pread(at, cluster_size) for at in range(0, size, cluster_size)) == model
        for cluster in range(clusters):
            status = disk.block_status(cluster * cluster_size, 1)
            assert (status.zero, status.host_offset) == (cluster in zeroed, places[cluster])
        assert image.stat().st_size == length
        disk.pwrite(62 * cluster_size + 100, b"new")
        model[62 * cluster_size + 100 : 62 * cluster_size + 103] = b"new"
        assert disk.block_status(62 * cluster_size, 1).host_offset == places[62]
        disk.discard(63 * cluster_size, cluster_size)
        disk.pwrite(64 * cluster_size, b"new" * (cluster_size // 3))
        model[64 * cluster_size : 64 * cluster_size + cluster_size // 3 * 3] = b"new" * (cluster_size // 3)
        assert disk.pread(0, size) == model
    check(image)
    (tmpfs / "raw").write_bytes(model)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", image, tmpfs / "raw")


@pytest.mark.parametrize("options", [{}, {"compat": "0.10"}], ids=["two roots", "version 2"])
def test_zeroes_of_whole_clusters_are_pythons(tmpfs: Path, options: dict[str, str]) -> None:
    """Where the image has no such entries, or another root would not learn of them."""
    with blockgraph.open({"nodes": [described(make(tmpfs / "disk", 1 << 20, **options))]}) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pwrite(0, b"x" * (1 << 20))
        disk.pread(0, 1)
        if not options:
            assert disk._extents.zero(0, CLUSTER, KEPT)
            other = graph.backend("disk", writable=True)
            assert other.pread(0, 2 * CLUSTER) == bytes(CLUSTER) + b"x" * CLUSTER
        disk.pread(CLUSTER, 1)
        assert not disk._extents.zero(CLUSTER, CLUSTER, KEPT)


def test_what_was_read_before_the_first_write_is_written_natively(tmpfs: Path) -> None:
    image = make(tmpfs / "disk", 1 << 20)
    with blockgraph.open({"nodes": [described(image)]}) as graph:
        graph.backend("disk", writable=True).pwrite(0, b"x" * (1 << 20))
    with blockgraph.open({"nodes": [described(image)]}) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pread(0, 1 << 20)
        disk.write_zeroes(3 * CLUSTER, CLUSTER)
        for cluster in (0, 15):
            misses = disk.stats().misses
            disk.pwrite(cluster * CLUSTER, b"y")
            assert disk.stats().misses == misses


def test_many_tables_are_completed_within_the_bound(tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush after first writes in more tables than may be in memory: some after others, and all of them."""
    image = make(tmpfs / "disk", 4 << 20, cluster_size=512)  # a table has 32 KiB of the disk
    with blockgraph.open({"nodes": [{**described(image), "l2-cache-size": 8 * 512}]}) as graph:
        disk = graph.backend("disk", writable=True)
        starts = range(0, 4 << 20, 32 << 10)
        for at in starts:
            disk.pwrite(at, b"t" * 512)
        disk.flush()
        for at in starts:
            disk.pread(at + 512, 1)
        sizes = []
        tables = qcow2_of(graph).mapping.tables
        before = disk.stats().first_writes
        for at in starts:
            disk.pwrite(at + 512, b"n" * 512)
        assert disk.stats().first_writes > before + 100
        touch = tables.touch

        def counted(*args: Any) -> None:
            touch(*args)
            sizes.append(tables.size)

        monkeypatch.setattr(tables, "touch", counted)
        disk.flush()
        assert len(sizes) >= 100
        assert max(sizes) <= 8 * 512
        (tmpfs / "copy").write_bytes(image.read_bytes())
    check(tmpfs / "copy", leaks=True)  # the reserve
    with blockgraph.open({"nodes": [described(tmpfs / "copy")]}) as graph:
        assert graph.backend("disk").pread(0, 4 << 20) == (b"t" * 512 + b"n" * 512 + bytes(31 << 10)) * len(starts)


@contextmanager
def first_writes_from(tmpfs: Path, offset: int, size: int) -> Iterator[tuple[SyncGraph, SyncBackend]]:
    """A new disk, to which first writes are native from an offset on."""
    with blockgraph.open({"nodes": [described(make(tmpfs / "disk", size))]}) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pwrite(0, b"x")
        disk.pread(offset, 1)
        yield graph, disk


def test_reserve_that_was_given_back_is_asked_for_again(tmpfs: Path) -> None:
    """The word that there is little room came, and then nothing was missing: the next one comes, too."""
    with first_writes_from(tmpfs, 1 << 20, 64 << 20) as (graph, disk):
        driver = qcow2_of(graph)
        places = driver.first_writes
        assert places is not None

        async def little_and_enough() -> None:
            more = await driver.refcounts.allocate_all(64)
            places._native.give([(more, 64, False)], 1000)

        graph.call(little_and_enough())
        with ThreadPoolExecutor() as pool:
            assert pool.submit(disk._extents.pwrite, 1 << 20, b"x" * CLUSTER).result(20)

        graph.call(asyncio.sleep(1))  # the word comes, and nothing is missing: there is nothing to see
        before = disk.stats().first_writes
        for at in range(2 << 20, 62 << 20, CLUSTER):
            disk.pwrite(at, b"n" * CLUSTER)
            if at % (4 << 20) == 0:
                graph.call(asyncio.sleep(0.01))
        assert disk.stats().first_writes > before + 500


def test_table_that_contradicts_what_was_placed_is_corrupt(tmpfs: Path) -> None:
    """Said to who looks next; what was put in before stays, and reaches the disk."""
    with first_writes_from(tmpfs, 4 * CLUSTER, 1 << 20) as (graph, disk):
        driver = qcow2_of(graph)
        table = driver.mapping.tables.get(0)
        assert table is not None
        before = disk.stats().first_writes
        disk.pwrite(4 * CLUSTER, b"n" * 2 * CLUSTER)
        assert disk.stats().first_writes == before + 1
        table.buf[5 * 8 : 6 * 8] = table.buf[:8]
        with pytest.raises(CorruptImage, match="L2 table 0 has changed under native writes"):
            disk.block_status(4 * CLUSTER, CLUSTER)
        assert any(table.buf[4 * 8 : 5 * 8])
        assert table.dirty


def test_second_flush_has_nothing_to_do(tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with first_writes_from(tmpfs, 4 * CLUSTER, 1 << 20) as (_, disk):
        disk.pwrite(4 * CLUSTER, b"n" * CLUSTER)
        flushes = []
        flush = Qcow2.flush

        async def counted(self: Qcow2) -> None:
            flushes.append(1)
            await flush(self)

        monkeypatch.setattr(Qcow2, "flush", counted)
        disk.flush()
        assert len(flushes) == 1
        disk.flush()
        disk.flush()
        assert len(flushes) == 1


@pytest.mark.parametrize("cluster_size", [512, 4096])
def test_direct_io_beside_a_file_that_grows(tmp_path: Path, cluster_size: int) -> None:
    """The end of the file, which a read came to, has moved on meanwhile: it goes on."""
    image = make(tmp_path / "disk", 1 << 20, cluster_size=cluster_size)
    file = {"driver": "file", "filename": str(image), "cache": {"direct": True}}
    with blockgraph.open({"nodes": [{"driver": "qcow2", "node-name": "disk", "file": file}]}) as graph:
        disk = graph.backend("disk", writable=True)
        content = bytearray(1 << 20)

        def writes(lane: int) -> None:
            source = random.Random(lane)
            for _ in range(150):
                at = (source.randrange(2048 // 6) * 6 + lane) * 512 + source.choice([0, 100])
                data = source.randbytes(source.choice([10, 300, 412]))
                disk.pwrite(at, data)
                content[at : at + len(data)] = data

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(writes, range(6)))
        assert disk.pread(0, 1 << 20) == content
    check(image)


@pytest.mark.parametrize("zeroes", [False, True])
def test_flush_beside_another_one_has_what_was_noted(tmpfs: Path, zeroes: bool) -> None:
    """The other one took the mark of what was written before there was a link, and found nothing else to do."""
    image = make(tmpfs / "disk", 1 << 20)
    with blockgraph.open({"nodes": [described(image)]}) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pwrite(0, b"x" * 4 * CLUSTER)
        disk.flush()
        before = disk.stats().first_writes
        if zeroes:
            disk.pread(CLUSTER, 1)
            assert disk._extents.zero(CLUSTER, CLUSTER, KEPT)
        else:
            disk.pwrite(8 * CLUSTER, b"n" * CLUSTER)
            assert disk.stats().first_writes == before + 1
        storage = graph.graph.node("disk").children["file"].node
        root_map = disk._backend.use_map()
        assert disk._extents.take_written(root_map._slots[storage])
        disk.flush()
        (tmpfs / "copy").write_bytes(image.read_bytes())
    with blockgraph.open({"nodes": [described(tmpfs / "copy")]}) as graph:
        copy = graph.backend("disk")
        assert copy.pread(CLUSTER, 4) == (bytes(4) if zeroes else b"xxxx")
        assert copy.pread(8 * CLUSTER, 4) == (bytes(4) if zeroes else b"nnnn")


def test_table_that_is_not_only_ours_is_not_changed_in_place(tmpfs: Path) -> None:
    """Its L1 entry lacks COPIED, as a snapshot leaves it, though entries in it have the flag."""
    image = make(tmpfs / "disk", 8 << 20, cluster_size=4096)
    with blockgraph.open({"nodes": [described(image)]}) as graph:
        graph.backend("disk", writable=True).pwrite(0, b"a" * (1 << 20))
        l1 = qcow2_of(graph).image.header.l1_offset
    with image.open("r+b") as file:
        file.seek(l1)
        table = int.from_bytes(file.read(8), "big") & ~(1 << 63)
        file.seek(l1)
        file.write(table.to_bytes(8, "big"))
        file.seek(table)
        before = file.read(4096)
    with blockgraph.open({"nodes": [described(image)]}) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pwrite(4 << 20, b"b" * 512)  # writing has begun, by another table
        disk.pread(4096, 512)
        assert not disk._extents.zero(4096, 4096, KEPT)
        disk.write_zeroes(4096, 4096)
        assert disk.pread(0, 12288) == b"a" * 4096 + bytes(4096) + b"a" * 4096
    assert image.read_bytes()[table : table + 4096] == before


@in_loop
async def test_disk_that_becomes_shorter_while_a_place_is_looked_up(tmpfs: Path) -> None:
    await create(tmpfs / "disk", 4 << 20)
    async with await blockgraph.aopen({"nodes": [described(tmpfs / "disk")]}) as graph:
        other = await graph.backend("disk", writable=True, resize=True)
        await other.pwrite(0, b"o" * CLUSTER)
        guest = await graph.backend("disk")
        root_map = guest.use_map()
        driver = graph.node("disk").driver
        looked, gate = asyncio.Event(), asyncio.Event()
        real = driver.map

        async def slow(offset: int, length: int) -> Any:
            extent = await real(offset, length)
            looked.set()
            await gate.wait()
            return extent

        driver.map = slow  # type: ignore[method-assign]
        filling = asyncio.ensure_future(root_map.fill(2 << 20, 512))
        await looked.wait()
        driver.map = real  # type: ignore[method-assign]
        await other.truncate(1 << 20)
        gate.set()
        await filling
        assert root_map.extents.size == 1 << 20
        assert await guest.pread(0, 4) == b"oooo"


def test_two_parts_of_an_image_are_written(tmpfs: Path) -> None:
    """A change in one part is none of the other's disk."""
    image = make(tmpfs / "disk", 64 * CLUSTER)
    parts = [
        {"driver": "raw", "node-name": "p1", "size": 8 * CLUSTER, "file": "disk"},
        {"driver": "raw", "node-name": "p2", "size": 32 * CLUSTER, "offset": 16 * CLUSTER, "file": "disk"},
    ]
    with blockgraph.open({"nodes": [described(image), *parts]}) as graph:
        first, second = (graph.backend(name, writable=True) for name in ("p1", "p2"))
        first.pwrite(0, b"a" * CLUSTER)
        second.pwrite(0, b"b" * CLUSTER)
        second.write_zeroes(5 * CLUSTER, CLUSTER)
        first.pwrite(2 * CLUSTER, b"c" * CLUSTER)
        second.discard(0, CLUSTER)
        second.pwrite(31 * CLUSTER, b"d" * CLUSTER)
        assert first.pread(0, 3 * CLUSTER) == b"a" * CLUSTER + bytes(CLUSTER) + b"c" * CLUSTER
        assert second.pread(30 * CLUSTER, 2 * CLUSTER) == bytes(CLUSTER) + b"d" * CLUSTER
    check(image)


def test_links_do_not_pile_up(tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeroes take no room from the reserve: tables are brought up to date when there are many."""
    monkeypatch.setattr(first_writes, "_MOST_LINKS", 4096)
    with blockgraph.open({"nodes": [described(make(tmpfs / "disk", 1 << 20, cluster_size=512))]}) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pwrite(0, b"x" * (1 << 20))
        places = qcow2_of(graph).first_writes
        assert places is not None
        for at in range(0, 1 << 20, 1024):
            disk.pread(at, 1)
            assert disk._extents.zero(at, 512, KEPT)

        async def waiting() -> int:
            for _ in range(100):
                await asyncio.sleep(0.01)
                if places._link_bytes <= 4096:
                    break
            return places._link_bytes

        assert graph.call(waiting()) <= 4096
        assert disk.pread(0, 1 << 20) == (bytes(512) + b"x" * 512) * 1024


def test_discard_takes_a_first_write_back(tmpfs: Path) -> None:
    with blockgraph.open({"nodes": [described(make(tmpfs / "disk", 4 << 20), discard="unmap")]}) as graph:
        disk = graph.backend("disk", writable=True)
        for cluster in range(8):
            disk.pwrite(cluster * CLUSTER, b"x" * CLUSTER)
        disk.discard(2 * CLUSTER, 4 * CLUSTER)
        assert disk.pread(0, 8 * CLUSTER) == b"x" * 2 * CLUSTER + bytes(4 * CLUSTER) + b"x" * 2 * CLUSTER
    check(tmpfs / "disk")


class LoggedFile(File):
    """A file that knows what a crash could leave: Python's writes and flushes come past here, native ones are found by
    comparing."""

    name = "logged-file"

    def begin(self, path: Path) -> None:
        self.path = path
        self.before = path.read_bytes()
        self.shadow = bytearray(self.before)
        self.entries: list[tuple[int, bytes] | None] = []  # None: a flush
        self.native = 0

    def note_native(self) -> None:
        """Native writes since the last look: each differing sector is one, for a crash loses sectors."""
        now = self.path.read_bytes()
        self.shadow.extend(bytes(len(now) - len(self.shadow)))
        for at in range(0, len(now), 512):
            sector = now[at : at + 512]
            if sector != self.shadow[at : at + 512]:
                self.entries.append((at, sector))
                self.shadow[at : at + 512] = sector
                self.native += 1

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        if hasattr(self, "path"):
            self.note_native()
        await super().pwrite(offset, buf, flags)
        if hasattr(self, "path"):
            data = bytes(buf)
            self.entries.append((offset, data))
            self.shadow.extend(bytes(max(0, offset + len(data) - len(self.shadow))))
            self.shadow[offset : offset + len(data)] = data

    async def flush(self) -> None:
        if hasattr(self, "path"):
            self.note_native()
        await super().flush()
        if hasattr(self, "path"):
            self.entries.append(None)

    def crash(self, rng: random.Random) -> tuple[bytes, int]:
        """A disk as a power failure could leave it, and how many entries it was after."""
        end = rng.randrange(len(self.entries) + 1)
        flushed = max((i + 1 for i in range(end) if self.entries[i] is None), default=0)
        keep = rng.random()
        image = bytearray(self.before)
        for number, entry in enumerate(self.entries[:end]):
            if entry is not None and (number < flushed or rng.random() < keep):
                offset, data = entry
                image.extend(bytes(max(0, offset + len(data) - len(image))))
                image[offset : offset + len(data)] = data
        return bytes(image), end


@QEMU
@pytest.mark.parametrize("seed", range(4))
@in_loop
async def test_crash_between_first_writes_leaves_leaks_and_what_was_flushed(tmpfs: Path, seed: int) -> None:
    size, rng = 96 << 10, random.Random(seed)
    image = tmpfs / "disk"
    await create(image, size, cluster_size=[512, 1024, 4096][seed % 3])
    async with opened(LoggedFile, "file", filename=str(image)) as file, over(file.node) as driver:
        logged = file.node.driver
        assert isinstance(logged, LoggedFile)
        logged.begin(image)
        backend = Backend("root", need=EVERYTHING)
        backend.set_child("root", edge(driver.node))
        extents = backend.use_map().extents
        model = bytearray(size)
        history = [(0, bytes(model), True)]
        zeroed = 0
        for number in range(1, 90):
            sector = rng.randrange(size // 512)
            offset, length = sector * 512, min(rng.choice([512, 512, 2048]), size - sector * 512)
            if rng.random() < 0.2:
                await backend.flush()
                history.append((len(logged.entries), bytes(model), True))
                continue
            if rng.random() < 0.2:
                cluster = driver.image.cluster_size
                if rng.random() < 0.7:
                    offset, length = offset // cluster * cluster, min(cluster, size - offset // cluster * cluster)
                if extents.zero(offset, length, KEPT):
                    zeroed += 1
                else:
                    await backend.write_zeroes(offset, length)
                logged.note_native()
                model[offset : offset + length] = bytes(length)
            else:
                data = bytes([number]) * length
                if not extents.pwrite(offset, data):
                    await backend.pwrite(offset, data)
                logged.note_native()
                model[offset : offset + length] = data
            history.append((len(logged.entries), bytes(model), False))
            await asyncio.sleep(0)
        assert extents.stats().first_writes > 5
        assert logged.native > 5
        assert zeroed
        assert backend.map is not None
        await backend.map.clear()
        await driver.node.wait_idle()
    for _ in range(40):
        crashed, end = logged.crash(rng)
        image.write_bytes(crashed)
        check(image, leaks=True)
        since = max(i for i, (at, _, flushed) in enumerate(history) if flushed and at <= end)
        # What came later, and what was under way, may be there.
        last = next((i + 1 for i, (at, _, _) in enumerate(history) if at > end), len(history))
        allowed = [contents for _, contents, _ in history[since : last + 1]]
        async with disk_over(image) as backend_after:
            found = await backend_after.pread(0, size)
        for at in range(0, size, 512):
            assert any(found[at : at + 512] == contents[at : at + 512] for contents in allowed), f"sector {at // 512}"


class Disk(RuleBasedStateMachine):
    """An image written through its extent map, by several threads at once, beside one that Python writes."""

    size = (384 << 10) + 512

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="blockgraph-", dir=SHM)))
        self.threads = self.stack.enter_context(ThreadPoolExecutor(4))

    @initialize(cluster_size=st.sampled_from([512, 4096, 65536]), base=st.sampled_from([0, 250 << 10, 500 << 10]))
    def create(self, cluster_size: int, base: int) -> None:
        data = base_bytes(base)
        (self.directory / "base").write_bytes(data)
        self.options: dict[str, Any] = {"backing": backing(self.directory / "base") if base else None}
        names = {"backing_file": str(self.directory / "base"), "backing_fmt": "raw"} if base else {}
        for name in ("native", "python"):
            make(self.directory / name, self.size, cluster_size=cluster_size, **names)
        self.model = bytearray(data[: self.size].ljust(self.size, b"\0"))
        self.open()

    def open(self) -> None:
        """Both images."""
        self.graphs = [
            blockgraph.open({"nodes": [described(self.directory / name, discard="unmap", **self.options)]})
            for name in ("native", "python")
        ]
        self.disk: SyncBackend = self.graphs[0].backend("disk", writable=True)
        self.python = self.graphs[1].call(self.graphs[1].graph.backend("disk", writable=True))

    def close(self) -> None:
        """Both images."""
        for graph in self.graphs:
            graph.close()

    def clip(self, offset: int, length: int) -> tuple[int, int]:
        offset %= self.size
        return offset, min(length, self.size - offset)

    def _write(self, offset: int, data: bytes) -> None:
        self.graphs[1].call(self.python.pwrite(offset, data))
        self.model[offset : offset + len(data)] = data

    offsets = st.integers(0, 2 * size)

    @rule(offset=offsets, length=st.one_of(st.integers(1, 600), st.integers(1, 9000), st.integers(1, 200_000)))
    def write(self, offset: int, length: int) -> None:
        offset, length = self.clip(offset, length)
        data = bytes((offset + i // 100) % 255 + 1 for i in range(length))
        self.disk.pwrite(offset, data)
        self._write(offset, data)

    @rule(requests=st.lists(st.tuples(offsets, st.integers(1, 9000)), min_size=2, max_size=16), flush=st.booleans())
    def write_at_once(self, requests: list[tuple[int, int]], flush: bool) -> None:
        """Ranges that do not overlap, but share clusters."""
        taken: list[tuple[int, int]] = []
        work = []
        for number, (offset, length) in enumerate(requests, 1):
            offset, length = self.clip(offset, length)
            if all(offset + length <= low or high <= offset for low, high in taken):
                taken.append((offset, offset + length))
                data = bytes([number]) * length
                work.append(self.threads.submit(self.disk.pwrite, offset, data))
                self._write(offset, data)
        if flush:
            work.append(self.threads.submit(self.disk.flush))
        for done in work:
            done.result()

    @rule(offset=offsets, length=st.integers(1, 200_000), unmap=st.booleans(), number=st.integers(1, 255))
    def zero_beside_writes(self, offset: int, length: int, unmap: bool, number: int) -> None:
        offset, length = self.clip(offset, length)
        work = [
            self.threads.submit(self.disk.write_zeroes, offset, length, flags=Flag.MAY_UNMAP if unmap else Flag.NONE)
        ]
        for at, end in ((max(0, offset - 3000), offset), (offset + length, min(self.size, offset + length + 3000))):
            if at < end:
                data = bytes([number]) * (end - at)
                work.append(self.threads.submit(self.disk.pwrite, at, data))
                self._write(at, data)
        self._write(offset, bytes(length))
        for done in work:
            done.result()

    @rule(offset=offsets, count=st.integers(1, 4), beside=st.booleans())
    def zero_clusters(self, offset: int, count: int, beside: bool) -> None:
        """Whole ones, and writes to those beside them at once."""
        size = self.graphs[0].call(self.cluster_size())
        offset, length = self.clip(offset % self.size // size * size, count * size)
        work = [self.threads.submit(self.disk.write_zeroes, offset, length)]
        self._write(offset, bytes(length))
        if beside and offset + length + 5 < self.size:
            work.append(self.threads.submit(self.disk.pwrite, offset + length, b"xyzzy"))
            self._write(offset + length, b"xyzzy")
        for done in work:
            done.result()

    async def cluster_size(self) -> int:
        return qcow2_of(self.graphs[0]).image.cluster_size

    @rule(offset=offsets, length=st.integers(1, 200_000))
    def discard(self, offset: int, length: int) -> None:
        offset, length = self.clip(offset, length)
        self.disk.discard(offset, length)
        after = self.disk.pread(offset, length)
        for old, new in zip(self.model[offset : offset + length], after, strict=True):
            assert new in (old, 0)
        self._write(offset, after)

    @rule()
    def drain(self) -> None:
        """The reserve is given back."""

        async def drained(graph: Any) -> None:
            async with graph.drained():
                pass

        self.graphs[0].call(drained(self.graphs[0].graph))
        first_writes = qcow2_of(self.graphs[0]).first_writes
        assert first_writes is None or first_writes.reserve == 0

    @rule()
    def look_from_another_root(self) -> None:
        with self.graphs[0].backend("disk") as other:
            assert other.pread(0, self.size) == self.model

    @rule()
    def reopen(self) -> None:
        self.close()
        self.open()

    @rule(offset=offsets, length=st.integers(1, 200_000))
    def read(self, offset: int, length: int) -> None:
        offset, length = self.clip(offset, length)
        assert self.disk.pread(offset, length) == self.model[offset : offset + length]

    def teardown(self) -> None:
        with self.stack:
            if hasattr(self, "disk"):
                self.close()
                check(self.directory / "native")
                (self.directory / "raw").write_bytes(self.model)
                qemu_img("compare", "-f", "qcow2", "-F", "raw", self.directory / "native", self.directory / "raw")
                qemu_img("compare", "-f", "qcow2", self.directory / "native", self.directory / "python")


TestDisk = pytest.mark.timeout(300)(Disk.TestCase)
TestDisk.settings = settings(
    max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


def setup_module() -> None:
    require_tool("qemu-img")


def test_refill_that_failed_once_is_tried_again(tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with first_writes_from(tmpfs, 1 << 20, 64 << 20) as (graph, disk):
        refcounts = qcow2_of(graph).refcounts
        failed = []

        async def fails(want: int) -> Room:
            monkeypatch.setattr(refcounts, "allocate_any", allocate_any)
            failed.append(want)
            raise NoSpace("no room now", node="disk")

        allocate_any = refcounts.allocate_any
        monkeypatch.setattr(refcounts, "allocate_any", fails)
        for at in range(1 << 20, 32 << 20, CLUSTER):
            disk.pwrite(at, b"n" * CLUSTER)
        assert len(failed) == 1
        graph.call(asyncio.sleep(0.05))
        before = disk.stats().first_writes
        for at in range(32 << 20, 64 << 20, CLUSTER):
            disk.pwrite(at, b"n" * CLUSTER)
            if at % (1 << 20) == 0:
                graph.call(asyncio.sleep(0.002))
        assert disk.stats().first_writes > before + 300
