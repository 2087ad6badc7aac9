# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A fragmented image for whose map there is no room: what was dropped is found again without Python, in the image's own
tables, unless something has happened to it."""

from __future__ import annotations

import asyncio
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.fragmented import fragmented

import blockgraph
from blockgraph.api import SyncBackend, SyncGraph
from blockgraph.create import create_file
from blockgraph.native.extent_map import MIN_MEMORY

BITS = 14
CLUSTER = 1 << BITS
SIZE = 1 << 30
CLUSTERS = SIZE // CLUSTER
PER_TABLE = CLUSTER // 8
SHORT = 512


def stamp(number: int) -> bytes:
    """Bytes for the begin of a cluster."""
    return number.to_bytes(8, "big") * (SHORT // 8)


class Guest:
    """Reads and writes the begin of clusters, and knows what is there.

    Attributes:
        stored: by cluster; others have zeroes.
    """

    def __init__(self, graph: SyncGraph, path: Path, disk: SyncBackend) -> None:
        self.graph, self.path, self.disk = graph, path, disk
        self.stored: dict[int, bytes] = {}
        self.version = 0

    def call(self, work: Any) -> Any:
        """Run it in the loop."""
        return self.graph.call(work)

    def read(self, cluster: int) -> None:
        assert self.disk.pread(cluster * CLUSTER, SHORT) == self.stored.get(cluster, bytes(SHORT)), cluster

    def write(self, cluster: int) -> None:
        self.version += 1
        self.stored[cluster] = stamp(self.version)
        self.disk.pwrite(cluster * CLUSTER, self.stored[cluster])

    def zero(self, cluster: int) -> None:
        self.stored.pop(cluster, None)
        self.disk.write_zeroes(cluster * CLUSTER, CLUSTER)

    def discard(self, cluster: int) -> None:
        self.disk.discard(cluster * CLUSTER, CLUSTER)
        found = self.disk.pread(cluster * CLUSTER, SHORT)
        assert found in (bytes(SHORT), self.stored.get(cluster, bytes(SHORT)))
        self.stored[cluster] = found

    def all_over(self, count: int, rng: random.Random) -> list[int]:
        """Clusters, in any order: most of what was known before is dropped while they are read."""
        return [rng.randrange(CLUSTERS) for _ in range(count)]


def description(path: Path, **more: Any) -> dict[str, Any]:
    file = {"driver": "file", "node-name": "disk-file", "filename": str(path)}
    return {"driver": "qcow2", "node-name": "disk", "file": file, "l2-cache-size": 8 * CLUSTER, **more}


@contextmanager
def guest(path: Path, **more: Any) -> Iterator[Guest]:
    """Of a disk of which every table was entered once."""
    fragmented(path / "disk", SIZE, BITS)
    with (
        blockgraph.open({"nodes": [description(path / "disk", **more)]}) as graph,
        graph.backend("disk", writable=True, resize=True, extent_map_size=MIN_MEMORY) as disk,
    ):
        made = Guest(graph, path, disk)
        for cluster in range(0, CLUSTERS, PER_TABLE):
            made.write(cluster)
        assert disk.stats().evictions > 0
        yield made
    subprocess.run(["qemu-img", "check", "-q", str(path / "disk")], check=True)


def test_what_was_dropped_is_found_again_without_python(tmpfs: Path) -> None:
    rng = random.Random(1)
    with guest(tmpfs) as g:
        before = g.disk.stats()
        for cluster in g.all_over(3000, rng):
            g.read(cluster)
        for cluster in g.all_over(3000, rng):
            g.write(cluster)
            g.read(cluster)
        after = g.disk.stats()
        assert after.misses == before.misses
        assert after.recalls - before.recalls > 1000
        assert after.bytes <= MIN_MEMORY
        for cluster in g.stored:
            g.read(cluster)


def test_what_was_only_read_before_is_written_natively(tmpfs: Path) -> None:
    rng = random.Random(5)
    fragmented(tmpfs / "disk", SIZE, BITS)
    with (
        blockgraph.open({"nodes": [description(tmpfs / "disk")]}) as graph,
        graph.backend("disk", writable=True, extent_map_size=MIN_MEMORY) as disk,
    ):
        g = Guest(graph, tmpfs, disk)
        for cluster in range(0, CLUSTERS, PER_TABLE):
            g.read(cluster)
        for cluster in g.all_over(2000, rng):
            g.read(cluster)
        for cluster in g.all_over(2000, rng):
            g.write(cluster)
        # Each table is entered to be read, and once more to be written.
        assert disk.stats().misses <= 3 * CLUSTERS // PER_TABLE
        for cluster in g.stored:
            g.read(cluster)
        assert disk.stats().recalls > 2000


def test_table_that_is_not_written_back_yet_is_left_to_python(tmpfs: Path) -> None:
    rng = random.Random(2)
    with guest(tmpfs) as g:
        moved = g.all_over(50, rng)
        for cluster in moved:
            g.discard(cluster)
        for cluster in moved:
            g.write(cluster)
        for cluster in g.all_over(1000, rng):
            g.read(cluster)
        for cluster in moved:
            g.read(cluster)
            g.read((cluster + 1) % CLUSTERS)


def snapshot(g: Guest) -> None:
    asyncio.run(create_file(str(g.path / "overlay"), SIZE, "qcow2", replace=True))
    overlay = {**description(g.path / "overlay"), "node-name": "overlay", "backing": None}
    overlay["file"] = {"driver": "file", "filename": str(g.path / "overlay")}
    g.call(g.graph.graph.snapshot("disk", overlay))


def add_bitmap(g: Guest) -> None:
    g.call(g.graph.graph.add_bitmap("disk", "b0", granularity=CLUSTER))


def other_writer(g: Guest) -> None:
    with g.graph.backend("disk", writable=True) as other:
        for cluster in range(5, CLUSTERS, 701):
            other.discard(cluster * CLUSTER, CLUSTER)
            g.stored[cluster] = stamp(1 << 32 | cluster)
            other.pwrite(cluster * CLUSTER, g.stored[cluster])


def resize(g: Guest) -> None:
    g.call(g.disk._backend.truncate(SIZE + 5 * CLUSTER))
    g.call(g.disk._backend.truncate(SIZE - 512))
    g.call(g.disk._backend.truncate(SIZE))


def reopen(g: Guest) -> None:
    g.call(g.graph.graph.reopen("disk", {"discard": "unmap", "l2-cache-size": 8 * CLUSTER}))


def zeroes(g: Guest) -> None:
    for cluster in range(3, CLUSTERS, 701):
        g.zero(cluster)


def nothing(g: Guest) -> None:
    """It is dropped and found again."""


@pytest.mark.parametrize("event", [snapshot, add_bitmap, other_writer, resize, reopen, zeroes, nothing])
def test_event_is_not_forgotten_by_what_was_dropped(tmpfs: Path, event: Callable[[Guest], None]) -> None:
    rng = random.Random(3)
    with guest(tmpfs) as g:
        for cluster in g.all_over(2000, rng):
            g.write(cluster)
        event(g)
        clusters = g.all_over(2000, rng)
        for cluster in clusters:
            g.read(cluster)
            g.write(cluster)
        for cluster in g.stored:
            g.read(cluster)
        if event is add_bitmap:
            found = g.graph.dirty_extents("disk", "b0")
            dirty = {at // CLUSTER for start, length in found for at in range(start, start + length, CLUSTER)}
            assert dirty == set(clusters)
        assert g.disk.stats().recalls > 500


def test_backup_top_keeps_what_is_overwritten_in_what_was_dropped(tmpfs: Path) -> None:
    rng = random.Random(4)
    with guest(tmpfs) as g:
        for cluster in g.all_over(1000, rng):
            g.write(cluster)
        kept = dict(g.stored)
        asyncio.run(create_file(str(g.path / "kept"), SIZE, "raw", replace=True))
        target = {"driver": "raw", "node-name": "kept", "file": {"driver": "file", "filename": str(g.path / "kept")}}
        g.call(g.graph.graph.add_node(target))
        top = {"driver": "backup-top", "node-name": "top", "file": "disk", "target": "kept"}
        g.call(g.graph.graph.insert_filter(top, "disk"))
        g.call(g.graph.graph.add_node({"driver": "snapshot-access", "node-name": "then", "file": "top"}))
        for cluster in g.all_over(1500, rng):
            g.write(cluster)
            g.read((cluster + 1) % CLUSTERS)
        with g.graph.backend("then") as then:
            for cluster in set(g.stored) | set(kept):
                assert then.pread(cluster * CLUSTER, SHORT) == kept.get(cluster, bytes(SHORT))
        g.call(g.graph.graph.remove_node("then"))
        g.call(g.graph.graph.remove_filter("top"))
        for cluster in g.stored:
            g.read(cluster)


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_requests(tmpfs: Path, seed: int) -> None:
    rng = random.Random(seed)
    with guest(tmpfs, discard="unmap") as g:
        few = g.all_over(300, rng)
        for step in range(6000):
            cluster = rng.choice(few) if rng.random() < 0.5 else rng.randrange(CLUSTERS)
            act = rng.choices([g.read, g.write, g.zero, g.discard], [70, 20, 1, 1])[0]
            act(cluster)
            if step % 500 == 499:
                g.disk.flush()
        for cluster in g.stored:
            g.read(cluster)
        assert g.disk.stats().recalls > 100
    with blockgraph.open({"nodes": [description(g.path / "disk")]}) as graph, graph.backend("disk") as disk:
        for cluster, data in g.stored.items():
            assert disk.pread(cluster * CLUSTER, SHORT) == data
