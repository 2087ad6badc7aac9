# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""inject-error: which request fails, which is held, and what the child gets to see."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from helpers.loop import driver_of, graph_of, in_loop

from blockgraph import debug, trace
from blockgraph.backend import Backend
from blockgraph.errors import GraphError, IOFailure, NoSpace, OptionError, PermissionConflict, Unsupported
from blockgraph.filters.inject_error import InjectError
from blockgraph.flags import Flag

SIZE = 1 << 20


@asynccontextmanager
async def faulty(**members: Any) -> AsyncIterator[tuple[Backend, InjectError]]:
    """memory <- inject-error, and the filter's driver."""
    disk = {"node-name": "disk", "driver": "memory", "size": SIZE}
    fault = {"node-name": "fault", "driver": "inject-error", "image": "disk", **members}
    async with graph_of(disk, fault) as graph:
        backend = await graph.backend("fault", writable=True, resize=True)
        yield backend, driver_of(graph, "fault", InjectError)


def rule(event: str, **members: Any) -> dict[str, Any]:
    return {"event": event, **members}


@in_loop
async def test_rule_once_fails_one_request_with_its_errno() -> None:
    async with faulty(**{"inject-error": [rule("pwritev", iotype="write", errno="ENOSPC", once=True)]}) as (disk, _):
        with pytest.raises(NoSpace) as caught:
            await disk.pwrite(4096, b"x" * 512)
        assert caught.value.errno == errno.ENOSPC
        assert (caught.value.node, caught.value.offset, caught.value.length) == ("fault", 4096, 512)
        assert "injected after event 'pwritev'" in str(caught.value)
        assert await disk.pread(4096, 512) == bytes(512)
        await disk.pwrite(4096, b"x" * 512)
        assert await disk.pread(4096, 512) == b"x" * 512


@in_loop
async def test_rule_without_once_fails_until_another_event_arms() -> None:
    rules = [rule("pwritev", errno=5, iotype="write"), rule("discard", iotype="read")]
    async with faulty(**{"inject-error": rules}) as (disk, _):
        for _ in range(2):
            with pytest.raises(IOFailure):
                await disk.pwrite(0, b"x")
        await disk.pread(0, 1)
        await disk.discard(0, 512)
        with pytest.raises(IOFailure):
            await disk.pread(0, 1)
        with pytest.raises(IOFailure):  # armed again by the event itself
            await disk.pwrite(0, b"x")


@pytest.mark.parametrize("iotype", ["read", "write", "write-zeroes", "discard", "flush", "block-status"])
@in_loop
async def test_rule_iotype_fails_that_kind_only(iotype: str) -> None:
    async with faulty(**{"inject-error": [rule("none", iotype=iotype, once=True)]}) as (disk, _):
        requests = {
            "read": lambda: disk.pread(0, 512),
            "write": lambda: disk.pwrite(0, b"x" * 512),
            "write-zeroes": lambda: disk.write_zeroes(0, 512),
            "discard": lambda: disk.discard(0, 512),
            "flush": disk.flush,
            "block-status": lambda: disk.block_status(0, 512),
        }
        if iotype == "flush":
            await disk.pwrite(0, b"x")  # there must be something to flush
        failed = []
        for kind, request in requests.items():
            try:
                await request()
            except IOFailure:
                failed.append(kind)
        assert failed == [iotype]


@in_loop
async def test_rule_without_iotype_spares_block_status() -> None:
    async with faulty(**{"inject-error": [rule("none")]}) as (disk, _):
        assert (await disk.block_status(0, 512)).length == 512
        with pytest.raises(IOFailure):
            await disk.pread(0, 1)


@in_loop
async def test_rule_sector_fails_only_requests_that_touch_it() -> None:
    async with faulty(**{"inject-error": [rule("none", sector=8)]}) as (disk, _):
        await disk.pread(0, 4096)
        await disk.pread(4608, 4096)
        for offset, length in ((4095, 2), (4096, 1), (0, SIZE)):
            with pytest.raises(IOFailure):
                await disk.pread(offset, length)


@in_loop
async def test_set_state_second_event_fails() -> None:
    members = {
        "set-state": [rule("pwritev", state=1, new_state=2)],
        "inject-error": [rule("pwritev", state=2, once=True)],
    }
    async with faulty(**members) as (disk, fault):
        await disk.pwrite(0, b"1")
        assert fault.rules.state == 2
        with pytest.raises(IOFailure):
            await disk.pwrite(0, b"2")
        await disk.pwrite(0, b"3")


@in_loop
async def test_rules_of_one_event_first_that_fits_counts() -> None:
    rules = [rule("none", sector=1, errno="ENOSPC"), rule("none", errno="EIO"), rule("none", errno="EPERM")]
    async with faulty(**{"inject-error": rules}) as (disk, _):
        for offset, code in ((512, errno.ENOSPC), (0, errno.EIO)):
            with pytest.raises(IOFailure) as caught:
                await disk.pread(offset, 1)
            assert caught.value.errno == code


