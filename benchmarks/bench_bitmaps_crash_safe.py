# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What crash-safe bitmaps cost a guest: random 4 KiB writes through the Python API, on a file system.

First touch: one write into each region of the disk, so that each has to wait for a mark, one by one or 16 at a time.
Steady state: writes everywhere in regions that are open, while the clock turns ten times as fast as it does.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import blockgraph
from benchmarks.images import MIB, make, node
from benchmarks.peers import add_row, against, in_turn, timed
from blockgraph.api import SyncBackend
from blockgraph.bitmaps import identity

BLOCK = 4096
SIZE = 256 * MIB
WRITES = 10000

Side = Literal["none", "plain", "crash-safe"]
SIDES: tuple[Side, ...] = ("none", "plain", "crash-safe")


@contextmanager
def opened(path: Path, side: Side) -> Iterator[tuple[blockgraph.api.SyncGraph, SyncBackend]]:
    """The disk with no bitmap, one in memory, or one in a sidecar."""
    Path(f"{path}.bitmaps").unlink(missing_ok=True)
    with blockgraph.open({"nodes": [node("disk", path)]}) as graph:
        if side != "none":
            sidecar = side == "crash-safe"
            graph.call(graph.graph.add_bitmap("disk", "b0", persistent=sidecar, sidecar=sidecar))
        yield graph, graph.backend("disk", writable=True)


def first_touch(path: Path, side: Side, depth: int) -> float:
    """Microseconds for each of the regions."""
    where = [number * MIB for number in range(SIZE // MIB)]
    random.Random(1).shuffle(where)
    data = bytes(BLOCK)
    with opened(path, side) as (graph, disk):
        root = disk._backend

        async def some(offsets: list[int]) -> None:
            for offset in offsets:
                await root.pwrite(offset, data)

        async def run() -> None:
            await asyncio.gather(*(some(where[n::depth]) for n in range(depth)))

        return timed(lambda: graph.call(run())) / len(where) * 1e6


def steady(path: Path, side: Side, threads: int) -> float:
    """Writes each second; every region has been written before."""
    data = bytes(BLOCK)

    def write(disk: SyncBackend, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(WRITES):
            disk.pwrite(rng.randrange(SIZE // BLOCK) * BLOCK, data)

    with opened(path, side) as (_, disk):
        for at in range(0, SIZE, MIB):
            disk.pwrite(at, data)
        writers = [threading.Thread(target=write, args=(disk, seed)) for seed in range(threads)]
        start = time.perf_counter()
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        return threads * WRITES / (time.perf_counter() - start)


def sides(run: Callable[[Side], float]) -> dict[str, Callable[[], float]]:
    return {side: lambda side=side: run(side) for side in SIDES}  # type: ignore[misc]


@pytest.mark.parametrize("depth", [1, 16])
def test_first_touch(benchmark: BenchmarkFixture, disk_directory: Path, depth: int) -> None:
    """One fdatasync for all who wait."""
    path = disk_directory / "disk"
    make(path, SIZE, "raw")
    runs = benchmark.pedantic(in_turn, args=(sides(lambda side: first_touch(path, side, depth)),), rounds=1)
    ours, what = runs["crash-safe"], f"first 4 KiB write into a region, {depth} at a time, crash-safe bitmap"
    peers = [against(f"{side} bitmap", ours, runs[side], lower=True) for side in ("none", "plain")]
    add_row(benchmark, "bitmaps", what, "us", statistics.median(ours), *peers)


@pytest.mark.parametrize("threads", [1, 4])
def test_steady_state(
    benchmark: BenchmarkFixture, disk_directory: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """As plain bitmaps, but for a fault in each region with every turn of the clock."""
    monkeypatch.setattr(identity, "BEAT", identity.BEAT / 10)
    path = disk_directory / "disk"
    make(path, SIZE, "raw")
    runs = benchmark.pedantic(in_turn, args=(sides(lambda side: steady(path, side, threads)),), rounds=1)
    ours, what = runs["crash-safe"], f"random 4 KiB writes in open regions, {threads} threads, crash-safe bitmap"
    peers = [against(f"{side} bitmap", ours, runs[side]) for side in ("none", "plain")]
    add_row(benchmark, "bitmaps", what, "writes/s", statistics.median(ours), *peers)
