# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The persistent bitmap of a 64 TiB qcow2 disk at 64 KiB, 128 MiB of bits, saved and loaded: wanted in under 2 s."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import blockgraph
from benchmarks.images import empty
from benchmarks.peers import Against, add_row
from blockgraph.native import Bitmap

SIZE = 64 << 40
GRANULARITY = 64 << 10


def fill(bits: Bitmap, pattern: str) -> None:
    """Mark half of all granules, a thousand of them, or all."""
    if pattern == "random bits":
        bits.deserialise(0, random.Random(1).randbytes(SIZE // GRANULARITY // 8))
    elif pattern == "1,000 dirty granules":
        for number in random.Random(1).sample(range(SIZE // GRANULARITY), 1000):
            bits.set(number * GRANULARITY, 1)
    else:
        bits.fill()


async def save_and_load(image: Path, pattern: str) -> tuple[float, float]:
    """Seconds for closing the graph, and for opening it again."""
    node = {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": str(image)}}
    async with await blockgraph.aopen({"nodes": [node]}) as graph:
        if "b0" in graph.node("disk").bitmaps:
            await graph.remove_bitmap("disk", "b0")
        bitmap = await graph.add_bitmap("disk", "b0", granularity=GRANULARITY, persistent=True)
        fill(bitmap.recorder, pattern)
        count = bitmap.count()
        start = time.perf_counter()
    saved = time.perf_counter() - start
    start = time.perf_counter()
    graph = await blockgraph.aopen({"nodes": [node]})
    loaded = time.perf_counter() - start
    assert graph.bitmap("disk", "b0").count() == count
    await graph.close()
    return saved, loaded


@pytest.mark.parametrize("pattern", ["random bits", "1,000 dirty granules", "all dirty"])
def test_bitmap_of_64_tib(benchmark: BenchmarkFixture, shm: Path, pattern: str) -> None:
    image = shm / "disk.qcow2"
    empty(image, SIZE, "qcow2")
    figures: list[tuple[float, float]] = []
    benchmark.pedantic(lambda: figures.append(asyncio.run(save_and_load(image, pattern))), rounds=5)
    for what, column in (("saved", 0), ("loaded", 1)):
        median = sorted(figure[column] for figure in figures)[len(figures) // 2]
        add_row(benchmark, "4.5", f"64 TiB bitmap {what}: {pattern}", "s", median, Against("bound", None, None, 2))