@in_loop
async def test_rule_enotsup_for_write_zeroes_makes_the_node_write_zeroes() -> None:
    async with faulty(**{"inject-error": [rule("none", iotype="write-zeroes", errno="EOPNOTSUPP")]}) as (disk, _):
        await disk.pwrite(0, b"x" * 8192)
        with trace.record() as events:
            await disk.write_zeroes(0, 8192)
        assert [event.op for event in events if event.node == "disk"] == ["pwrite"]
        assert await disk.pread(0, 8192) == bytes(8192)
        with pytest.raises(Unsupported):
            await disk.write_zeroes(0, 8192, Flag.NO_FALLBACK)


@in_loop
async def test_immediately_fails_without_a_turn_of_the_loop() -> None:
    for immediately in (True, False):
        async with faulty(**{"inject-error": [rule("none", immediately=immediately)]}) as (disk, _):
            turned = False

            def turn() -> None:
                nonlocal turned
                turned = True

            asyncio.get_running_loop().call_soon(turn)
            with pytest.raises(IOFailure):
                await disk.pread(0, 1)
            assert turned is not immediately
            await asyncio.sleep(0)


# Breakpoints.


@in_loop
async def test_break_before_and_after_a_write_shows_old_then_new_bytes() -> None:
    async with faulty() as (disk, fault):
        fault.break_at("pwritev", "before")
        fault.break_at("pwritev_done", "after")
        task = asyncio.ensure_future(disk.pwrite(0, b"new"))
        await fault.wait_break("before")
        assert fault.held("before")
        assert not fault.held("after")
        assert await disk.pread(0, 3) == bytes(3)
        fault.resume("before")
        await fault.wait_break("after")
        assert await disk.pread(0, 3) == b"new"
        assert not task.done()
        fault.resume("after")
        await task


@in_loop
async def test_break_with_offset_holds_only_the_request_that_contains_it() -> None:
    async with faulty() as (disk, fault):
        fault.break_at("pwritev", "A", offset=5000)
        await disk.pwrite(0, bytes(4096))
        task = asyncio.ensure_future(disk.pwrite(4096, b"x" * 4096))
        await fault.wait_break("A")
        await disk.pwrite(4096, b"y" * 4096)  # a breakpoint holds one request
        fault.resume("A")
        await task
        assert await disk.pread(5000, 1) == b"x"


@in_loop
async def test_break_removed_lets_the_request_go_on() -> None:
    async with faulty() as (disk, fault):
        fault.break_at("preadv", "A")
        task = asyncio.ensure_future(disk.pread(0, 1))
        await fault.wait_break("A")
        fault.remove_break("A")
        await task
        fault.break_at("preadv", "A")
        fault.remove_break("A")
        await disk.pread(0, 1)


@in_loop
async def test_break_cancelled_request_frees_the_tag() -> None:
    async with faulty() as (disk, fault):
        fault.break_at("preadv", "A")
        task = asyncio.ensure_future(disk.pread(0, 1))
        await fault.wait_break("A")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not disk.node.busy
        fault.break_at("preadv", "A")
        fault.remove_break("A")


@in_loop
async def test_break_misuse_is_refused() -> None:
    async with faulty() as (_, fault):
        with pytest.raises(OptionError, match="did you mean 'pwritev'"):
            fault.break_at("pwrite", "A")
        fault.break_at("pwritev", "A")
        with pytest.raises(GraphError, match="breakpoint 'A' exists"):
            fault.break_at("preadv", "A")
        with pytest.raises(GraphError, match="no request is held at breakpoint 'A'"):
            fault.resume("A")
        with pytest.raises(GraphError, match="no breakpoint 'B'"):
            await fault.wait_break("B")


@in_loop
async def test_break_held_write_keeps_a_drain_waiting() -> None:
    disk = {"node-name": "disk", "driver": "memory", "size": SIZE}
    fault = {"node-name": "fault", "driver": "inject-error", "image": "disk"}
    async with graph_of(disk, fault) as graph:
        backend = await graph.backend("fault", writable=True)
        driver = driver_of(graph, "fault", InjectError)
        driver.break_at("pwritev", "A")
        write = asyncio.ensure_future(backend.pwrite(0, b"x"))
        await driver.wait_break("A")

        async def drain() -> None:
            async with graph.drained():
                assert write.done()

        drained = asyncio.ensure_future(drain())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not drained.done()
        driver.resume("A")
        await asyncio.gather(write, drained)


# Events of parents.


