# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""pattern and sparse-random."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from helpers.harness import READ, WRITE, extents, make_node, opened, read
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blockgraph.errors import GraphError, ReadOnly
from blockgraph.protocols.sparse_random import BLOCK, SparseRandom

MIB = 1 << 20


def in_pattern(offset: int, length: int) -> bytes:
    first = offset // 8 * 8
    words = b"".join(at.to_bytes(8, "big") for at in range(first, offset + length + 8, 8))
    return words[offset - first :][:length]


@settings(deadline=None, max_examples=50)
@given(offset=st.integers(0, 1 << 50), length=st.integers(1, 3000))
@example(offset=(1 << 16) - 3, length=20)
@example(offset=(1 << 40) - 9, length=70_000)
@example(offset=3, length=2 * MIB + 1)
def test_pattern_bytes_say_where_they_are(offset: int, length: int) -> None:
    async def run() -> None:
        async with opened("pattern", size=(1 << 63) - 1, need=READ) as child:
            assert await read(child, offset, length) == in_pattern(offset, length)

    asyncio.run(run())


@pytest.mark.parametrize("driver", ["pattern", "sparse-random"])
def test_computed_disk_refuses_writers(driver: str) -> None:
    async def run() -> None:
        with pytest.raises(GraphError, match="read-only") as caught:
            async with opened(driver, "known", size=4096, need=WRITE):
                pass
        assert caught.value.node == "known"
        async with opened(driver, size=4096, need=READ) as child:
            child.need = WRITE
            with pytest.raises(ReadOnly):
                await child.pwrite(0, memoryview(b"x"))
            child.node.driver.reopened(child.node.options)
            with pytest.raises(ReadOnly):
                await child.pwrite(0, memoryview(b"x"))

    asyncio.run(run())


SHAPES = [
    {"percent": 0},
    {"percent": 100},
    {"percent": 10, "runlength": 64 * 1024},
    {"percent": 50, "runlength": 1},
    {"percent": 99, "runlength": 4096},
    {"percent": 1, "runlength": 100_000},
    {"percent": 35, "runlength": 300_000, "random_content": True},
]


def name_of(shape: dict[str, Any]) -> str:
    return "-".join(str(value) for value in shape.values())


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_sparse_random_status_is_exact(shape: dict[str, Any]) -> None:
    size = 4 * MIB + 777

    async def run() -> None:
        async with opened("sparse-random", size=size, seed=7, need=READ, **shape) as child:
            disk = await read(child, 0, size)
            assert await read(child, 0, size) == disk
            for offset, length, kind in await extents(child):
                assert offset % BLOCK == 0
                blocks = [disk[at : at + BLOCK] for at in range(offset, offset + length, BLOCK)]
                assert all(any(block) == (kind == "data") for block in blocks)
                assert kind in ("data", "zero")

    asyncio.run(run())


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@settings(deadline=None, max_examples=15)
@given(offset=st.integers(0, 2 * MIB), length=st.integers(1, 100_000))
def test_sparse_random_any_range_is_part_of_the_same_disk(shape: dict[str, Any], offset: int, length: int) -> None:
    async def run() -> None:
        async with opened("sparse-random", size=4 * MIB, seed=11, need=READ, **shape) as child:
            around = await read(child, max(0, offset - 5000), length + 10_000)
            start = min(offset, 5000)
            assert await read(child, offset, length) == around[start : start + length]
        async with opened("sparse-random", size=8 * MIB, seed=11, need=READ, **shape) as again:
            assert await read(again, offset, length) == around[start : start + length]
            status = await again.block_status(offset, length)
            assert status.zero == (not any(around[start : start + status.length]))

    asyncio.run(run())


@pytest.mark.parametrize("percent", [1, 10, 50, 90, 99])
def test_sparse_random_percentage_and_runs_are_about_as_asked(percent: int) -> None:
    size, runlength = 1 << 40, 16 * MIB

    async def run() -> None:
        async with opened("sparse-random", size=size, seed=3, percent=percent, need=READ) as child:
            # Whole segments from all over the disk.
            found = []
            for part in range(8):
                found += await extents(child, part * (size // 8), size // 64)
            data = [length for _, length, kind in found if kind == "data"]
            total = sum(length for _, length, _ in found)
            assert abs(sum(data) / total - percent / 100) < 0.08
            assert percent > 50 or 0.5 < sum(data) / len(data) / runlength < 2

    asyncio.run(run())


def test_sparse_random_same_seed_same_bytes_for_all_time() -> None:
    """The bytes are a promise: test data made by an older version must verify with a newer one."""

    async def run() -> list[Any]:
        shape: dict[str, Any] = {"size": MIB, "percent": 30, "runlength": 32768}
        async with opened("sparse-random", seed=42, need=READ, **shape) as child:
            found: list[Any] = (await extents(child))[:4]
            disk = await read(child, 0, MIB)
            found.append([disk[at] for at in range(0, MIB, BLOCK) if disk[at]][:6])
        async with opened("sparse-random", seed=42, need=READ, random_content=True, **shape) as child:
            disk = await read(child, 0, MIB)
            start = next(at for at in range(0, MIB, BLOCK) if any(disk[at : at + BLOCK]))
            found.append(disk[start : start + 8].hex())
        return found

    assert asyncio.run(run()) == [
        (0, 8192, "data"),
        (8192, 65536, "zero"),
        (73728, 36864, "data"),
        (110592, 20480, "zero"),
        [138, 32, 255, 182, 234, 124],
        "4ce575e4893de285",
    ]


def test_sparse_random_without_seed_differs_from_node_to_node() -> None:
    seeds = set()
    for _ in range(3):
        driver = make_node("sparse-random", size=MIB).driver
        assert isinstance(driver, SparseRandom)
        seeds.add(driver.seed)
    assert len(seeds) == 3
