# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Drains: what they hold, what they wait for, and how they nest."""

from __future__ import annotations

import asyncio

import pytest
from helpers.backup import CLUSTER, memory, settle
from helpers.loop import driver_of, graph_of, in_loop

from blockgraph import trace
from blockgraph.backend import Backend
from blockgraph.errors import IOFailure
from blockgraph.filters.inject_error import InjectError

SIZE = 4 * CLUSTER


def faulty(name: str, image: str) -> dict[str, str]:
    """A node that can hold requests."""
    return {"driver": "inject-error", "node-name": name, "image": image}


async def held_back(*backends: Backend) -> bool:
    """Requests of all of them wait. They are cancelled afterwards."""
    tasks = [asyncio.ensure_future(backend.pread(0, 1)) for backend in backends]
    with trace.record() as events:
        await settle()
    waiting = not any(task.done() for task in tasks) and not events
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return waiting


@in_loop
async def test_drain_waits_for_requests_in_flight_and_holds_new_ones() -> None:
    async with graph_of(memory("bytes", SIZE), faulty("disk", "bytes")) as graph:
        backend = await graph.backend("disk", writable=True)
        disk = driver_of(graph, "disk", InjectError)
        disk.break_at("pwritev", "held")
        write = asyncio.ensure_future(backend.pwrite(0, b"x"))
        await disk.wait_break("held")
        entered = asyncio.Event()
        leave = asyncio.Event()

        async def drain() -> None:
            async with graph.drained(["bytes"]):
                entered.set()
                await leave.wait()

        task = asyncio.ensure_future(drain())
        await settle()
        assert not entered.is_set()
        disk.resume("held")
        await entered.wait()
        assert write.done()
        assert await held_back(backend)
        leave.set()
        await task
        assert await backend.pread(0, 1) == b"x"


@in_loop
async def test_drain_of_one_node_leaves_others_alone() -> None:
    async with graph_of(memory("a", SIZE), memory("b", SIZE)) as graph:
        a, b = await graph.backend("a"), await graph.backend("b")
        async with graph.drained(["a"]):
            assert await held_back(a)
            assert await asyncio.wait_for(b.pread(0, 1), 5) == b"\0"
        async with graph.drained():
            assert await held_back(a, b)


@in_loop
async def test_drain_nests_in_one_task_and_in_several() -> None:
    async with graph_of(memory("disk", SIZE)) as graph:
        backend = await graph.backend("disk")
        entered, leave = asyncio.Event(), asyncio.Event()

        async def other() -> None:
            async with graph.drained():
                entered.set()
                await leave.wait()

        async with graph.drained(["disk"]):
            async with graph.drained(["disk"]):
                task = asyncio.ensure_future(other())
                await entered.wait()
            assert await held_back(backend)
        assert await held_back(backend)
        leave.set()
        await task
        assert await backend.pread(0, 1) == b"\0"


@in_loop
async def test_drain_cancelled_while_it_waits_opens_the_gates() -> None:
    async with graph_of(memory("bytes", SIZE), faulty("disk", "bytes")) as graph:
        backend = await graph.backend("disk", writable=True)
        disk = driver_of(graph, "disk", InjectError)
        disk.break_at("pwritev", "held", offset=0)
        write = asyncio.ensure_future(backend.pwrite(0, b"x"))
        await disk.wait_break("held")
        task = asyncio.ensure_future(graph.drained().__aenter__())
        await settle()
        task.cancel()
        await asyncio.wait({task})
        assert await backend.pread(10, 1) == b"\0"
        disk.resume("held")
        await write


@in_loop
async def test_drain_holds_a_root_that_comes_later() -> None:
    async with graph_of(memory("disk", SIZE)) as graph:
        async with graph.drained(["disk"]):
            backend = await graph.backend("disk")
            assert await held_back(backend)
        assert await backend.pread(0, 1) == b"\0"


@in_loop
async def test_drain_holds_a_root_that_is_moved_above_the_node() -> None:
    async with graph_of(memory("a", SIZE), memory("b", SIZE)) as graph:
        backend = await graph.backend("a")
        async with graph.drained(["b"]):
            assert await asyncio.wait_for(backend.pread(0, 1), 5) == b"\0"
            await graph.replace_node("a", "b")
            assert await held_back(backend)
        assert await backend.pread(0, 1) == b"\0"


@in_loop
async def test_change_inside_a_drain_is_made_and_requests_go_on_in_the_new_graph() -> None:
    async with graph_of(memory("disk", SIZE)) as graph:
        backend = await graph.backend("disk", writable=True)
        async with graph.drained():
            write = asyncio.ensure_future(backend.pwrite(0, b"x"))
            await settle()
            await graph.insert_filter({"driver": "delay", "node-name": "top", "file": "disk"}, above="disk")
            with trace.record() as events:
                await settle()
            assert not events
        with trace.record() as events:
            await write
        assert [e.node for e in events] == ["top", "disk"]


@in_loop
async def test_root_closed_while_a_request_waits_fails_the_request() -> None:
    async with graph_of(memory("disk", SIZE)) as graph:
        backend = await graph.backend("disk")
        async with graph.drained(["disk"]):
            read = asyncio.ensure_future(backend.pread(0, 1))
            await settle()
            await graph.close_backend(backend)
            with pytest.raises(IOFailure, match="closed"):
                await read


@in_loop
async def test_background_work_of_a_node_above_is_waited_for() -> None:
    async with graph_of(memory("disk", SIZE), {"driver": "delay", "node-name": "top", "file": "disk"}) as graph:
        top = graph.node("top")
        top.begin_background()
        done: list[str] = []

        async def drain() -> None:
            async with graph.drained(["disk"]):
                done.append("drained")

        task = asyncio.ensure_future(drain())
        await settle()
        assert done == []
        top.end_background()
        await task
