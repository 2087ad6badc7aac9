# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Reads through the Python API beside os.preadv, a plain file, and other Python readers of qcow2; on tmpfs.

Every side makes the same reads in the same order, in one process.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import blockgraph
from benchmarks.images import GIB, MIB, make, node
from benchmarks.peers import Against, add_row, against, in_turn, timed
from blockgraph.api import SyncBackend

BLOCK = 4096
READS = 5000

Read = Callable[[int], object]


@pytest.fixture
def disk(shm: Path) -> Path:
    """A dense raw disk of 256 MiB."""
    make(shm / "disk", 256 * MIB, "raw")
    return shm / "disk"


def offsets(size: int) -> list[int]:
    """Where to read 4 KiB, at random."""
    rng = random.Random(4)
    return [rng.randrange(size // BLOCK) * BLOCK for _ in range(READS)]


def each(read: Read, where: list[int]) -> float:
    """Microseconds of each read."""

    def run() -> None:
        for offset in where:
            read(offset)

    return timed(run) / len(where) * 1e6


def into(backend: SyncBackend) -> Read:
    """Reads into one buffer."""
    buffer = memoryview(bytearray(BLOCK))
    return lambda offset: backend.pread_into(offset, buffer)


def test_pread_into_beside_preadv(benchmark: BenchmarkFixture, disk: Path) -> None:
    """Wanted: at most 1.5 microseconds more."""
    where = offsets(disk.stat().st_size)
    with blockgraph.open({"nodes": [node("disk", disk)]}) as graph, disk.open("rb") as file:
        fd, buffers = file.fileno(), [memoryview(bytearray(BLOCK))]
        read = into(graph.backend("disk"))
        sides = {
            "ours": lambda: each(read, where),
            "theirs": lambda: each(lambda at: os.preadv(fd, buffers, at), where),
        }
        runs = benchmark.pedantic(in_turn, args=(sides,), rounds=1)
    ours, theirs = runs["ours"], runs["theirs"]
    what = "4 KiB pread_into, raw"
    add_row(benchmark, "3.8", what, "us", statistics.median(ours), against("os.preadv", ours, theirs, lower=True))
    more = statistics.median(a - b for a, b in zip(ours, theirs, strict=True))
    add_row(benchmark, "3.8", f"{what}: more than os.preadv", "us", more, Against("bound", None, None, 1.5))


def dissect(path: Path, stack: ExitStack) -> Read:
    """dissect.hypervisor."""
    qcow2 = pytest.importorskip("dissect.hypervisor.disk.qcow2")
    disk = qcow2.QCow2(stack.enter_context(path.open("rb")))
    stream = disk.open() if hasattr(disk, "open") else disk

    def read(offset: int) -> object:
        stream.seek(offset)
        return stream.read(BLOCK)

    return read


def libqcow(path: Path, stack: ExitStack) -> Read:
    """libqcow-python."""
    pyqcow = pytest.importorskip("pyqcow")
    file = pyqcow.file()
    file.open(str(path))
    stack.callback(file.close)
    return lambda offset: file.read_buffer_at_offset(BLOCK, offset)


@pytest.mark.parametrize(
    "name, reader, wanted", [("dissect.hypervisor", dissect, 10.0), ("libqcow-python", libqcow, 5.0)]
)
def test_qcow2_random_reads(
    benchmark: BenchmarkFixture, shm: Path, name: str, reader: Callable[[Path, ExitStack], Read], wanted: float
) -> None:
    """4 KiB of a fully allocated image; wanted: 10 and 5 times as many."""
    image = shm / "disk.qcow2"
    make(image, GIB, "qcow2")
    where = offsets(GIB)
    with blockgraph.open({"nodes": [node("disk", image, "qcow2")]}) as graph, ExitStack() as stack:
        theirs = reader(image, stack)
        backend = graph.backend("disk")
        assert bytes(theirs(where[0])) == backend.pread(where[0], BLOCK)  # type: ignore[call-overload]
        ours = into(backend)
        sides = {"ours": lambda: each(ours, where), "theirs": lambda: each(theirs, where)}
        runs = benchmark.pedantic(in_turn, args=(sides,), rounds=1)
    row = against(name, runs["ours"], runs["theirs"], wanted, lower=True)
    add_row(benchmark, "3.8", "4 KiB random read, qcow2, Python API", "us", statistics.median(runs["ours"]), row)


@pytest.mark.parametrize("driver", ["raw", "qcow2"])
def test_sequential_read(benchmark: BenchmarkFixture, shm: Path, driver: str) -> None:
    """1 MiB reads; wanted: 0.9 of a plain file's rate.

    The plain file is the image's own: how fast memory is read depends on where it lies, by more than what is measured.
    """
    image = shm / "disk"
    make(image, GIB, driver)
    buffer = memoryview(bytearray(MIB))
    with blockgraph.open({"nodes": [node("disk", image, driver)]}) as graph, image.open("rb", buffering=0) as file:
        backend = graph.backend("disk")

        def ours() -> None:
            for offset in range(0, GIB, MIB):
                backend.pread_into(offset, buffer)

        def theirs() -> None:
            file.seek(image.stat().st_size - GIB)  # its data, behind whatever a format has before it
            for _ in range(0, GIB, MIB):
                file.readinto(buffer)

        def rate(read: Callable[[], None]) -> float:
            return GIB / MIB / timed(read)

        sides = {"ours": lambda: rate(ours), "theirs": lambda: rate(theirs)}
        runs = benchmark.pedantic(in_turn, args=(sides,), rounds=1)
    row = against("plain file", runs["ours"], runs["theirs"], 0.9)
    what = f"1 MiB sequential read, {driver}, Python API"
    add_row(benchmark, "3.8", what, "MiB/s", statistics.median(runs["ours"]), row)
