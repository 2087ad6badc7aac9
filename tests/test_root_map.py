# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Native requests of a backend: what they may not do is see or touch bytes that have moved."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import blockgraph
from blockgraph import trace
from blockgraph.api import SyncBackend, SyncGraph
from blockgraph.create import create_file
from blockgraph.errors import OutOfRange
from blockgraph.native import MapExtent

MIB = 1 << 20
SIZE = 4 * MIB
CLUSTER = 64 << 10


def image(name: str, path: Path, driver: str = "raw", **more: Any) -> dict[str, Any]:
    """A description of an image file."""
    return {"driver": driver, "node-name": name, "file": {"driver": "file", "filename": str(path)}, **more}


def make(path: Path, driver: str, size: int = SIZE, **options: Any) -> Path:
    """A new image file."""
    asyncio.run(create_file(str(path), size, driver, replace=True, **options))
    return path


@pytest.fixture(params=["raw", "qcow2"])
def driver(request: pytest.FixtureRequest) -> str:
    """Format of the disk."""
    return str(request.param)


@contextmanager
def opened(path: Path, driver: str) -> Iterator[SyncGraph]:
    """A graph with a new, filled image "disk"."""
    make(path / "disk", driver)
    with blockgraph.open({"nodes": [image("disk", path / "disk", driver)]}) as graph:
        with graph.backend("disk", writable=True) as disk:
            for offset in range(0, SIZE, MIB):
                disk.pwrite(offset, bytes([offset // MIB + 1]) * MIB)
        yield graph


def test_mapped_requests_ask_no_node(tmp_path: Path, driver: str) -> None:
    with opened(tmp_path, driver) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pread(0, 4096)
        disk.pwrite(0, b"x" * 4096)
        before = disk.stats()
        for offset in range(0, MIB, 4096):
            disk.pwrite(offset, offset.to_bytes(4, "big") * 1024)
        for offset in range(0, MIB, 4096):
            assert disk.pread(offset, 4096) == offset.to_bytes(4, "big") * 1024
        after = disk.stats()
        assert after.misses == before.misses
        assert after.hits == before.hits + 2 * 256


def test_mapped_raw_file_is_one_extent(tmp_path: Path) -> None:
    with opened(tmp_path, "raw") as graph:
        disk = graph.backend("disk", writable=True)
        disk.pread(SIZE // 2, 1)
        assert disk.stats().extents == 1
        assert disk._extents.find(0) == MapExtent(0, SIZE, 0, 0, True)


def test_mapped_read_only_backend_refuses_writes(tmp_path: Path, driver: str) -> None:
    with opened(tmp_path, driver) as graph:
        disk = graph.backend("disk")
        disk.pread(0, SIZE)
        with pytest.raises(blockgraph.errors.ReadOnly):
            disk.pwrite(0, b"x")


def test_traced_requests_are_seen_by_the_nodes(tmp_path: Path, driver: str) -> None:
    with opened(tmp_path, driver) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pread(0, 4096)
        with trace.record() as events:
            disk.pread(0, 4096)
        assert ("pread", "disk") in [(event.op, event.node) for event in events]


def test_native_write_makes_the_next_flush_go_down(tmp_path: Path, driver: str) -> None:
    with opened(tmp_path, driver) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pwrite(0, b"a" * 4096)
        disk.flush()
        misses = disk.stats().misses
        disk.pwrite(0, b"b" * 4096)
        assert disk.stats().misses == misses
        file = graph.graph.node("disk").children["file"].node.name
        with trace.record() as events:
            disk.flush()
            disk.flush()
        assert [event.node for event in events if event.op == "flush"].count(file) == 1


def test_native_write_sets_bits_of_a_bitmap_added_later(tmp_path: Path, driver: str) -> None:
    with opened(tmp_path, driver) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pwrite(0, b"a" * 4096)
        bitmap = graph.call(graph.graph.add_bitmap("disk", "b0"))
        for _ in range(3):
            disk.pwrite(3 * CLUSTER, b"b" * 4096)
        hits = disk.stats().hits
        bitmap.recorder.clear()
        disk.pwrite(3 * CLUSTER, b"c" * 4096)
        assert disk.stats().hits == hits + 1
        assert list(bitmap.recorder.dirty_extents()) == [(3 * CLUSTER, CLUSTER)]


def test_mapped_backing_bytes_are_not_read_after_an_allocation_by_another_root(tmp_path: Path) -> None:
    make(tmp_path / "base", "raw").write_bytes(b"o" * SIZE)
    make(tmp_path / "top", "qcow2")
    nodes = [image("base", tmp_path / "base"), image("disk", tmp_path / "top", "qcow2", backing="base")]
    with blockgraph.open({"nodes": nodes}) as graph:
        reader, writer = graph.backend("disk"), graph.backend("disk", writable=True)
        assert reader.pread(CLUSTER, 4096) == b"o" * 4096
        misses = reader.stats().misses
        assert reader.pread(CLUSTER, 4096) == b"o" * 4096
        assert reader.stats().misses == misses
        writer.pwrite(CLUSTER, b"n" * 100)
        assert reader.pread(CLUSTER, 4096) == b"n" * 100 + b"o" * 3996


@pytest.mark.parametrize("change", ["discard", "write_zeroes"])
def test_mapped_bytes_are_not_read_after_they_are_gone(tmp_path: Path, change: str) -> None:
    with opened(tmp_path, "qcow2") as graph:
        disk = graph.backend("disk", writable=True)
        assert disk.pread(0, 4096) == b"\1" * 4096
        getattr(disk, change)(0, CLUSTER)
        assert disk.pread(0, 4096) == bytes(4096)
        for offset in range(MIB, 2 * MIB, CLUSTER):  # what was freed is used again elsewhere
            disk.write_zeroes(offset, CLUSTER)
            disk.pwrite(offset, b"z" * CLUSTER)
        assert disk.pread(0, CLUSTER) == bytes(CLUSTER)


def test_mapped_write_after_a_snapshot_goes_to_the_overlay(tmp_path: Path, driver: str) -> None:
    with opened(tmp_path, driver) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pwrite(0, b"before")
        overlay = image("overlay", make(tmp_path / "overlay", "qcow2"), "qcow2", backing=None)
        graph.call(graph.graph.snapshot("disk", overlay))
        disk.pwrite(0, b"after!")
        disk.pwrite(0, b"after?")
        assert disk.pread(0, 6) == b"after?"
        base = graph.backend("disk")
        assert base.pread(0, 6) == b"before"


def test_mapped_resize_moves_the_end(tmp_path: Path, driver: str) -> None:
    with opened(tmp_path, driver) as graph:
        disk = graph.backend("disk", writable=True, resize=True)
        disk.pread(SIZE - 4096, 4096)
        graph.call(disk._backend.truncate(SIZE // 2))
        with pytest.raises(blockgraph.errors.OutOfRange):
            disk.pread(SIZE - 4096, 4096)
        with pytest.raises(blockgraph.errors.OutOfRange):
            disk.pwrite(SIZE - 4096, bytes(4096))
        graph.call(disk._backend.truncate(SIZE))
        assert disk.pread(SIZE // 2, SIZE // 2) == bytes(SIZE // 2)


def test_mapped_resize_under_a_bitmap_keeps_recording(tmp_path: Path, driver: str) -> None:
    with opened(tmp_path, driver) as graph:
        disk = graph.backend("disk", writable=True, resize=True)
        bitmap = graph.call(graph.graph.add_bitmap("disk", "b0"))
        disk.pwrite(0, b"a" * 4096)
        disk.pwrite(0, b"a" * 4096)
        graph.call(disk._backend.truncate(2 * SIZE))
        for _ in range(2):
            disk.pwrite(2 * SIZE - CLUSTER, b"b" * 4096)
        assert list(bitmap.recorder.dirty_extents()) == [(0, CLUSTER), (SIZE, SIZE)]
        bitmap.recorder.clear()
        hits = disk.stats().hits
        disk.pwrite(2 * SIZE - CLUSTER, b"c" * 4096)
        assert disk.stats().hits == hits + 1
        assert list(bitmap.recorder.dirty_extents()) == [(2 * SIZE - CLUSTER, CLUSTER)]


class Guests:
    """Threads that write and check blocks of their own for as long as the block lasts."""

    def __init__(self, disk: SyncBackend, count: int, size: int) -> None:
        self.blocks: list[dict[int, bytes]] = [{} for _ in range(count)]
        self.errors: list[str] = []
        self.rounds = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(disk, i, count, size)) for i in range(count)]

    def _work(self, disk: SyncBackend, number: int, count: int, size: int) -> None:
        rng = random.Random(number)
        mine = self.blocks[number]
        try:
            while not self._stop.is_set():
                self.rounds += 1
                offset = (rng.randrange(size // 4096 // count) * count + number) * 4096
                if rng.random() < 0.6:
                    data = rng.randbytes(16) * 256
                    disk.pwrite(offset, data)
                    mine[offset] = data
                elif (expected := mine.get(offset)) is not None and disk.pread(offset, 4096) != expected:
                    self.errors.append(f"guest {number}: wrong bytes at {offset}")
        except Exception as error:
            self.errors.append(f"guest {number}: {error!r}")

    def __enter__(self) -> Guests:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def await_rounds(self, more: int) -> None:
        """Until the guests have done so much more."""
        until = self.rounds + more
        while self.rounds < until and not self.errors:
            threading.Event().wait(0.001)


def test_native_guests_and_graph_changes_never_lose_or_mix_bytes(tmp_path: Path, driver: str) -> None:
    with opened(tmp_path, driver) as graph:
        disk = graph.backend("disk", writable=True)
        change: Callable[[Any], Any] = graph.call
        with Guests(disk, 4, SIZE) as guests:
            for turn in range(12):
                guests.await_rounds(200)
                kept = make(tmp_path / "kept", "raw" if turn % 2 else "qcow2")
                target = image("kept", kept, "raw" if turn % 2 else "qcow2")
                change(graph.graph.add_node(target))
                top = {"driver": "backup-top", "node-name": "top", "file": "disk", "target": "kept"}
                change(graph.graph.insert_filter(top, "disk"))
                change(graph.graph.add_node({"driver": "snapshot-access", "node-name": "then", "file": "top"}))
                then = graph.backend("then")
                first = then.pread(0, SIZE)
                guests.await_rounds(300)
                assert then.pread(0, SIZE) == first, "the kept image has changed"
                then.close()
                change(graph.graph.remove_node("then"))
                change(graph.graph.remove_filter("top"))
                change(graph.graph.remove_node("kept"))
                guests.await_rounds(50)
                change(graph.graph.reopen("disk", {"detect-zeroes": "on" if turn % 3 == 0 else "off"}))
                with graph.backend("disk", writable=True) as other:
                    other.flush()
        assert guests.errors == []
        for blocks in guests.blocks:
            for offset, data in blocks.items():
                assert disk.pread(offset, 4096) == data
        assert disk.stats().hits > 1000
    if driver == "qcow2":
        with blockgraph.open({"nodes": [image("disk", tmp_path / "disk", "qcow2")]}) as graph:
            again = graph.backend("disk")
            for blocks in guests.blocks:
                for offset, data in blocks.items():
                    assert again.pread(offset, 4096) == data


def test_native_guests_beside_discards_of_their_neighbours(tmp_path: Path) -> None:
    with opened(tmp_path, "qcow2") as graph:
        disk = graph.backend("disk", writable=True)
        other = graph.backend("disk", writable=True)
        rng = random.Random(7)
        with Guests(disk, 3, SIZE // 2) as guests:
            for _ in range(300):
                offset = SIZE // 2 + rng.randrange(SIZE // 2 // CLUSTER) * CLUSTER
                action = rng.randrange(4)
                if action == 0:
                    other.discard(offset, CLUSTER)
                elif action == 1:
                    other.write_zeroes(offset, CLUSTER)
                elif action == 2:
                    data = rng.randbytes(CLUSTER)
                    other.pwrite(offset, data)
                    assert other.pread(offset, CLUSTER) == data
                else:
                    other.flush()
            guests.await_rounds(100)
        assert guests.errors == []
        for blocks in guests.blocks:
            for offset, data in blocks.items():
                assert disk.pread(offset, 4096) == data


def scatter(path: Path, size: int) -> None:
    """A new image "disk" whose clusters, each with its number in it, lie in the file in another order."""
    make(path / "disk", "qcow2", size)
    clusters = list(range(-(-size // CLUSTER)))
    random.Random(7).shuffle(clusters)
    with blockgraph.open({"nodes": [image("disk", path / "disk", "qcow2")]}) as graph:
        disk = graph.backend("disk", writable=True)
        for cluster in clusters:
            disk.pwrite(cluster * CLUSTER, cluster.to_bytes(8, "big") * 64)
    # A cluster inside which the file ends would have faults of its own.
    end = (path / "disk").stat().st_size
    os.truncate(path / "disk", end + -end % CLUSTER)


@pytest.mark.parametrize("shift", [0, 3 * CLUSTER])
def test_fragmented_table_is_entered_at_its_first_fault(tmp_path: Path, shift: int) -> None:
    size = 600 * CLUSTER + 4096
    scatter(tmp_path, size)
    node = image("image", tmp_path / "disk", "qcow2")
    top = {"driver": "raw", "node-name": "disk", "offset": shift, "size": size - shift - 512, "file": node}
    with blockgraph.open({"nodes": [top]}) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pread(5 * CLUSTER, 512)
        for cluster in range(shift // CLUSTER, 600):
            offset = cluster * CLUSTER - shift
            assert disk.pread(offset, 512) == cluster.to_bytes(8, "big") * 64
        stats = disk.stats()
        assert (stats.misses, stats.hits) == (1, 600 - shift // CLUSTER)
        assert disk.pread(600 * CLUSTER - shift, 3584) == (600).to_bytes(8, "big") * 64 + bytes(3072)
        with pytest.raises(OutOfRange):
            disk.pread(600 * CLUSTER - shift, 3585)
        disk.pwrite(0, b"x" * 512)  # the image may be written from now on
        disk.pwrite(200 * CLUSTER, b"y" * 512)
        before = disk.stats()
        for cluster in range(20, 500):
            disk.pwrite(cluster * CLUSTER + 512, b"z" * 512)
        assert disk.stats().misses - before.misses <= 16
        disk.discard(40 * CLUSTER, CLUSTER)
        assert disk.pread(40 * CLUSTER, 2048) == bytes(2048)
        assert disk.pread(41 * CLUSTER + 512, 512) == b"z" * 512


def test_fragmented_backing_shows_only_where_the_overlay_is_unallocated(tmp_path: Path) -> None:
    size = 600 * CLUSTER
    scatter(tmp_path, size)
    make(tmp_path / "top", "qcow2", size)
    nodes = [image("top", tmp_path / "top", "qcow2", backing=image("base", tmp_path / "disk", "qcow2"))]
    with blockgraph.open({"nodes": nodes}) as graph:
        disk = graph.backend("top", writable=True)
        disk.pwrite(300 * CLUSTER, b"t" * CLUSTER)
        disk.pread(0, 512)
        disk.pread(400 * CLUSTER, 512)
        disk.pread(300 * CLUSTER, 512)
        before = disk.stats()
        for cluster in range(600):
            expected = b"t" * 512 if cluster == 300 else cluster.to_bytes(8, "big") * 64
            assert disk.pread(cluster * CLUSTER, 512) == expected
        assert disk.stats().misses - before.misses <= 1
        disk.pwrite(5 * CLUSTER, b"u" * 512)
        assert disk.pread(5 * CLUSTER, 1024) == b"u" * 512 + bytes(512)
