# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""raw: windows of any alignment, growth, permissions."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.harness import EVERYTHING, READ, extents, make_node, opened, put_child, read, write
from helpers.loop import graph_of, in_loop
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgraph import trace
from blockgraph.driver import Info
from blockgraph.errors import GraphError, OutOfRange, ReadOnly, Unsupported
from blockgraph.extent import Extent, Status
from blockgraph.flags import Flag
from blockgraph.formats.raw import Raw, RawOptions
from blockgraph.node import Child
from blockgraph.perm import ALL, NONE, Perm

KIB = 1024


@asynccontextmanager
async def raw_over_file(path: Path, *, direct: bool = False, **window: Any) -> AsyncIterator[Child]:
    """An edge to raw over file."""
    async with (
        opened("file", "below", filename=str(path), cache={"direct": direct}) as below,
        opened("raw", "disk", file="below", children={"file": below.node}, **window) as child,
    ):
        yield child


@asynccontextmanager
async def raw_over_memory(below_size: int, **window: Any) -> AsyncIterator[Child]:
    """An edge to raw over memory."""
    async with (
        opened("memory", "below", size=below_size) as below,
        opened("raw", "disk", file="below", children={"file": below.node}, **window) as child,
    ):
        yield child


_REQUEST = st.tuples(st.sampled_from(["write", "zero", "unmap"]), st.integers(0, 30 * KIB), st.integers(1, 20 * KIB))


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@settings(deadline=None, max_examples=40)
@given(
    below=st.integers(0, 60 * KIB),
    offset=st.integers(0, 9000),
    size=st.none() | st.integers(0, 40 * KIB),
    requests=st.lists(_REQUEST, max_size=8),
)
def test_raw_window_of_any_alignment_shows_and_changes_only_its_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    direct: bool,
    below: int,
    offset: int,
    size: int | None,
    requests: list[tuple[str, int, int]],
) -> None:
    path = tmp_path_factory.getbasetemp() / f"raw-{direct}"
    model = bytearray(os.urandom(below + offset + (size or 0)))
    path.write_bytes(model)

    async def run() -> None:
        async with raw_over_file(
            path, direct=direct, offset=offset, **({} if size is None else {"size": size})
        ) as disk:
            for step, start, length in requests:
                if size is not None:
                    length = min(length, size - start)
                    if length <= 0:
                        continue
                data = os.urandom(length) if step == "write" else bytes(length)
                if step == "write":
                    await write(disk, start, data)
                else:
                    await disk.pwrite_zeroes(start, length, Flag.MAY_UNMAP if step == "unmap" else Flag.NONE)
                at = offset + start
                model.extend(bytes(max(0, at + length - len(model))))
                model[at : at + length] = data
            expected = model[offset:] if size is None else model[offset : offset + size]
            assert disk.node.size() == len(expected)
            assert await read(disk, 0, len(expected) + 100) == expected + bytes(100)
            for start, length, kind in await extents(disk):
                if kind == "zero":
                    assert not any(expected[start : start + length])

    asyncio.run(run())
    assert path.read_bytes() == model


@pytest.mark.parametrize(
    "window", [{"offset": 1001}, {"offset": 1000, "size": 1}, {"size": 1001}], ids=["offset", "sum", "size"]
)
def test_raw_window_past_the_childs_end_is_refused(window: dict[str, int]) -> None:
    async def run() -> None:
        with pytest.raises(GraphError, match=r"window ends at 1001.*'below' at 1000 bytes") as caught:
            async with raw_over_memory(1000, **window):
                pass
        assert caught.value.node == "disk"

    asyncio.run(run())


def test_raw_window_up_to_the_childs_end_is_accepted() -> None:
    async def run() -> None:
        async with raw_over_memory(1000, offset=1000) as disk:
            assert disk.node.size() == 0
        async with raw_over_memory(1000, offset=1, size=999) as disk:
            assert disk.node.size() == 999

    asyncio.run(run())


def test_raw_without_size_grows_and_truncates_with_its_child() -> None:
    async def run() -> None:
        async with raw_over_memory(1000, offset=100) as disk:
            await write(disk, 1000, b"x")
            below = disk.node.children["file"].node
            assert (disk.node.size(), below.size()) == (1001, 1101)
            await disk.truncate(5)
            assert (disk.node.size(), below.size()) == (5, 105)

    asyncio.run(run())


def test_raw_with_size_neither_grows_nor_truncates() -> None:
    async def run() -> None:
        async with raw_over_memory(1000, size=500) as disk:
            with pytest.raises(OutOfRange):
                await write(disk, 499, b"xy")
            with pytest.raises(Unsupported, match="fixed at 500"):
                await disk.truncate(600)
            assert await read(disk, 490, 20) == bytes(20)

    asyncio.run(run())


def test_raw_over_child_that_can_not_grow_does_not_grow() -> None:
    async def run() -> None:
        async with (
            opened("null-co", "below", size=1000) as below,
            opened("raw", "disk", file="below", children={"file": below.node}) as disk,
        ):
            with pytest.raises(OutOfRange):
                await write(disk, 999, b"xy")

    asyncio.run(run())


def test_raw_maps_to_its_child_at_the_offset() -> None:
    async def run() -> None:
        async with raw_over_memory(10_000, offset=512, size=4096) as disk:
            extent = await disk.node.map(100, 100)
            child = disk.node.children["file"]
            assert extent == Extent(0, 4096, Status.DATA, child, 512, writable=True)
            disk.node.read_only = True
            assert not (await disk.node.map(0, 1)).writable
            await write(child, 0, b"x")
            status = await disk.block_status(0, 4096)
            assert (status.data, status.zero, status.node, status.host, status.host_offset) == (
                True,
                False,
                disk.node,
                child.node,
                512,
            )

    asyncio.run(run())


