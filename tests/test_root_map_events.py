# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What every event costs native requests: how many go to Python until the map knows again, and that none of them is
served from what was known before."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import blockgraph
from blockgraph import errors
from blockgraph.api import SyncBackend, SyncGraph
from blockgraph.create import create_file
from blockgraph.driver import Filter
from blockgraph.flags import Flag
from blockgraph.native import Zeroing
from blockgraph.options import NodeOptions, NodeRef
from blockgraph.registry import driver_names, register

SIZE = 4 << 20
CLUSTER = 64 << 10
AT = 3 * CLUSTER


def image(name: str, path: Path, driver: str, **more: Any) -> dict[str, Any]:
    """A description of an image file."""
    return {"driver": driver, "node-name": name, "file": {"driver": "file", "filename": str(path)}, **more}


def create(path: Path, driver: str) -> Path:
    """A new image file."""
    asyncio.run(create_file(str(path), SIZE, driver, replace=True))
    return path


class PassOptions(NodeOptions, kw_only=True, frozen=True):
    file: NodeRef


class Pass(Filter):
    """Changes nothing."""

    name = "pass"
    Options = PassOptions


class SeeWrites(Filter):
    """Overrides pwrite and says nothing else."""

    name = "see-writes"
    Options = PassOptions
    seen = 0

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        SeeWrites.seen += 1
        await self.file.pwrite(offset, buf, flags)


class SeeFlushes(Filter):
    """Overrides flush."""

    name = "see-flushes"
    Options = PassOptions
    seen = 0

    async def flush(self) -> None:
        SeeFlushes.seen += 1
        await self.file.flush()


class SeeDiscards(Filter):
    """Overrides discard."""

    name = "see-discards"
    Options = PassOptions
    seen = 0

    async def discard(self, offset: int, length: int) -> None:
        SeeDiscards.seen += 1
        await self.file.discard(offset, length)


@pytest.fixture(autouse=True)
def filters() -> None:
    """The filters above are known."""
    for driver in (Pass, SeeWrites, SeeFlushes, SeeDiscards):
        if driver.name not in driver_names():
            register(driver)


class Warm:
    """A root that knows its disk.

    Attributes:
        stored: what the disk holds from AT on.
    """

    def __init__(self, graph: SyncGraph, path: Path, disk: SyncBackend) -> None:
        self.graph, self.path, self.disk = graph, path, disk
        self.disk.pwrite(0, b"\1" * SIZE)
        self.stored = b""
        self.write()
        self.read()
        assert (self.read(), self.write()) == (0, 0)

    def call(self, work: Any) -> Any:
        """Run it in the loop."""
        return self.graph.call(work)

    def read(self) -> int:
        """Read and compare; how many requests went to Python."""
        before = self.disk.stats().misses
        found = self.disk.pread(AT, 4096)
        assert found[: len(self.stored)] == self.stored
        return self.disk.stats().misses - before

    def write(self) -> int:
        """Write something new; how many requests went to Python."""
        before = self.disk.stats().misses
        self.stored = bytes([(self.stored or b"\0")[0] % 255 + 1]) * 512
        self.disk.pwrite(AT, self.stored)
        return self.disk.stats().misses - before


@contextmanager
def warm(path: Path, driver: str, **more: Any) -> Iterator[Warm]:
    """A graph "disk" over "disk-file", and its root."""
    create(path / "disk", driver)
    file = {"driver": "file", "node-name": "disk-file", "filename": str(path / "disk")}
    with blockgraph.open({"nodes": [{"driver": driver, "node-name": "disk", "file": file, **more}]}) as graph:
        yield Warm(graph, path, graph.backend("disk", writable=True, resize=True))


def drain(w: Warm) -> None:
    async def run() -> None:
        async with w.graph.graph.drained(["disk-file"]):
            pass

    w.call(run())


def insert_pass(w: Warm, above: str = "disk") -> None:
    w.call(w.graph.graph.insert_filter({"driver": "pass", "node-name": "top", "file": above}, above))


def remove_pass(w: Warm) -> None:
    w.call(w.graph.graph.remove_filter("top"))


