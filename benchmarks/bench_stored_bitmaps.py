# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The persistent bitmap of a 64 TiB disk at 64 KiB, 128 MiB of bits, saved and loaded: wanted in under 2 s.

In a qcow2 image, and in the sidecar of a raw one.
"""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import blockgraph
from benchmarks.images import empty, node
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


async def save_and_load(image: Path, image_format: str, pattern: str) -> tuple[float, float]:
    """Seconds for closing the graph, and for opening it again."""
    nodes, sidecar = [node("disk", image, image_format)], image_format == "raw"
    async with await blockgraph.aopen({"nodes": nodes}) as graph:
        if "b0" in graph.node("disk").bitmaps:
            await graph.remove_bitmap("disk", "b0")
        bitmap = await graph.add_bitmap("disk", "b0", granularity=GRANULARITY, persistent=True, sidecar=sidecar)
        bits = Bitmap(SIZE, GRANULARITY)
        fill(bits, pattern)
        bitmap.replace(bits)
        count = bitmap.count()
        start = time.perf_counter()
    saved = time.perf_counter() - start
    start = time.perf_counter()
    graph = await blockgraph.aopen({"nodes": nodes})
    loaded = time.perf_counter() - start
    assert graph.bitmap("disk", "b0").count() == count
    await graph.close()
    return saved, loaded


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
@pytest.mark.parametrize("pattern", ["random bits", "1,000 dirty granules", "all dirty"])
def test_bitmap_of_64_tib(benchmark: BenchmarkFixture, shm: Path, pattern: str, image_format: str) -> None:
    image = shm / "disk"
    empty(image, SIZE, image_format)
    figures: list[tuple[float, float]] = []
    benchmark.pedantic(lambda: figures.append(asyncio.run(save_and_load(image, image_format, pattern))), rounds=5)
    store = "sidecar" if image_format == "raw" else "qcow2"
    for what, column in (("saved", 0), ("loaded", 1)):
        median = sorted(figure[column] for figure in figures)[len(figures) // 2]
        bound = Against("bound", None, None, 2)
        add_row(benchmark, "4.5", f"64 TiB bitmap {what}, {store}: {pattern}", "s", median, bound)