def test_raw_status_of_holes_is_the_childs() -> None:
    async def run() -> None:
        async with raw_over_memory(1 << 20, offset=65536) as disk:
            await write(disk, 131072, b"x")
            assert await extents(disk) == [(0, 131072, "zero"), (131072, 65536, "data"), (196608, 786432, "zero")]

    asyncio.run(run())


def test_raw_passes_each_request_on_once_with_its_flags() -> None:
    async def run() -> None:
        async with raw_over_memory(1 << 20, offset=512) as disk:
            with trace.record() as events:
                await disk.pwrite(0, memoryview(b"x" * 512), Flag.FUA)
                await disk.pwrite_zeroes(512, 512, Flag.MAY_UNMAP | Flag.FUA)
                await disk.pread(0, memoryview(bytearray(512)))
                await disk.discard(0, 512)
            assert [(event.op, event.node, event.offset) for event in events] == [
                ("pwrite", "disk", 0),
                ("pwrite", "below", 512),
                ("write_zeroes", "disk", 512),
                ("write_zeroes", "below", 1024),
                ("pread", "disk", 0),
                ("pread", "below", 512),
                ("discard", "disk", 0),
                ("discard", "below", 512),
            ]

    asyncio.run(run())


def test_raw_no_fallback_reaches_the_child() -> None:
    async def run() -> None:
        async with raw_over_memory(1 << 20) as disk:
            below = disk.node.children["file"].node.driver

            async def refuse(offset: int, length: int, flags: Flag = Flag.NONE) -> None:
                raise below.unsupported("pwrite_zeroes")

            below.pwrite_zeroes = refuse  # type: ignore[method-assign]
            await write(disk, 0, b"x" * 512)
            with pytest.raises(Unsupported):
                await disk.pwrite_zeroes(0, 512, Flag.NO_FALLBACK)
            await disk.pwrite_zeroes(0, 512)
            assert await read(disk, 0, 512) == bytes(512)

    asyncio.run(run())


def test_raw_read_only_refuses_writes() -> None:
    async def run() -> None:
        async with raw_over_memory(1000, read_only=True) as disk:
            with pytest.raises(ReadOnly):
                await write(disk, 0, b"x")

    asyncio.run(run())


@pytest.mark.parametrize(
    "window, share",
    [
        pytest.param({}, ALL, id="whole"),
        pytest.param({"offset": 1}, ALL & ~Perm.RESIZE, id="offset"),
        pytest.param({"size": 1}, ALL & ~Perm.RESIZE, id="size"),
        pytest.param({"size": 0}, ALL & ~Perm.RESIZE, id="empty"),
    ],
)
def test_raw_permissions_pass_and_a_window_keeps_the_size(window: dict[str, Any], share: Perm) -> None:
    options = make_node("raw", file="below", **window).options
    for need in (NONE, READ, EVERYTHING):
        assert Raw.child_perm(options, "file", need, ALL, read_only=False) == (need, share)


def test_raw_fresh_file_reads_zero_only_without_window() -> None:
    async def run() -> None:
        async with raw_over_memory(1000) as disk:
            assert disk.node.driver.info().zero_init
        async with raw_over_memory(1000, offset=8) as disk:
            assert disk.node.driver.info() == Info(65536, False)

    asyncio.run(run())


def test_raw_reopen_moves_the_window() -> None:
    async def run() -> None:
        async with raw_over_memory(1000) as disk:
            await write(disk, 100, b"inside")
            driver = disk.node.driver
            refused: list[dict[str, Any]] = [{"offset": 900, "size": 101}, {"offset": 1001}]
            for wrong in refused:
                with pytest.raises(GraphError, match="window ends"):
                    driver.reopen_check(make_node("raw", file="below", **wrong).options)
            new = make_node("raw", file="below", offset=100, size=6).options
            assert isinstance(new, RawOptions)
            driver.reopen_check(new)
            driver.reopened(new)
            assert await read(disk, 0, disk.node.size()) == b"inside"
            assert not driver.growable

    asyncio.run(run())


@pytest.mark.parametrize("above", ["disk", "filter"])
@in_loop
async def test_raw_reopen_moves_no_window_under_a_bitmap(above: str) -> None:
    memory = {"node-name": "bytes", "driver": "memory", "size": 4096}
    disk = {"node-name": "disk", "driver": "raw", "file": "bytes", "size": 1024}
    async with graph_of(memory, disk, {"node-name": "filter", "driver": "delay", "file": "disk"}) as graph:
        await graph.add_bitmap(above, "b0")
        for window in ({"offset": 512}, {"size": 512}):
            with pytest.raises(GraphError, match=f"bitmap 'b0' of node '{above}' records"):
                await graph.reopen("disk", window)
        await graph.reopen("disk", {"size": 1024, "detect-zeroes": "on"})
        await graph.remove_bitmap(above, "b0")
        await graph.reopen("disk", {"offset": 512})


def test_raw_attached_again_follows_a_smaller_child() -> None:
    async def run() -> None:
        async with raw_over_memory(1000, offset=500) as disk, opened("memory", "small", size=400) as small:
            put_child(disk.node, "file", small.node)
            with pytest.raises(GraphError, match="'small' at 400"):
                await disk.node.driver.attached()

    asyncio.run(run())
