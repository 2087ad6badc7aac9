# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""log-writes: what stands in the log, and in which order."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.loop import driver_of, graph_of, in_loop

from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.errors import BlockGraphError, CorruptImage, IOFailure, OptionError, OutOfRange
from blockgraph.filters.inject_error import InjectError
from blockgraph.filters.log_writes import LogWrites
from blockgraph.flags import Flag
from blockgraph.testing import WriteLog

SIZE = 1 << 20


@asynccontextmanager
async def recorded(
    size: int = SIZE, log: dict[str, Any] | None = None, **members: Any
) -> AsyncIterator[tuple[AsyncGraph, Backend]]:
    """memory <- inject-error "fault" <- log-writes "it", logging to memory "log"."""
    nodes: list[dict[str, Any]] = [
        {"node-name": "disk", "driver": "memory", "size": size},
        {"node-name": "fault", "driver": "inject-error", "image": "disk"},
        {"node-name": "log", **(log or {"driver": "memory", "size": 0})},
        {"node-name": "it", "driver": "log-writes", "file": "fault", "log": "log", **members},
    ]
    async with graph_of(*nodes) as graph:
        yield graph, await graph.backend("it", writable=True, resize=True)


async def logged(graph: AsyncGraph) -> list[str]:
    """The entries as text, without their numbers."""
    return [str(entry).partition(" ")[2] for entry in (await _log(graph)).entries]


async def _log(graph: AsyncGraph) -> WriteLog:
    await driver_of(graph, "it", LogWrites).sync_log()
    return await WriteLog.read(graph.node("log"))


@in_loop
async def test_log_layout_is_that_of_dm_log_writes() -> None:
    async with recorded() as (graph, disk):
        await disk.pwrite(1024, b"a" * 512)
        await disk.discard(4096, 8192)
        await disk.flush()
        await driver_of(graph, "it", LogWrites).mark("here")
        raw = bytearray(graph.node("log").size())
        await graph.node("log").pread(0, memoryview(raw))
        assert struct.unpack_from("<QQQI", raw) == (0x6A736677736872, 1, 4, 512)
        assert struct.unpack_from("<QQQQ", raw, 512) == (2, 1, 0, 0)
        assert raw[1024:1536] == b"a" * 512
        assert struct.unpack_from("<QQQQ", raw, 1536) == (8, 16, 4, 0)  # a discard has no data
        assert struct.unpack_from("<QQQQ", raw, 2048) == (0, 0, 1, 0)
        assert struct.unpack_from("<QQQQ", raw, 2560) == (0, 0, 8, 4)
        assert raw[2592:2598] == b"here\0\0"
        assert len(raw) == 3072


@in_loop
async def test_log_requests_appear_with_their_kind() -> None:
    async with recorded() as (graph, disk):
        await disk.pwrite(0, b"a" * 1024)
        await disk.pwrite(512, b"b" * 512, Flag.FUA)
        await disk.write_zeroes(2048, 1024)
        await disk.write_zeroes(2048, 1024, Flag.MAY_UNMAP | Flag.FUA)
        await disk.discard(4096, 4096)
        await disk.flush()
        await disk.truncate(65536)
        assert await logged(graph) == [
            "write 0+1024",
            "write FUA 512+512",
            "write 2048+1024",
            "write FUA 2048+1024",
            "discard 4096+4096",
            "flush",
            "truncate 65536",
        ]


@in_loop
async def test_log_unaligned_write_is_logged_in_whole_sectors() -> None:
    async with recorded() as (graph, disk):
        await disk.pwrite(0, b"o" * 4096)
        await disk.pwrite(700, b"n" * 100)
        log = await _log(graph)
        assert (log.entries[1].offset, log.entries[1].length) == (512, 512)
        assert bytes(log.data(log.entries[1])) == b"o" * 188 + b"n" * 100 + b"o" * 224