def insert_backup_top(w: Warm) -> None:
    create(w.path / "kept", "raw")
    w.call(w.graph.graph.add_node(image("kept", w.path / "kept", "raw")))
    top = {"driver": "backup-top", "node-name": "top", "file": "disk", "target": "kept"}
    w.call(w.graph.graph.insert_filter(top, "disk"))


def snapshot(w: Warm) -> None:
    create(w.path / "overlay", "qcow2")
    w.call(w.graph.graph.snapshot("disk", image("overlay", w.path / "overlay", "qcow2", backing=None)))


def discard(w: Warm) -> None:
    w.disk.discard(AT, CLUSTER)
    w.stored = bytes(512)


def write_zeroes(w: Warm) -> None:
    w.disk.write_zeroes(AT, CLUSTER)
    w.stored = bytes(512)


def resize(w: Warm) -> None:
    w.call(w.disk._backend.truncate(SIZE + CLUSTER))


def reopen(w: Warm) -> None:
    w.call(w.graph.graph.reopen("disk", {"discard": "ignore"}))


def add_bitmap(w: Warm) -> None:
    w.call(w.graph.graph.add_bitmap("disk", "b0"))


def add_bitmap_below(w: Warm) -> None:
    w.call(w.graph.graph.add_bitmap("disk-file", "b1"))


def writer_comes_and_goes(w: Warm) -> None:
    """Permissions on the way change, and what is held still for that is forgotten; bytes do not move."""
    with w.graph.backend("disk", writable=True) as other:
        w.stored = b"o" * 512
        other.pwrite(AT, w.stored)


#: event, driver, requests that go to Python afterwards: the first read, and a write after it
EVENTS: list[tuple[Callable[[Warm], None], str, int, int]] = [
    (drain, "raw", 1, 0),
    (drain, "qcow2", 1, 0),
    (insert_pass, "raw", 1, 0),
    (insert_pass, "qcow2", 1, 0),
    (lambda w: insert_pass(w, "disk-file"), "raw", 1, 0),
    (lambda w: insert_pass(w, "disk-file"), "qcow2", 1, 0),
    (insert_backup_top, "raw", 1, 1),
    (insert_backup_top, "qcow2", 1, 1),
    (snapshot, "raw", 1, 1),
    (snapshot, "qcow2", 1, 1),
    (resize, "raw", 1, 0),
    (resize, "qcow2", 1, 0),
    (reopen, "raw", 1, 0),
    (reopen, "qcow2", 1, 0),
    (add_bitmap, "raw", 1, 0),
    (add_bitmap, "qcow2", 1, 0),
    (add_bitmap_below, "raw", 1, 0),
    (discard, "raw", 0, 0),
    (discard, "qcow2", 1, 1),
    (write_zeroes, "raw", 0, 0),
    (write_zeroes, "qcow2", 0, 1),
    (writer_comes_and_goes, "raw", 1, 0),
    (writer_comes_and_goes, "qcow2", 1, 0),
]
NAMES = [
    f"{getattr(event, '__name__', '')}-{driver}".replace("<lambda>", "insert_below") for event, driver, *_ in EVENTS
]


@pytest.mark.parametrize("event, driver, reads, writes", EVENTS, ids=NAMES)
def test_event_costs_so_many_faults_and_no_stale_byte(
    tmp_path: Path, event: Callable[[Warm], None], driver: str, reads: int, writes: int
) -> None:
    with warm(tmp_path, driver) as w:
        event(w)
        assert w.read() == reads
        assert w.write() == writes
        assert (w.read(), w.write(), w.read()) == (0, 0, 0)


def test_bitmap_of_a_node_with_other_offsets_sees_every_write_in_python(tmp_path: Path) -> None:
    with warm(tmp_path, "qcow2") as w:
        add_bitmap_below(w)
        bits = w.graph.graph.find_bitmap("disk-file", "b1")
        assert (w.read(), w.write(), w.write(), w.read()) == (1, 1, 1, 0)
        assert sum(length for _, length in bits.dirty_extents()) == CLUSTER


