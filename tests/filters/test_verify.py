# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""verify: equal children read as one, a difference is named."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.loop import driver_of, graph_of, in_loop

from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.errors import GraphError, IOFailure, NoSpace, Unsupported
from blockgraph.filters.inject_error import InjectError
from blockgraph.flags import Flag

SIZE = 1 << 20


def memory(name: str, size: int = SIZE) -> dict[str, Any]:
    return {"node-name": name, "driver": "memory", "size": size}


@asynccontextmanager
async def both(
    test: dict[str, Any] | None = None, raw: dict[str, Any] | None = None
) -> AsyncIterator[tuple[AsyncGraph, Backend]]:
    """A verify node over inject-error nodes "t" and "r", over memory."""
    nodes: list[dict[str, Any]] = [
        memory("test"),
        memory("raw"),
        {"node-name": "t", "driver": "inject-error", "image": "test", **(test or {})},
        {"node-name": "r", "driver": "inject-error", "image": "raw", **(raw or {})},
        {"node-name": "both", "driver": "verify", "test": "t", "raw": "r"},
    ]
    async with graph_of(*nodes) as graph:
        yield graph, await graph.backend("both", writable=True, resize=True)


async def corrupt(graph: AsyncGraph, node: str, offset: int, data: bytes) -> None:
    """Change a child behind the filter's back: straight in its driver."""
    await graph.node(node).driver.pwrite(offset, memoryview(data))


@in_loop
async def test_verify_write_reaches_both() -> None:
    async with both() as (graph, disk):
        await disk.pwrite(1000, b"hello")
        await disk.write_zeroes(1001, 2)
        await disk.flush()
        for name in ("test", "raw"):
            buf = bytearray(5)
            await graph.node(name).pread(1000, memoryview(buf))
            assert buf == b"h\0\0lo"
        assert await disk.pread(1000, 5) == b"h\0\0lo"


@pytest.mark.parametrize("at", [0, 1, 65535, 65536, 200_000, SIZE - 1], ids=str)
@in_loop
async def test_verify_difference_names_first_byte(at: int) -> None:
    async with both() as (graph, disk):
        await disk.pwrite(0, b"\x11" * SIZE)
        await corrupt(graph, "test", at, b"\x22")
        await corrupt(graph, "test", SIZE - 1, b"\x22")
        with pytest.raises(IOFailure) as caught:
            await disk.pread(0, SIZE)
        assert caught.value.errno == errno.EIO
        assert f"contents differ at offset {at}: test 't' has 0x22, raw 'r' has 0x11" in str(caught.value)


@in_loop
async def test_verify_failure_on_one_side_is_a_mismatch() -> None:
    rules = {"inject-error": [{"event": "none", "iotype": "write", "errno": "ENOSPC", "once": True}]}
    async with both(test=rules) as (_, disk):
        with pytest.raises(IOFailure, match=r"test and raw disagree: test failed.*raw succeeded") as caught:
            await disk.pwrite(0, b"x")
        assert not isinstance(caught.value, NoSpace)


@in_loop
async def test_verify_same_failure_on_both_sides_is_that_failure() -> None:
    rules = {"inject-error": [{"event": "none", "iotype": "write", "errno": "ENOSPC", "once": True}]}
    async with both(test=rules, raw=rules) as (_, disk):
        with pytest.raises(NoSpace):
            await disk.pwrite(0, b"x")
        assert await disk.pread(0, 1) == b"\0"


@in_loop
async def test_verify_discard_changes_nothing() -> None:
    async with both() as (_, disk):
        await disk.pwrite(0, b"x" * 65536)
        await disk.discard(0, 65536)
        assert await disk.pread(0, 65536) == b"x" * 65536


@in_loop
async def test_verify_write_zeroes_without_fallback_is_refused() -> None:
    async with both() as (_, disk):
        await disk.pwrite(0, b"x" * 512)
        with pytest.raises(Unsupported):
            await disk.write_zeroes(0, 512, Flag.NO_FALLBACK)
        assert await disk.pread(0, 512) == b"x" * 512


@in_loop
async def test_verify_read_waits_for_overlapping_write_on_both_sides() -> None:
    async with both() as (graph, disk):
        slow = driver_of(graph, "t", InjectError)
        slow.break_at("pwritev", "A")
        write = asyncio.ensure_future(disk.pwrite(0, b"new"))
        await slow.wait_break("A")  # raw has it, test has not
        read = asyncio.ensure_future(disk.pread(0, 3))
        assert await disk.pread(4096, 3) == bytes(3)  # elsewhere nobody waits
        assert not read.done()
        slow.resume("A")
        await write
        assert await read == b"new"


@in_loop
async def test_verify_overlapping_writes_reach_both_in_one_order() -> None:
    async with both() as (graph, disk):
        slow = driver_of(graph, "t", InjectError)
        slow.break_at("pwritev", "A")
        one = asyncio.ensure_future(disk.pwrite(0, b"one"))
        await slow.wait_break("A")
        two = asyncio.ensure_future(disk.pwrite(1, b"two"))
        for _ in range(10):
            await asyncio.sleep(0)
        slow.resume("A")
        await asyncio.gather(one, two)
        assert await disk.pread(0, 4) == b"otwo"


@in_loop
async def test_verify_different_sizes_are_refused(tmp_path: Path) -> None:
    for name, size in (("a", 512), ("b", 1024)):
        (tmp_path / name).write_bytes(bytes(size))
    files: list[dict[str, Any]] = [
        {"node-name": name, "driver": "file", "filename": str(tmp_path / name)} for name in ("a", "b")
    ]
    with pytest.raises(GraphError, match="test 'a' has 512 bytes, raw 'b' has 1024"):
        async with graph_of(*files, {"node-name": "v", "driver": "blkverify", "test": "a", "raw": "b"}):
            pass


@in_loop
async def test_verify_truncate_resizes_both() -> None:
    async with both() as (graph, disk):
        await disk.truncate(4096)
        assert [graph.node(name).size() for name in ("test", "raw", "both")] == [4096] * 3
