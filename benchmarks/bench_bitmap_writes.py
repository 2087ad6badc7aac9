# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What dirty bitmaps cost a guest: 4 KiB random writes to disks with 0, 1, 4 and 16 enabled bitmaps, in turn, on tmpfs.

Wanted with 1, 4 and 16 bitmaps: 0.98, 0.95 and 0.9 of the rate without. The disks are equal but for their bitmaps, and
in one process, so that the sides differ in nothing else. In process the rate is that per second of processor time, and
the sides alternate in short slices: what others do on the machine counts for little.
"""

from __future__ import annotations

import random
import statistics
import time
from functools import partial
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import blockgraph
from benchmarks import servers
from benchmarks.fio import fio, need_fio, pattern
from benchmarks.images import MIB, dense, node
from benchmarks.peers import add_row, against, in_turn
from blockgraph.bitmaps.actions import BitmapName, ClearBitmap

BLOCK = 4096
SIZE = 128 * MIB
GRANULARITY = 64 << 10
WRITES = 20_000
#: Writes of a side before it is the next one's turn.
SLICE = 500

WANTED = {1: 0.98, 4: 0.95, 16: 0.9}
COUNTS = {f"disk{count}": count for count in (0, *WANTED)}


def rows(benchmark: BenchmarkFixture, runs: dict[str, list[float]], what: str, wanted: dict[int, float]) -> None:
    """Rates with bitmaps beside that without."""
    for count in WANTED:
        mine = runs[f"disk{count}"]
        row = against("without bitmaps", mine, runs["disk0"], wanted.get(count))
        bitmaps = "1 bitmap" if count == 1 else f"{count} bitmaps"
        add_row(benchmark, "4.1", f"4 KiB random write, {what}, {bitmaps}", "IOPS", statistics.median(mine), row)


def disks(directory: Path) -> dict[str, dict[str, object]]:
    """Dense raw disks, equal but for their names."""
    for name in COUNTS:
        dense(directory / name, SIZE)
    return {name: node(name, directory / name) for name in COUNTS}


@pytest.mark.parametrize("touch", ["steady", "first"])
def test_writes_in_process(benchmark: BenchmarkFixture, shm: Path, touch: str) -> None:
    """By the Python API. `first`: the bitmaps are cleared before each run, and each write is to another granule."""
    nodes = list(disks(shm).values())
    bitmaps = [{"node": disk, "name": name, "granularity": GRANULARITY} for disk, name in _each_bitmap()]
    block = bytes(BLOCK)
    rng = random.Random(4)
    if touch == "first":
        where = [at + rng.randrange(GRANULARITY // BLOCK) * BLOCK for at in range(0, SIZE, GRANULARITY)]
        rng.shuffle(where)
    else:
        where = [rng.randrange(SIZE // BLOCK) * BLOCK for _ in range(WRITES)]
    with blockgraph.open({"nodes": nodes, "bitmaps": bitmaps}) as graph:
        backends = {name: graph.backend(name, writable=True) for name in COUNTS}

        def measure() -> dict[str, float]:
            if touch == "first":
                graph.act(*(ClearBitmap(BitmapName(*bitmap)) for bitmap in _each_bitmap()))
            for backend in backends.values():
                backend.pwrite(0, block)  # enters the disk in the extent map
            spent = dict.fromkeys(COUNTS, 0.0)
            for start in range(0, len(where), SLICE):
                offsets = where[start : start + SLICE]
                for name, backend in backends.items():
                    before = time.thread_time()
                    for offset in offsets:
                        backend.pwrite(offset, block)
                    spent[name] += time.thread_time() - before
            return {name: len(where) / seconds for name, seconds in spent.items()}

        results = benchmark.pedantic(in_turn, args=({"all": measure},), rounds=1)["all"]
        assert all(bitmap.count for bitmap in graph.bitmaps())
    runs = {name: [result[name] for result in results] for name in COUNTS}
    if touch == "first":
        rows(benchmark, runs, "in process, first touch of each granule", {})
    else:
        rows(benchmark, runs, "in process", WANTED)


def _each_bitmap() -> list[tuple[str, str]]:
    """Disk and name."""
    return [(name, f"b{number}") for name, count in COUNTS.items() for number in range(count)]


def test_writes_over_nbd(benchmark: BenchmarkFixture, shm: Path) -> None:
    """fio, 16 requests in flight; also by the server's processor time, which is steadier."""
    need_fio()
    options = pattern("randwrite", SIZE, BLOCK, 16)
    with servers.ours_with_bitmaps(shm, disks(shm), COUNTS) as (uris, pid):

        def side(uri: str) -> tuple[float, float]:
            before = servers.processor_time(pid)
            done = fio(uri, *options)
            return done.iops, done.requests / (servers.processor_time(pid) - before)

        sides = {name: partial(side, uri) for name, uri in zip(COUNTS, uris, strict=True)}
        runs = benchmark.pedantic(in_turn, args=(sides,), rounds=1)
    for number, what in enumerate(("NBD, depth 16", "NBD, depth 16, by processor time of the server")):
        rows(benchmark, {name: [run[number] for run in each] for name, each in runs.items()}, what, WANTED)