@pytest.mark.parametrize("sector", [512, 4096])
@in_loop
async def test_log_write_in_the_last_odd_sector_keeps_the_size(sector: int) -> None:
    async with recorded(size=10_001, **{"log-sector-size": sector}) as (graph, disk):
        await disk.pwrite(9_990, b"x" * 11)
        assert disk.size() == 10_001
        log = await _log(graph)
        assert log.entries[0].offset + log.entries[0].length == 10_001
        assert log.replay(base=bytes(10_001)) == bytes(9_990) + b"x" * 11


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("seed", range(3))
@in_loop
async def test_log_replayed_gives_the_disk_after_concurrent_overlapping_writes(sector: int, seed: int) -> None:
    rng = random.Random(seed)
    async with recorded(**{"log-sector-size": sector}) as (graph, disk):

        async def writer() -> None:
            for _ in range(20):
                offset = rng.randrange(200_000)
                length = rng.randrange(1, 20_000)
                kind = rng.randrange(6)
                if kind < 3:
                    await disk.pwrite(offset, bytes([rng.randrange(1, 256)]) * length)
                elif kind == 3:
                    await disk.write_zeroes(offset, length)
                elif kind == 4:
                    await disk.discard(offset, length)
                else:
                    await disk.flush()
                await asyncio.sleep(0)

        await asyncio.gather(*(writer() for _ in range(8)))
        assert (await _log(graph)).replay(base=bytes(SIZE)) == await disk.pread(0, SIZE)


@in_loop
async def test_log_write_during_a_flush_comes_after_it() -> None:
    async with recorded() as (graph, disk):
        fault = driver_of(graph, "fault", InjectError)
        await disk.pwrite(0, b"a" * 512)
        fault.break_at("flush_to_disk", "F")
        flush = asyncio.ensure_future(disk.flush())
        await fault.wait_break("F")
        write = asyncio.ensure_future(disk.pwrite(512, b"b" * 512))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not write.done()
        fault.resume("F")
        await asyncio.gather(flush, write)
        assert await logged(graph) == ["write 0+512", "flush", "write 512+512"]


@in_loop
async def test_log_write_in_flight_during_a_flush_comes_after_it() -> None:
    async with recorded() as (graph, disk):
        fault = driver_of(graph, "fault", InjectError)
        await disk.pwrite(4096, b"a" * 512)
        fault.break_at("pwritev_done", "W")
        write = asyncio.ensure_future(disk.pwrite(0, b"b" * 512))
        await fault.wait_break("W")
        await disk.flush()
        fault.resume("W")
        await write
        assert await logged(graph) == ["write 4096+512", "flush", "write 0+512"]


@in_loop
async def test_log_failed_request_is_not_logged() -> None:
    rules = [{"event": "none", "errno": "EIO", "once": True, "iotype": kind} for kind in ("write", "discard", "flush")]
    nodes: list[dict[str, Any]] = [
        {"node-name": "disk", "driver": "memory", "size": SIZE},
        {"node-name": "fault", "driver": "inject-error", "image": "disk", "inject-error": rules},
        {"node-name": "log", "driver": "memory", "size": 0},
        {"node-name": "it", "driver": "blklogwrites", "file": "fault", "log": "log"},
    ]
    async with graph_of(*nodes) as graph:
        disk = await graph.backend("it", writable=True)
        for request in (disk.pwrite(0, b"x" * 512), disk.discard(0, 512), disk.flush()):
            with pytest.raises(IOFailure):
                await request
        await disk.pwrite(512, b"x" * 512)
        assert await logged(graph) == ["write 512+512"]


@in_loop
async def test_log_that_can_not_be_written_fails_the_request() -> None:
    nodes: list[dict[str, Any]] = [
        {"node-name": "disk", "driver": "memory", "size": SIZE},
        {"node-name": "store", "driver": "memory", "size": 0},
        {
            "node-name": "log",
            "driver": "inject-error",
            "image": "store",
            "inject-error": [{"event": "pwritev", "errno": "ENOSPC", "iotype": "write", "once": True}],
        },
        {"node-name": "it", "driver": "log-writes", "file": "disk", "log": "log"},
    ]
    async with graph_of(*nodes) as graph:
        disk = await graph.backend("it", writable=True)
        with pytest.raises(IOFailure) as caught:
            await disk.pwrite(0, b"x" * 512)
        assert caught.value.node == "log"
        await disk.pwrite(0, b"y" * 512)
        assert await logged(graph) == ["write 0+512"]