@pytest.mark.parametrize("driver", ["raw", "qcow2"])
def test_filter_removed_is_forgotten(tmp_path: Path, driver: str) -> None:
    with warm(tmp_path, driver) as w:
        insert_pass(w)
        w.read()
        assert (w.read(), w.write()) == (0, 0)
        remove_pass(w)
        assert (w.read(), w.write(), w.read(), w.write()) == (1, 0, 0, 0)


def test_reopened_read_only_refuses_what_was_mapped_writable(tmp_path: Path) -> None:
    create(tmp_path / "disk", "raw")
    with blockgraph.open({"nodes": [image("disk", tmp_path / "disk", "raw")]}) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pwrite(AT, b"a" * 512)
        disk.pwrite(AT, b"b" * 512)
        with pytest.raises(errors.BlockGraphError):  # the root still needs to write
            graph.call(graph.graph.reopen("disk", {"read-only": True}))
        misses = disk.stats().misses
        disk.pwrite(AT, b"c" * 512)
        assert disk.stats().misses - misses <= 1
        assert disk.pread(AT, 512) == b"c" * 512


@pytest.mark.parametrize("other", ["discard", "write_zeroes", "pwrite"])
def test_change_by_another_root_of_a_backing_chain_is_seen_above(tmp_path: Path, other: str) -> None:
    create(tmp_path / "base", "qcow2")
    create(tmp_path / "top", "qcow2")
    base = image("base", tmp_path / "base", "qcow2")
    nodes = [base, image("disk", tmp_path / "top", "qcow2", backing="base")]
    with blockgraph.open({"nodes": [base]}) as graph, graph.backend("base", writable=True) as fill:
        fill.pwrite(0, b"b" * SIZE)
    with blockgraph.open({"nodes": nodes}) as graph:
        reader, writer = graph.backend("disk"), graph.backend("disk", writable=True)
        for _ in range(2):
            assert reader.pread(AT, 512) == b"b" * 512
        misses = reader.stats().misses
        if other == "pwrite":  # copy on write of the cluster
            writer.pwrite(AT, b"n" * 512)
        else:
            getattr(writer, other)(AT, CLUSTER)
        for _ in range(3):
            assert reader.pread(AT, 512) == (b"n" * 512 if other == "pwrite" else bytes(512))
        assert reader.stats().misses == misses + 1
        assert reader.pread(AT + CLUSTER, 512) == b"b" * 512


# Filters.


def test_filter_that_overrides_pwrite_sees_every_write_and_no_read(tmp_path: Path) -> None:
    create(tmp_path / "disk", "raw")
    top = {"driver": "see-writes", "node-name": "top", "file": image("disk", tmp_path / "disk", "raw")}
    with blockgraph.open({"nodes": [top]}) as graph:
        disk = graph.backend("top", writable=True)
        disk.pread(0, 512)
        before, seen = disk.stats(), SeeWrites.seen
        for i in range(20):
            disk.pwrite(i * 4096, b"w" * 512)
            assert disk.pread(i * 4096, 512) == b"w" * 512
        after = disk.stats()
        assert SeeWrites.seen - seen == 20
        assert (after.misses - before.misses, after.hits - before.hits) == (20, 20)


@pytest.mark.parametrize("driver", ["pass", "see-flushes", "see-discards"])
@pytest.mark.parametrize("format_driver", ["raw", "qcow2"])
def test_flush_zeroes_and_discard_are_native_unless_somebody_wants_to_see_them(
    tmp_path: Path, driver: str, format_driver: str
) -> None:
    create(tmp_path / "disk", format_driver)
    top = {"driver": driver, "node-name": "top", "file": image("disk", tmp_path / "disk", format_driver)}
    with blockgraph.open({"nodes": [top]}) as graph:
        disk = graph.backend("top", writable=True)
        disk.pwrite(0, b"x" * SIZE)
        disk.flush()
        disk.flush()
        disk.pwrite(AT, b"y" * 512)
        seen = SeeFlushes.seen
        assert native_flush(disk) == (driver != "see-flushes")
        disk.flush()
        assert SeeFlushes.seen - seen == (driver == "see-flushes")
        seen = SeeDiscards.seen
        assert native_discard(disk, AT, CLUSTER) == (driver != "see-discards" and format_driver == "raw")
        disk.discard(AT, CLUSTER)
        assert SeeDiscards.seen - seen == (driver == "see-discards")
        assert disk.pread(AT, CLUSTER) == bytes(CLUSTER)
        disk.pwrite(AT, b"z" * 512)
        assert disk.pread(AT, 512) == b"z" * 512


