# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The NBD export beside nbdkit's file plugin and qemu-nbd: fio over a unix socket, on tmpfs.

Every run has a server of its own, so no side profits from what another run has warmed up.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import servers
from benchmarks.fio import Figures, fio, first_touches, need_fio, pattern
from benchmarks.images import GIB, empty, make, node, touch_memory
from benchmarks.peers import add_row, against, in_turn, need

Server = Callable[[], AbstractContextManager[str]]

KIB = 1024
SIZE = GIB

#: Name, rw, block, depth.
PATTERNS = [
    ("4 KiB random read, depth 1", "randread", 4 * KIB, 1),
    ("4 KiB random read, depth 16", "randread", 4 * KIB, 16),
    ("4 KiB random write, depth 1", "randwrite", 4 * KIB, 1),
    ("4 KiB random write, depth 16", "randwrite", 4 * KIB, 16),
    ("256 KiB sequential read, depth 16", "read", 256 * KIB, 16),
    ("256 KiB sequential write, depth 16", "write", 256 * KIB, 16),
]
patterns = pytest.mark.parametrize("shape", PATTERNS, ids=lambda shape: shape[0].replace(" ", "-").replace(",", ""))
connected = pytest.mark.parametrize("connections", [1, 4], ids=["1-connection", "4-connections"])


def served(server: Server, options: list[str], before: Callable[[], None] | None = None) -> Figures:
    """One run against a new server; `before` it when the server is ready."""
    with server() as uri:
        if before is not None:
            before()
        return fio(uri, *options)


def compare(
    benchmark: BenchmarkFixture,
    figure: str,
    what: str,
    sides: dict[str, Callable[[], Figures]],
    wanted: dict[str, float],
) -> None:
    """Run the sides in turn, the first is ours, and record requests per second."""
    results = benchmark.pedantic(in_turn, args=(sides,), rounds=1)
    rates = {name: [run.iops for run in runs] for name, runs in results.items()}
    ours = rates.pop("ours")
    peers = [against(name, ours, rate, wanted.get(name)) for name, rate in rates.items()]
    add_row(benchmark, figure, what, "IOPS", statistics.median(ours), *peers)
    benchmark.extra_info["p99_us"] = {
        name: statistics.median(run.p99_us for run in runs) for name, runs in results.items()
    }


def raw_sides(shm: Path, disk: Path, options: list[str]) -> dict[str, Callable[[], Figures]]:
    """Servers of a raw file."""
    return {
        "ours": lambda: served(lambda: servers.ours(shm, [node("disk", disk)]), options),
        "nbdkit": lambda: served(lambda: servers.nbdkit(shm, disk), options),
        "qemu-nbd": lambda: served(lambda: servers.qemu_nbd(shm, disk), options),
    }


@patterns
@connected
def test_raw(benchmark: BenchmarkFixture, shm: Path, shape: tuple[str, str, int, int], connections: int) -> None:
    """Wanted: nbdkit's rate, 2.5 of qemu-nbd's."""
    need_fio()
    need("nbdkit", "qemu-nbd")
    what, rw, block, depth = shape
    disk = shm / "disk"
    make(disk, SIZE, "raw")
    sides = raw_sides(shm, disk, pattern(rw, SIZE, block, depth, connections))
    what += f", {connections} connections" if connections > 1 else ""
    compare(benchmark, "3.1", f"raw, {what}", sides, {"nbdkit": 1.0, "qemu-nbd": 2.5})


@contextmanager
def one_processor() -> Iterator[None]:
    """What is started meanwhile shares one."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("rw", ["read", "write"])
def test_round_trip_on_one_processor(benchmark: BenchmarkFixture, shm: Path, rw: str) -> None:
    """How long client and server compute for a request. On two, most of a round trip is that one wakes the other's."""
    need_fio()
    need("nbdkit", "qemu-nbd")
    disk = shm / "disk"
    make(disk, SIZE, "raw")
    sides = raw_sides(shm, disk, pattern(f"rand{rw}", SIZE, 4 * KIB, 1))
    with one_processor():
        compare(benchmark, "3.1", f"raw, 4 KiB random {rw}, depth 1, one processor", sides, {})


@patterns
@connected
def test_qcow2(benchmark: BenchmarkFixture, shm: Path, shape: tuple[str, str, int, int], connections: int) -> None:
    """Fully allocated; wanted: 0.9 of our own raw rate, 2.5 of qemu-nbd's with the same image."""
    need_fio()
    need("qemu-nbd")
    what, rw, block, depth = shape
    disk, image = shm / "disk", shm / "disk.qcow2"
    make(disk, SIZE, "raw")
    make(image, SIZE, "qcow2")
    options = pattern(rw, SIZE, block, depth, connections)
    sides: dict[str, Callable[[], Figures]] = {
        "ours": lambda: served(lambda: servers.ours(shm, [node("disk", image, "qcow2")]), options),
        "our raw": lambda: served(lambda: servers.ours(shm, [node("disk", disk)]), options),
        "qemu-nbd": lambda: served(lambda: servers.qemu_nbd(shm, image, "qcow2"), options),
    }
    what += f", {connections} connections" if connections > 1 else ""
    compare(benchmark, "3.2", f"qcow2, {what}", sides, {"our raw": 0.9, "qemu-nbd": 2.5})


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "with-backing"])
@pytest.mark.parametrize("block", [4 * KIB, 64 * KIB], ids=["4-KiB", "64-KiB"])
def test_first_touch(benchmark: BenchmarkFixture, shm: Path, block: int, backed: bool) -> None:
    """Writes that allocate, into an empty qcow2; wanted: 1.5 of qemu-nbd's. Whole clusters also beside what has no
    tables to keep: nbdkit with a file that is one hole."""
    need_fio()
    need("qemu-nbd", "nbdkit")
    base, image, hole = shm / "base", shm / "disk.qcow2", shm / "hole"
    backing = {"backing_file": str(base), "backing_fmt": "raw"} if backed else {}
    if backed:
        make(base, SIZE, "raw")
    options = first_touches(shm / "requests", SIZE, block)

    def touch() -> None:
        touch_memory(shm, SIZE + SIZE // 4)

    def one(server: Server) -> Figures:
        hole.unlink(missing_ok=True)
        empty(image, SIZE, "qcow2", **backing)
        return served(server, options, touch)

    def one_raw() -> Figures:
        image.unlink(missing_ok=True)
        empty(hole, SIZE)
        return served(lambda: servers.nbdkit(shm, hole), options, touch)

    description = node("disk", image, "qcow2")
    if backed:
        description["backing"] = {**node("base", base), "read-only": True}
    sides: dict[str, Callable[[], Figures]] = {
        "ours": lambda: one(lambda: servers.ours(shm, [description])),
        "qemu-nbd": lambda: one(lambda: servers.qemu_nbd(shm, image, "qcow2")),
    }
    if block == 64 * KIB:
        sides["nbdkit, raw"] = one_raw
    what = f"empty qcow2{' with a backing file' if backed else ''}, first touch of clusters by {block // KIB} KiB"
    compare(benchmark, "3.5", f"{what}, depth 16", sides, {"qemu-nbd": 1.5})