@in_loop
async def test_log_super_block_counts_flushed_entries_only() -> None:
    async with recorded() as (graph, disk):
        await disk.pwrite(0, b"x" * 512)
        assert len(await WriteLog.read(graph.node("log"))) == 0
        await disk.flush()
        await disk.pwrite(0, b"x" * 512)
        assert len(await WriteLog.read(graph.node("log"))) == 2


@in_loop
async def test_log_super_block_is_updated_at_the_interval() -> None:
    async with recorded(**{"log-super-update-interval": 3}) as (graph, disk):
        counts = []
        for _ in range(7):
            await disk.pwrite(0, b"x" * 512)
            counts.append(len(await WriteLog.read(graph.node("log"))))
        assert counts == [0, 0, 3, 3, 3, 6, 6]


@in_loop
async def test_log_marks_are_found_again() -> None:
    async with recorded() as (graph, disk):
        it = driver_of(graph, "it", LogWrites)
        await it.mark("empty")
        await disk.pwrite(0, b"1" * 512)
        await it.mark("one")
        await disk.pwrite(0, b"2" * 512)
        log = await _log(graph)
        assert log.replay(log.marks["empty"]) == b""
        assert log.replay(log.marks["one"]) == b"1" * 512
        assert log.replay() == b"2" * 512
        with pytest.raises(OutOfRange, match="at most 479 fit"):
            await it.mark("x" * 480)


# Options.


@in_loop
async def test_append_goes_on_where_the_log_ended(tmp_path: Path) -> None:
    for name in ("disk", "log"):
        (tmp_path / name).write_bytes(bytes(SIZE if name == "disk" else 0))
    files: list[dict[str, Any]] = [
        {"node-name": name, "driver": "file", "filename": str(tmp_path / name)} for name in ("disk", "log")
    ]
    it = {"node-name": "it", "driver": "log-writes", "file": "disk", "log": "log"}
    for number, members in enumerate(({"log-sector-size": 4096}, {"log-append": True}, {"log-append": True})):
        async with graph_of(*files, {**it, **members}) as graph:
            disk = await graph.backend("it", writable=True)
            await disk.pwrite(number * 4096, bytes([number + 1]) * 4096)
            await disk.discard(65536, 4096)
    log = WriteLog((tmp_path / "log").read_bytes())
    assert log.sector_size == 4096
    assert log.replay(base=bytes(SIZE)) == (tmp_path / "disk").read_bytes()
    async with graph_of(*files, it) as graph:  # a new log
        disk = await graph.backend("it", writable=True)
        await disk.pwrite(0, b"x")
    assert str(WriteLog((tmp_path / "log").read_bytes()).entries[0]) == "#0 write 0+512"


@pytest.mark.parametrize(
    "members, error",
    [
        ({"log-sector-size": 1000}, OptionError),
        ({"log-sector-size": 256}, OptionError),
        ({"log-append": True, "log-sector-size": 512}, OptionError),
        ({"log-super-update-interval": 0}, OptionError),
    ],
    ids=["odd", "small", "both", "never"],
)
@in_loop
async def test_option_wrong_is_refused(members: dict[str, Any], error: type[BlockGraphError]) -> None:
    with pytest.raises(error):
        async with recorded(**members):
            pass


@pytest.mark.parametrize("raw", [b"\1" * 4096, struct.pack("<QQQI", 0x6A736677736872, 1, 9, 512).ljust(1024, b"\0")])
@in_loop
async def test_append_to_something_else_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "log").write_bytes(raw)
    with pytest.raises(CorruptImage):
        async with recorded(log={"driver": "file", "filename": str(tmp_path / "log")}, **{"log-append": True}):
            pass
    assert (tmp_path / "log").read_bytes() == raw


@in_loop
async def test_read_only_filter_leaves_the_log_alone() -> None:
    nodes: list[dict[str, Any]] = [
        {"node-name": "disk", "driver": "memory", "size": SIZE},
        {"node-name": "log", "driver": "memory", "size": 0},
        {"node-name": "it", "driver": "log-writes", "file": "disk", "log": "log", "read-only": True},
    ]
    async with graph_of(*nodes) as graph:
        disk = await graph.backend("it")
        assert await disk.pread(0, 512) == bytes(512)
        await disk.flush()
        assert graph.node("log").size() == 0
