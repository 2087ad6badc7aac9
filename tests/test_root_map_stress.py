# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Every change of a graph against native requests: guests, in threads of this process and over NBD, write and check all
the while; at the end every byte of the disk is compared, in the graph, after reopening, and by QEMU."""

from __future__ import annotations

import asyncio
import itertools
import random
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import pytest

import blockgraph
from blockgraph.api import SyncBackend, SyncGraph
from blockgraph.create import create_file
from blockgraph.exports.nbd import NbdExport, NbdServer
from blockgraph.native import ExtentMap, L2Parts, L2Places, MapExtent
from blockgraph.scattered_faults import ScatteredFaults
from blockgraph.testing.nbd_client import NbdClient

CLUSTER = 64 << 10
BLOCK = 4096
#: Guests have the first part of the disk, the changes discard and check the second; a third comes and goes.
GUESTS, DISCARDED, MORE = 2 << 20, 1 << 20, (1 << 20) - 512
SIZE = GUESTS + DISCARDED
THREADS = 4
#: Snapshots make a chain, and each of its images is kept.
SNAPSHOTS = 4


def image(name: str, path: Path, driver: str, *, direct: bool = False, **more: Any) -> dict[str, Any]:
    """A description of an image file."""
    file = {"driver": "file", "filename": str(path), "cache": {"direct": direct}}
    return {"driver": driver, "node-name": name, "file": file, **more}


class Disk(Protocol):
    """What a guest sees."""

    def pread(self, offset: int, length: int) -> bytes: ...
    def pwrite(self, offset: int, data: bytes) -> None: ...
    def flush(self) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...


class NbdDisk:
    """A connection of one thread."""

    def __init__(self, path: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = self._loop.run_until_complete(NbdClient.connect_unix(path, "disk"))

    def pread(self, offset: int, length: int) -> bytes:
        return self._loop.run_until_complete(self._client.pread(offset, length))

    def pwrite(self, offset: int, data: bytes) -> None:
        self._loop.run_until_complete(self._client.pwrite(offset, data, fua=data[0] % 16 == 0))

    def flush(self) -> None:
        self._loop.run_until_complete(self._client.flush())

    def discard(self, offset: int, length: int) -> None:
        self._loop.run_until_complete(self._client.write_zeroes(offset, length))

    def close(self) -> None:
        """Disconnect."""
        self._loop.run_until_complete(self._client.disconnect())
        self._loop.close()


class Guest(threading.Thread):
    """Writes and checks blocks of its own: number, number + THREADS, ... of the disk's first part.

    Attributes:
        blocks: what it has written, by offset.
        rounds: requests so far.
        trouble: what was wrong, None: nothing.
    """

    def __init__(self, number: int, opener: Callable[[], Disk]) -> None:
        super().__init__()
        self.number, self._opener = number, opener
        self.blocks: dict[int, bytes] = {}
        self.rounds = 0
        self.trouble: str | None = None
        self.stop = False

    def run(self) -> None:
        rng = random.Random(self.number)
        try:
            disk = self._opener()
            while not self.stop and self.trouble is None:
                self.rounds += 1
                offset = (rng.randrange(GUESTS // BLOCK // THREADS) * THREADS + self.number) * BLOCK
                choice = rng.random()
                if choice < 0.5:
                    self.blocks[offset] = rng.randbytes(16) * (BLOCK // 16)
                    disk.pwrite(offset, self.blocks[offset])
                elif choice < 0.55:
                    part, data = rng.randrange(BLOCK - 16), rng.randbytes(16)
                    old = self.blocks.get(offset, bytes(BLOCK))
                    self.blocks[offset] = old[:part] + data + old[part + 16 :]
                    disk.pwrite(offset + part, data)
                elif choice < 0.6:
                    self.blocks[offset] = bytes(BLOCK)
                    disk.discard(offset, BLOCK) if isinstance(disk, NbdDisk) else disk.pwrite(offset, bytes(BLOCK))
                elif choice < 0.63:
                    disk.flush()
                elif disk.pread(offset, BLOCK) != self.blocks.get(offset, bytes(BLOCK)):
                    self.trouble = f"guest {self.number}: wrong bytes at {offset}"
            if isinstance(disk, NbdDisk):
                disk.close()
        except Exception as error:
            self.trouble = f"guest {self.number}: {error!r}"


class Changes:
    """What is done to the graph, one after the other."""

    def __init__(self, graph: SyncGraph, disk: SyncBackend, path: Path, guests: list[Guest], *, direct: bool) -> None:
        self.graph, self.disk, self.path, self.guests, self.direct = graph, disk, path, guests, direct
        self.rng = random.Random(5)
        self.images = ["disk"]
        self.tail = bytearray(DISCARDED)

    def call(self, work: Any) -> Any:
        """Run it in the loop."""
        return self.graph.call(work)

    def wait(self, requests: int) -> None:
        """Until every guest has done so many more."""
        until = [guest.rounds + requests for guest in self.guests]
        for guest, rounds in zip(self.guests, until, strict=True):
            while guest.rounds < rounds and guest.is_alive():
                guest.join(0.001)

    def make(self, name: str, driver: str) -> Path:
        """A new image as large as the disk."""
        asyncio.run(create_file(str(self.path / name), SIZE, driver, replace=True))
        return self.path / name

    def snapshot(self) -> None:
        if len(self.images) > SNAPSHOTS:
            return
        name = f"overlay{len(self.images)}"
        overlay = image(name, self.make(name, "qcow2"), "qcow2", direct=self.direct, backing=None)
        self.call(self.graph.graph.snapshot(self.images[-1], overlay))
        self.images.append(name)

    def backup_top(self) -> None:
        driver = self.rng.choice(["raw", "qcow2"])
        change = self.graph.graph
        self.call(change.add_node(image("kept", self.make("kept", driver), driver, direct=self.direct)))
        top = {"driver": "backup-top", "node-name": "top", "file": self.images[-1], "target": "kept"}
        self.call(change.insert_filter(top, self.images[-1]))
        self.call(change.add_node({"driver": "snapshot-access", "node-name": "then", "file": "top"}))
        with self.graph.backend("then") as then:
            first = then.pread(0, SIZE)
            assert first[GUESTS:] == self.tail
            self.wait(40)
            self.discard()
            self.wait(40)
            assert then.pread(0, SIZE) == first, "the kept image has changed"
        self.call(change.remove_node("then"))
        self.call(change.remove_filter("top"))
        self.call(change.remove_node("kept"))

    def resize(self) -> None:
        self.call(self.disk._backend.truncate(SIZE + MORE))  # which ends inside a page
        self.disk.pwrite(SIZE, b"m" * MORE)
        self.wait(10)
        assert self.disk.pread(SIZE, MORE) == b"m" * MORE
        self.call(self.disk._backend.truncate(SIZE))

    def reopen(self) -> None:
        name = self.rng.choice(["detect-zeroes", "discard"])
        value = {"detect-zeroes": ["on", "off"], "discard": ["unmap", "ignore"]}[name]
        self.call(self.graph.graph.reopen(self.images[-1], {name: self.rng.choice(value)}))

    def discard(self) -> None:
        for _ in range(8):
            start = self.rng.randrange(DISCARDED // CLUSTER) * CLUSTER
            what = self.rng.randrange(3)
            data = self.rng.randbytes(CLUSTER) if what else bytes(CLUSTER)
            if what:
                self.disk.pwrite(GUESTS + start, data)
            else:
                self.disk.discard(GUESTS + start, CLUSTER)
                data = self.disk.pread(GUESTS + start, CLUSTER)  # zeroes, or as before
                assert data in (bytes(CLUSTER), self.tail[start : start + CLUSTER])
                self.disk.write_zeroes(GUESTS + start, CLUSTER)
                data = bytes(CLUSTER)
            self.tail[start : start + CLUSTER] = data
            assert self.disk.pread(GUESTS + start, CLUSTER) == data

    def bitmap(self) -> None:
        name = f"b{self.rng.randrange(1 << 30)}"
        bitmap = self.call(self.graph.graph.add_bitmap(self.images[-1], name))
        self.disk.pwrite(GUESTS, bytes(self.tail[:BLOCK]))
        assert bitmap.contents().next_dirty(GUESTS) is not None

    def passing_filter(self) -> None:
        change = self.graph.graph
        self.call(
            change.insert_filter({"driver": "delay", "node-name": "slow", "file": self.images[-1]}, self.images[-1])
        )
        self.wait(10)
        self.call(change.remove_filter("slow"))


@contextmanager
def served(graph: SyncGraph, disk: SyncBackend, path: Path) -> Iterator[str]:
    """The disk as NBD export."""

    async def start() -> NbdServer:
        server = NbdServer(threads=2)
        await server.listen_unix(str(path))
        disk._backend.use_map()
        server.add_export(NbdExport("disk", disk._backend, writable=True))
        return server

    server = graph.call(start())
    try:
        yield str(path)
        assert server.stats is not None
        assert server.stats.hits > 500
    finally:
        graph.call(server.close())


EVERY_WAY = list(itertools.product(["threads", "nbd"], ["raw", "qcow2"], ["memory", "direct"]))


@pytest.mark.parametrize("through, driver, cache", [*EVERY_WAY, ("nbd, all looked up", "qcow2", "memory")])
def test_every_change_of_a_graph_under_native_requests_keeps_every_byte(
    tmpfs: Path,
    tmp_path: Path,
    through: str,
    driver: str,
    cache: str,
    require_tool: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    direct = cache == "direct"
    if through == "nbd, all looked up":
        monkeypatch.setattr(ScatteredFaults, "add", lambda faults, offset, write: True)
    entered = watch_look_ups(monkeypatch)
    path = tmp_path if direct else tmpfs
    asyncio.run(create_file(str(path / "disk"), SIZE, driver, replace=True))
    with blockgraph.open({"nodes": [image("disk", path / "disk", driver, direct=direct)]}) as graph:
        disk = graph.backend("disk", writable=True, resize=True)
        with served(graph, disk, path / "s") if through != "threads" else nullcontext() as socket:
            guests = [Guest(i, lambda: NbdDisk(socket) if socket else disk) for i in range(THREADS)]
            changes = Changes(graph, disk, path, guests, direct=direct)
            every = [
                changes.snapshot,
                changes.backup_top,
                changes.resize,
                changes.reopen,
                changes.discard,
                changes.bitmap,
                changes.passing_filter,
            ]
            for guest in guests:
                guest.start()
            try:
                for _ in range(4):
                    changes.rng.shuffle(every)
                    for change in every:
                        changes.wait(15)
                        change()
            finally:
                for guest in guests:
                    guest.stop = True
                for guest in guests:
                    guest.join()
            assert [guest.trouble for guest in guests] == [None] * THREADS
        expected = expectation(guests, changes.tail)
        assert disk.pread(0, SIZE) == expected
        assert disk.stats().hits > 500
        assert entered[True] > 50 or through != "nbd, all looked up"
    images = [image("disk", path / "disk", driver)]
    for below, name in zip(changes.images, changes.images[1:], strict=False):
        images.append(image(name, path / name, "qcow2", backing=below))
    with blockgraph.open({"nodes": images}) as graph, graph.backend(changes.images[-1]) as again:
        assert again.pread(0, SIZE) == expected
    for name in changes.images[driver == "raw" :]:
        subprocess.run([require_tool("qemu-img"), "check", "-q", "-f", "qcow2", path / name], check=True)


def watch_look_ups(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """How many extents are entered by looking up requests of guests, by whether they may be written."""
    entered: Counter[bool] = Counter()
    insert = ExtentMap.insert_parts

    def counted(
        extents: ExtentMap,
        generation: int,
        places: L2Places,
        parts: L2Parts,
        zeroes: bool,
        shift: int,
        within: MapExtent,
    ) -> int:
        count = insert(extents, generation, places, parts, zeroes, shift, within)
        entered[within.writable] += count
        return count

    monkeypatch.setattr(ExtentMap, "insert_parts", counted)
    return entered


def expectation(guests: list[Guest], tail: bytearray) -> bytes:
    """What the disk has to hold."""
    expected = bytearray(GUESTS) + tail
    for guest in guests:
        for offset, data in guest.blocks.items():
            expected[offset : offset + BLOCK] = data
    return bytes(expected)