@in_loop
async def test_event_of_read_modify_write_holds_between_read_and_write() -> None:
    async with faulty(align=512) as (disk, fault):
        fault.break_at("pwritev_rmw_after_head", "A")
        one = asyncio.ensure_future(disk.pwrite(10, b"one"))
        await fault.wait_break("A")
        other = asyncio.ensure_future(disk.pwrite(20, b"two"))  # same block: has to wait for the first
        await asyncio.sleep(0)
        fault.resume("A")
        await asyncio.gather(one, other)
        assert await disk.pread(10, 13) == b"one" + bytes(7) + b"two"


@in_loop
async def test_event_passes_through_filters_above() -> None:
    nodes: list[dict[str, Any]] = [
        {"node-name": "disk", "driver": "memory", "size": SIZE},
        {
            "node-name": "fault",
            "driver": "inject-error",
            "image": "disk",
            "inject-error": [rule("l2_update", once=True)],
        },
        {"node-name": "slow", "driver": "delay", "file": "fault"},
        {"node-name": "window", "driver": "raw", "file": "slow"},
    ]
    async with graph_of(*nodes) as graph:
        backend = await graph.backend("window", writable=True)
        await backend.pwrite(0, b"x")
        await backend.root.event("l2_update")
        with pytest.raises(IOFailure):
            await backend.pwrite(0, b"x")


@in_loop
async def test_events_cost_nothing_when_no_node_listens() -> None:
    assert not debug.enabled
    async with faulty():
        assert debug.enabled
        async with faulty():
            pass
        assert debug.enabled
    assert not debug.enabled


@in_loop
async def test_event_declared_by_a_third_party_is_known() -> None:
    debug.declare("my_table_update")
    async with faulty(**{"inject-error": [rule("my_table_update")]}) as (disk, _):
        await disk.root.event("my_table_update")
        with pytest.raises(IOFailure):
            await disk.pread(0, 1)


# Limits.


@in_loop
async def test_limits_child_sees_requests_cut() -> None:
    limits = {
        "align": 512,
        "max-transfer": 1024,
        "opt-write-zero": 4096,
        "max-write-zero": 8192,
        "opt-discard": 2048,
        "max-discard": 4096,
    }
    async with faulty(**limits) as (disk, _):
        assert await _seen(disk.pread(10, 3000)) == [("pread", 0, 1024), ("pread", 1024, 1024), ("pread", 2048, 1024)]
        assert await _seen(disk.pwrite(512, bytes(1536))) == [("pwrite", 512, 1024), ("pwrite", 1536, 512)]
        assert await _seen(disk.write_zeroes(512, 20480)) == [
            ("pwrite", 512, 3584),
            ("write_zeroes", 4096, 8192),
            ("write_zeroes", 12288, 8192),
            ("pwrite", 20480, 512),
        ]
        assert await _seen(disk.discard(512, 10240)) == [("discard", 2048, 4096), ("discard", 6144, 4096)]
        assert await _seen(disk.discard(512, 1024)) == []
        with pytest.raises(Unsupported):
            await disk.write_zeroes(512, 20480, Flag.NO_FALLBACK)


async def _seen(request: Any) -> list[tuple[str, int, int]]:
    with trace.record() as events:
        await request
    return [(event.op, event.offset, event.length) for event in events if event.node == "disk"]


@pytest.mark.parametrize(
    "members, path",
    [
        ({"align": 768}, "align"),
        ({"align": 4096, "max-transfer": 512}, "max-transfer"),
        ({"opt-write-zero": 4096, "max-write-zero": 6144}, "max-write-zero"),
        ({"align": 512, "opt-discard": 1000}, "opt-discard"),
        ({"opt-discard": 4096, "max-discard": 512}, "max-discard"),
        ({"inject-error": [{"event": "l2_updat"}]}, "event"),
        ({"inject-error": [{"event": "none", "errno": "ENOPE"}]}, "errno"),
        ({"inject-error": [{"event": "none", "errno": 4711}]}, "errno"),
        ({"set-state": [{"event": "none", "new_state": 0}]}, "new_state"),
        ({"take-child-perms": ["graph-mod"]}, "take-child-perms"),
    ],
    ids=str,
)
@in_loop
async def test_option_wrong_is_refused_by_name(members: dict[str, Any], path: str) -> None:
    with pytest.raises(OptionError) as caught:
        async with faulty(**members):
            pass
    assert path in str(caught.value)
    assert not debug.enabled


# Permissions (QEMU's iotest 283).


@in_loop
async def test_take_child_perms_conflicts_with_whom_does_not_share() -> None:
    nodes: list[dict[str, Any]] = [
        {"node-name": "base", "driver": "memory", "size": SIZE},
        {"node-name": "other", "driver": "blkdebug", "image": "base", "take-child-perms": ["write"]},
        {"node-name": "strict", "driver": "blkdebug", "image": "base", "unshare-child-perms": ["write"]},
    ]
    with pytest.raises(PermissionConflict) as caught:
        async with graph_of(*nodes):
            pass
    assert caught.value.needs == "other.image"
    assert caught.value.blocks == "strict.image"
    assert caught.value.permission == "write"
