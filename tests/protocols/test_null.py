# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""null-co."""

from __future__ import annotations

import asyncio

import pytest
from helpers.harness import extents, opened, read, write

from blockgraph.protocols.null import Null
from blockgraph.registry import get_driver


def test_null_swallows_writes_and_leaves_buffers_alone() -> None:
    async def run() -> None:
        async with opened("null-co") as child:
            assert child.node.size() == 1 << 30
            await write(child, 0, b"x" * 4096)
            await child.pwrite_zeroes(0, 4096)
            await child.discard(0, 4096)
            await child.flush()
            assert await read(child, 0, 16) == b"\xa5" * 16
            assert await extents(child) == [(0, 1 << 30, "data")]

    asyncio.run(run())


def test_null_read_zeroes_gives_zeroes() -> None:
    async def run() -> None:
        async with opened("null-co", read_zeroes=True, size=5000) as child:
            await write(child, 0, b"x" * 5000)
            assert await read(child, 0, 5000) == bytes(5000)
            assert await extents(child) == [(0, 5000, "zero")]

    asyncio.run(run())


def test_null_latency_delays_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def run() -> None:
        async with opened("null-co", latency_ns=2_000_000) as child:
            monkeypatch.setattr(asyncio, "sleep", sleep)
            await write(child, 0, b"x")
            await read(child, 0, 1)
            await child.flush()

    asyncio.run(run())
    assert slept == [0.002] * 3


def test_null_has_qemus_second_name() -> None:
    assert get_driver("null-aio") is Null