def native_flush(disk: SyncBackend) -> bool:
    return disk._extents.flush()


def native_discard(disk: SyncBackend, offset: int, length: int) -> bool:
    return disk._extents.zero(offset, length, Zeroing.PUNCH)


@pytest.mark.parametrize("option", [{"discard": "ignore"}, {"detect-zeroes": "on"}, {"cache": {"no-flush": True}}])
def test_options_that_change_what_happens_are_not_bypassed(tmp_path: Path, option: dict[str, Any]) -> None:
    with warm(tmp_path, "raw") if "detect-zeroes" in option else warm(tmp_path, "raw", **option) as w:
        if "detect-zeroes" in option:
            w.call(w.graph.graph.reopen("disk", option))
        w.disk.pread(AT, 512)
        w.disk.flush()
        w.disk.flush()
        assert native_flush(w.disk) == ("cache" not in option)
        before = w.disk.pread(AT, CLUSTER)
        assert native_discard(w.disk, AT, CLUSTER) == ("detect-zeroes" not in option)
        assert w.disk.pread(AT, CLUSTER) == (bytes(CLUSTER) if "cache" in option else before)
        assert before != bytes(CLUSTER)


def test_first_writes_to_clusters_are_flushed_by_python(tmp_path: Path) -> None:
    create(tmp_path / "disk", "qcow2")
    with blockgraph.open({"nodes": [image("disk", tmp_path / "disk", "qcow2")]}) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pwrite(0, b"x" * CLUSTER)
        disk.pwrite(CLUSTER, b"x" * CLUSTER)
        disk.flush()
        disk.flush()
        assert native_flush(disk)
        before = disk.stats()
        disk.pwrite(20 * CLUSTER, b"y" * 512)
        assert disk.stats().first_writes == before.first_writes + 1
        assert not native_flush(disk)
        disk.flush()
        disk.flush()
        assert native_flush(disk)


def test_flush_covers_native_writes_of_other_roots(tmp_path: Path) -> None:
    with warm(tmp_path, "raw") as w:
        for _ in range(2):
            w.disk.flush()
        assert native_flush(w.disk)
        with w.graph.backend("disk", writable=True) as other:
            for root in (w.disk, other, w.disk, other):
                root.pwrite(AT, b"o" * 512)
                root.flush()
            assert not native_flush(w.disk)
            assert not native_flush(other)
        w.disk.pread(AT, 512)
        for _ in range(2):
            w.disk.flush()
        assert native_flush(w.disk)
        with w.graph.backend("disk") as reader:
            reader.pread(AT, 512)
            w.disk.pread(AT, 512)
            for _ in range(2):
                w.disk.flush()
            assert native_flush(w.disk)


def test_native_flush_that_failed_fails_every_later_one(tmp_path: Path) -> None:
    with pytest.raises(errors.IOFailure, match="disk"), warm(tmp_path, "raw") as w:
        break_flush(w)


def break_flush(w: Warm) -> None:
    w.disk.flush()
    w.disk.flush()
    w.write()
    fd = w.graph.graph.node("disk-file").driver.fd()
    assert fd is not None
    kept, pipe = os.dup(fd), os.pipe()
    os.dup2(pipe[1], fd)  # can not be made durable
    assert not native_flush(w.disk)
    os.dup2(kept, fd)
    for end in (kept, *pipe):
        os.close(end)
    for _ in range(2):
        with pytest.raises(errors.IOFailure, match="disk"):
            w.disk.flush()
