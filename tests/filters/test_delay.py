# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""delay: who waits, and how long; with a clock of the test's own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from helpers.loop import driver_of, graph_of, in_loop

from blockgraph.errors import OptionError
from blockgraph.extent import Status
from blockgraph.filters.delay import Delay

SIZE = 1 << 20
DISK = {"node-name": "disk", "driver": "memory", "size": SIZE}
ALL_MS = {"read-ms": 1, "write-ms": 2, "zero-ms": 3, "trim-ms": 4, "flush-ms": 5, "extents-ms": 6}


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited, without waiting."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(Delay, "sleep", sleep)
    return waits


@in_loop
async def test_delay_each_request_waits_its_own_time(slept: list[float]) -> None:
    async with graph_of(DISK, {"node-name": "slow", "driver": "delay", "file": "disk", **ALL_MS}) as graph:
        disk = await graph.backend("slow", writable=True)
        await disk.pread(0, 1)
        await disk.pwrite(0, b"x")
        await disk.write_zeroes(0, 512)
        await disk.discard(0, 512)
        await disk.flush()
        await disk.block_status(0, 512)
        assert slept == [0.001, 0.002, 0.003, 0.004, 0.005, 0.006]


@in_loop
async def test_delay_open_and_close_wait(slept: list[float]) -> None:
    members: dict[str, Any] = {"open-ms": 7, "close-ms": 8}
    async with graph_of(DISK, {"node-name": "slow", "driver": "delay", "file": "disk", **members}):
        assert slept == [0.007]
    assert slept == [0.007, 0.008]


@in_loop
async def test_delay_zero_does_not_wait(slept: list[float]) -> None:
    async with graph_of(DISK, {"node-name": "slow", "driver": "delay", "file": "disk"}) as graph:
        disk = await graph.backend("slow", writable=True)
        await disk.pwrite(0, b"x")
        await disk.pread(0, 1)
        assert slept == []


@in_loop
async def test_delay_requests_wait_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = 0
    all_wait, go = asyncio.Event(), asyncio.Event()

    async def sleep(seconds: float) -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 5:
            all_wait.set()
        await go.wait()

    monkeypatch.setattr(Delay, "sleep", sleep)
    async with graph_of(DISK, {"node-name": "slow", "driver": "delay", "file": "disk", "read-ms": 1000}) as graph:
        disk = await graph.backend("slow")
        reads = [asyncio.ensure_future(disk.pread(0, 512)) for _ in range(5)]
        await all_wait.wait()
        go.set()
        await asyncio.gather(*reads)


@pytest.mark.parametrize(
    "members, status, writable",
    [({}, Status.DATA, True), ({"write-ms": 1}, Status.DATA, False), ({"read-ms": 1}, Status.SPECIAL, False)],
    ids=["nothing", "writes", "reads"],
)
@in_loop
async def test_delay_map_lets_pass_what_is_not_delayed(members: dict[str, int], status: Status, writable: bool) -> None:
    async with graph_of(DISK, {"node-name": "slow", "driver": "delay", "file": "disk", **members}) as graph:
        extent = await graph.node("slow").map(0, SIZE)
        assert (extent.status, extent.writable) == (status, writable)


@in_loop
async def test_delay_reopen_changes_times(slept: list[float]) -> None:
    async with graph_of(DISK, {"node-name": "slow", "driver": "delay", "file": "disk", "read-ms": 1}) as graph:
        disk = await graph.backend("slow")
        await graph.reopen("slow", {"read-ms": 20})
        await disk.pread(0, 1)
        assert slept == [0.02]
        assert driver_of(graph, "slow", Delay).intercepts_reads


@in_loop
async def test_delay_negative_is_refused() -> None:
    with pytest.raises(OptionError, match="read-ms"):
        async with graph_of(DISK, {"node-name": "slow", "driver": "delay", "file": "disk", "read-ms": -1}):
            pass
