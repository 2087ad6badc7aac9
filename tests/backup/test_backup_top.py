# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""backup-top: what it copies, when, in which order, and what happens when a copy fails.

guest --> top --file----> disk (inject-error) --> disk-bytes
           `--target---> target (inject-error) -> target-bytes
"""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest
from helpers.backup import (
    CLUSTER,
    backup_top,
    content,
    disk_and_target,
    fault,
    fill,
    memory,
    pattern,
    settle,
    top_over,
)
from helpers.loop import driver_of, graph_of, in_loop

from blockgraph import trace
from blockgraph.create import create_file
from blockgraph.errors import BlockGraphError, GraphError, IOFailure, OptionError, PermissionConflict, Unsupported
from blockgraph.filters.backup_top import BackupTop
from blockgraph.flags import Flag

# Cluster size and ranges.


@in_loop
async def test_cluster_size_target_with_small_clusters_is_64_kib() -> None:
    async with backup_top() as s:
        assert s.top.cluster_size == CLUSTER


@pytest.mark.parametrize(
    "cluster, backed, expected", [(4096, 0, CLUSTER), (1 << 20, 0, 1 << 20), (1 << 20, 1, CLUSTER)]
)
def test_cluster_size_qcow2_target_covers_whole_clusters(
    tmp_path: Path, cluster: int, backed: int, expected: int
) -> None:
    @in_loop
    async def run() -> None:
        image = str(tmp_path / "target.qcow2")
        await create_file(image, 4 << 20, "qcow2", replace=False, cluster_size=cluster)
        target = {"driver": "qcow2", "node-name": "target", "file": {"driver": "file", "filename": image}}
        backing = {"backing": "base"} if backed else {}
        async with graph_of(
            memory("disk", 4 << 20), memory("base", 4 << 20), {**target, **backing}, top_over()
        ) as graph:
            assert driver_of(graph, "top", BackupTop).cluster_size == expected

    run()


@in_loop
async def test_min_cluster_size_larger_is_taken() -> None:
    async with backup_top(top={"min-cluster-size": 4 * CLUSTER}) as s:
        await s.guest.pwrite(5 * CLUSTER, b"x")
        assert s.copied() == [1]
        assert (await s.kept())[4 * CLUSTER :] == s.old[4 * CLUSTER :]


@pytest.mark.parametrize("value", [0, -4096, 3 << 20, 1 << 40], ids=["zero", "negative", "no-power", "huge"])
def test_min_cluster_size_wrong_is_refused(value: int) -> None:
    @in_loop
    async def run() -> None:
        with pytest.raises(OptionError, match="min-cluster-size"):
            async with graph_of(*disk_and_target(CLUSTER), top_over(**{"min-cluster-size": value})):
                pass

    run()


@pytest.mark.parametrize(
    "offset, length, clusters",
    [(0, 1, [0]), (CLUSTER - 1, 2, [0, 1]), (CLUSTER, CLUSTER, [1]), (CLUSTER + 7, 3 * CLUSTER, [1, 2, 3, 4])],
    ids=["one-byte", "across-a-border", "whole", "rounded-both-ways"],
)
def test_write_range_is_rounded_to_clusters(offset: int, length: int, clusters: list[int]) -> None:
    @in_loop
    async def run() -> None:
        async with backup_top() as s:
            await s.guest.pwrite(offset, b"n" * length)
            assert s.copied() == clusters
            kept = await s.kept()
            for cluster in range(8):
                area = slice(cluster * CLUSTER, (cluster + 1) * CLUSTER)
                assert kept[area] == (s.old[area] if cluster in clusters else bytes(CLUSTER))

    run()


@in_loop
async def test_write_tail_cluster_past_the_end_copies_up_to_the_end() -> None:
    size = 2 * CLUSTER + 1000
    async with backup_top(size) as s:
        await s.guest.pwrite(size - 1, b"n")
        assert s.copied() == [2]
        assert (await s.kept())[2 * CLUSTER :] == s.old[2 * CLUSTER :]
        assert s.graph.node("target-bytes").size() == size


# Triggers.


@in_loop
async def test_write_zeroes_copies_first() -> None:
    async with backup_top() as s:
        await s.guest.write_zeroes(CLUSTER, 2 * CLUSTER, Flag.MAY_UNMAP)
        assert (await s.kept())[CLUSTER : 3 * CLUSTER] == s.old[CLUSTER : 3 * CLUSTER]
        assert (await s.live())[CLUSTER : 3 * CLUSTER] == bytes(2 * CLUSTER)


@in_loop
async def test_discard_copies_first_and_is_passed_on() -> None:
    async with backup_top() as s:
        await s.guest.discard(CLUSTER, CLUSTER)
        assert (await s.kept())[CLUSTER : 2 * CLUSTER] == s.old[CLUSTER : 2 * CLUSTER]
        assert (await s.live())[CLUSTER : 2 * CLUSTER] == bytes(CLUSTER)


@in_loop
async def test_discard_ignored_is_dropped_without_copying() -> None:
    async with backup_top(top={"discard": "ignore"}) as s:
        await s.guest.discard(CLUSTER, CLUSTER)
        assert s.copied() == []
        assert await s.live() == s.old


@in_loop
async def test_write_zeroes_discard_ignored_does_not_unmap() -> None:
    async with backup_top(top={"discard": "ignore"}) as s:
        await s.guest.write_zeroes(0, CLUSTER, Flag.MAY_UNMAP)
        status = await s.guest.block_status(0, CLUSTER)
        assert status.data


@in_loop
async def test_write_unchanged_does_not_copy() -> None:
    async with backup_top() as s:
        await s.guest.pwrite(0, s.old[:4096], Flag.WRITE_UNCHANGED)
        assert s.copied() == []


@in_loop
async def test_read_does_not_copy() -> None:
    async with backup_top() as s:
        assert await s.guest.pread(0, 8 * CLUSTER) == s.old
        assert s.copied() == []


@in_loop
async def test_write_second_to_a_cluster_does_not_copy_again() -> None:
    async with backup_top() as s:
        await s.guest.pwrite(0, b"first")
        moved = s.copy.bytes_moved
        await s.guest.pwrite(0, b"second")
        assert s.copy.bytes_moved == moved
        assert await s.kept() == s.old[:CLUSTER] + bytes(7 * CLUSTER)


# Order.


@in_loop
async def test_write_order_is_read_old_keep_it_then_write() -> None:
    async with backup_top() as s:
        with trace.record() as events:
            await s.guest.pwrite(10, b"new")
        calls = [(e.op, e.node, e.offset, e.length) for e in events if e.op in ("pread", "pwrite")]
        assert calls == [
            ("pwrite", "top", 10, 3),
            ("pread", "disk", 0, CLUSTER),
            ("pread", "disk-bytes", 0, CLUSTER),
            ("pwrite", "target", 0, CLUSTER),
            ("pwrite", "target-bytes", 0, CLUSTER),
            ("pwrite", "disk", 10, 3),
            ("pwrite", "disk-bytes", 10, 3),
        ]


@in_loop
async def test_write_waits_for_frozen_reads_after_its_copy() -> None:
    async with backup_top() as s:
        async with s.top.frozen(0, 10):
            write = asyncio.ensure_future(s.guest.pwrite(CLUSTER - 1, b"new"))
            await settle()
            assert s.copied() == [0, 1]  # copied, and
            assert not write.done()
            assert await s.live() == s.old  # not written yet
            other = await asyncio.wait_for(s.guest.pwrite(3 * CLUSTER, b"elsewhere"), 5)
            assert other is None
        await write
        assert (await s.live())[CLUSTER - 1 : CLUSTER + 2] == b"new"


@in_loop
async def test_writes_overlapping_share_one_copy() -> None:
    async with backup_top() as s:
        s.disk.break_at("preadv", "copy")
        first = asyncio.ensure_future(s.guest.pwrite(0, b"a" * 10))
        await s.disk.wait_break("copy")
        second = asyncio.ensure_future(s.guest.pwrite(100, b"b" * 10))
        third = asyncio.ensure_future(s.guest.pwrite(CLUSTER - 5, b"c" * 10))
        await settle()
        assert not first.done()
        assert not second.done()
        assert not third.done()
        s.disk.resume("copy")
        await asyncio.gather(first, second, third)
        assert s.copy.bytes_moved == 2 * CLUSTER
        assert (await s.kept())[: 2 * CLUSTER] == s.old[: 2 * CLUSTER]


@in_loop
async def test_write_waits_for_a_background_copy_of_its_cluster() -> None:
    async with backup_top() as s:
        s.target.break_at("pwritev", "job", offset=0)
        job = asyncio.ensure_future(s.copy.copy_next(CLUSTER))
        await s.target.wait_break("job")
        write = asyncio.ensure_future(s.guest.pwrite(0, b"new"))
        await settle()
        assert not write.done()
        assert await s.live() == s.old
        s.target.resume("job")
        await asyncio.gather(job, write)
        assert s.copy.bytes_moved == CLUSTER
        assert (await s.kept())[:CLUSTER] == s.old[:CLUSTER]


# Failures.


@in_loop
async def test_copy_failing_sets_the_bits_again_and_a_retry_copies() -> None:
    rule = {"event": "pwritev", "iotype": "write", "errno": "EIO", "once": True}
    async with backup_top(target={"inject-error": [rule]}) as s:
        with pytest.raises(IOFailure) as caught:
            await s.guest.pwrite(0, b"new")
        assert caught.value.errno == errno.EIO
        assert s.copied() == []
        assert await s.live() == s.old
        await s.guest.pwrite(0, b"new")
        assert (await s.kept())[:CLUSTER] == s.old[:CLUSTER]


@in_loop
async def test_copy_failing_for_one_call_is_seen_by_that_call_only() -> None:
    rule = {"event": "pwritev", "iotype": "write", "errno": "EIO", "once": True}
    async with backup_top(target={"inject-error": [rule]}) as s:
        s.disk.break_at("preadv", "copy")
        first = asyncio.ensure_future(s.guest.pwrite(0, b"a"))
        await s.disk.wait_break("copy")
        second = asyncio.ensure_future(s.guest.pwrite(1, b"b"))
        await settle()
        s.disk.resume("copy")
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert isinstance(results[0], IOFailure)
        assert results[1] is None
        assert await s.live() == s.old[:1] + b"b" + s.old[2:]
        assert (await s.kept())[:CLUSTER] == s.old[:CLUSTER]


@in_loop
async def test_copy_cancelled_sets_the_bits_again_and_waiters_copy() -> None:
    async with backup_top() as s:
        s.disk.break_at("preadv", "copy")
        first = asyncio.ensure_future(s.guest.pwrite(0, b"a"))
        await s.disk.wait_break("copy")
        second = asyncio.ensure_future(s.guest.pwrite(1, b"b"))
        await settle()
        first.cancel()
        await second
        assert first.cancelled()
        assert (await s.kept())[:CLUSTER] == s.old[:CLUSTER]
        assert await s.live() == s.old[:1] + b"b" + s.old[2:]


@in_loop
async def test_break_guest_write_source_error_fails_the_write() -> None:
    rule = {"event": "preadv", "iotype": "read", "errno": "EIO"}
    async with backup_top(disk={"inject-error": [rule]}) as s:
        for request in (s.guest.pwrite(0, b"n"), s.guest.write_zeroes(0, 10), s.guest.discard(0, CLUSTER)):
            with pytest.raises(IOFailure):
                await request
        assert s.top.broken is None
        assert await s.live() == s.old


@in_loop
async def test_break_guest_write_enospc_keeps_its_errno() -> None:
    rule = {"event": "pwritev", "iotype": "write", "errno": "ENOSPC"}
    async with backup_top(target={"inject-error": [rule]}) as s:
        with pytest.raises(BlockGraphError) as caught:
            await s.guest.pwrite(0, b"n")
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.node == "target"


@in_loop
async def test_break_snapshot_lets_the_write_go_on_and_later_ones_skip_the_copy() -> None:
    rule = {"event": "pwritev", "iotype": "write", "errno": "EIO", "once": True}
    async with backup_top(top={"on-cbw-error": "break-snapshot"}, target={"inject-error": [rule]}) as s:
        await s.guest.pwrite(0, b"new")
        assert (await s.live())[:3] == b"new"
        assert s.top.broken is not None
        first = s.top.broken
        await s.guest.pwrite(CLUSTER, b"later")
        assert s.top.broken is first
        assert s.copy.bytes_moved == 0
        assert await s.kept() == bytes(8 * CLUSTER)


# cbw-timeout.


class Clock:
    """Replaces asyncio.wait in backup_top: a timeout is over when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.expired = asyncio.Event()
        self.timeouts: list[float | None] = []
        monkeypatch.setattr("blockgraph.filters.backup_top.asyncio.wait", self.wait)

    async def wait(self, tasks: set[asyncio.Future[Any]], **how: Any) -> None:
        """Until the tasks or the clock."""
        self.timeouts.append(how["timeout"])
        expired = asyncio.ensure_future(self.expired.wait())
        done = asyncio.Event()
        for task in (*tasks, expired):
            task.add_done_callback(lambda _: done.set())
        await done.wait()
        expired.cancel()


def test_cbw_timeout_expired_fails_the_write_and_the_copy_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    @in_loop
    async def run() -> None:
        async with backup_top(top={"cbw-timeout": 45}) as s:
            with monkeypatch.context() as patch:
                clock = Clock(patch)
                s.target.break_at("pwritev", "hung")
                write = asyncio.ensure_future(s.guest.pwrite(0, b"new"))
                await s.target.wait_break("hung")
                clock.expired.set()
                with pytest.raises(IOFailure) as caught:
                    await write
                assert caught.value.errno == errno.ETIMEDOUT
                assert clock.timeouts == [45]
            assert s.graph.node("top").busy  # the copy that goes on
            assert await s.guest.pread(0, 3) == s.old[:3]
            s.target.resume("hung")
            await settle()
            assert not s.graph.node("top").busy
            assert s.copied() == [0]
            await s.guest.pwrite(0, b"new")
            assert (await s.kept())[:CLUSTER] == s.old[:CLUSTER]

    run()


def test_cbw_timeout_expired_break_snapshot_lets_the_write_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    @in_loop
    async def run() -> None:
        async with backup_top(top={"cbw-timeout": 1, "on-cbw-error": "break-snapshot"}) as s:
            with monkeypatch.context() as patch:
                clock = Clock(patch)
                s.target.break_at("pwritev", "hung")
                write = asyncio.ensure_future(s.guest.pwrite(0, b"new"))
                await s.target.wait_break("hung")
                clock.expired.set()
                await write
            assert s.top.broken is not None
            assert s.top.broken.errno == errno.ETIMEDOUT
            s.target.resume("hung")
            await settle()

    run()


@pytest.mark.parametrize("node", ["top", "target", "target-bytes"])
def test_cbw_timeout_drain_waits_for_the_copy_that_goes_on(monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    @in_loop
    async def run() -> None:
        async with backup_top(top={"cbw-timeout": 1}) as s:
            with monkeypatch.context() as patch:
                clock = Clock(patch)
                s.disk.break_at("preadv", "hung")  # not on the target yet: nothing is in flight there
                write = asyncio.ensure_future(s.guest.pwrite(0, b"new"))
                await s.disk.wait_break("hung")
                clock.expired.set()
                with pytest.raises(IOFailure):
                    await write
            order: list[str] = []

            async def drain() -> None:
                async with s.graph.drained([node]):
                    order.append("drained")

            held = asyncio.ensure_future(drain())
            await settle()
            assert order == []
            s.disk.resume("hung")
            await held
            assert s.copied() == [0]

    run()


def test_cbw_timeout_close_waits_for_the_copy_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    @in_loop
    async def run() -> None:
        async with backup_top(top={"cbw-timeout": 1}) as s:
            with monkeypatch.context() as patch:
                clock = Clock(patch)
                s.target.break_at("pwritev", "hung")
                write = asyncio.ensure_future(s.guest.pwrite(0, b"new"))
                await s.target.wait_break("hung")
                clock.expired.set()
                with pytest.raises(IOFailure):
                    await write
            target = s.target
            closing = asyncio.ensure_future(s.graph.close())
            await settle()
            assert not closing.done()
            target.resume("hung")
            await closing

    run()


# Zeroes.


@in_loop
async def test_zeroes_of_the_disk_are_zeroed_without_unmapping() -> None:
    async with graph_of(*disk_and_target(2 * CLUSTER)) as graph:
        await fill(graph, "target-bytes", pattern(2 * CLUSTER, 9))  # a target with old contents
        await graph.insert_filter(top_over(), above="disk")
        guest = await graph.backend("top", writable=True)
        with trace.record() as events:
            await guest.pwrite(0, b"new")
        changes = [e.op for e in events if e.node == "target" and e.op in ("pwrite", "write_zeroes", "discard")]
        assert changes == ["write_zeroes"]
        backend = await graph.backend("target-bytes")
        status = await backend.block_status(0, CLUSTER)
        assert status.data  # zeroed, and its storage kept
        assert await backend.pread(0, CLUSTER) == bytes(CLUSTER)


@in_loop
async def test_zeroes_where_the_target_reads_zero_write_nothing() -> None:
    async with graph_of(*disk_and_target(2 * CLUSTER), top_over()) as graph:
        guest = await graph.backend("top", writable=True)
        with trace.record() as events:
            await guest.pwrite(0, b"new")
        assert not [e for e in events if e.node == "target" and e.op in ("pwrite", "write_zeroes")]


# Flush and size.


@in_loop
async def test_flush_goes_to_the_disk_only() -> None:
    async with backup_top() as s:
        await s.guest.pwrite(0, b"new")
        with trace.record() as events:
            await s.guest.flush()
        assert {e.node for e in events if e.op == "flush"} == {"top", "disk", "disk-bytes"}


@in_loop
async def test_flush_first_after_insertion_reaches_earlier_writes() -> None:
    async with graph_of(*disk_and_target(2 * CLUSTER)) as graph:
        guest = await graph.backend("disk", writable=True)
        await guest.pwrite(0, b"before")
        with trace.record() as events:
            await graph.insert_filter(top_over(), above="disk")
            await guest.flush()
        assert ("flush", "disk-bytes") in [(e.op, e.node) for e in events]


@in_loop
async def test_truncate_through_the_filter_is_unsupported() -> None:
    async with backup_top() as s:
        with pytest.raises(Unsupported):
            await s.graph.node("top").truncate(CLUSTER)


@in_loop
async def test_sizes_differing_are_refused_and_nothing_changes() -> None:
    async with graph_of(memory("disk", 2 * CLUSTER), memory("target", CLUSTER)) as graph:
        before = graph.model
        with pytest.raises(
            GraphError, match=rf"node 'target': the target has {CLUSTER} bytes.*resize the target to {2 * CLUSTER}"
        ):
            await graph.insert_filter(top_over(), above="disk")
        assert graph.model is before


@in_loop
async def test_same_node_for_file_and_target_is_refused() -> None:
    async with graph_of(memory("disk", CLUSTER)) as graph:
        with pytest.raises(GraphError, match="disk"):
            await graph.insert_filter(top_over(target="disk"), above="disk")


# Permissions.


@in_loop
async def test_writer_beside_the_filter_is_refused() -> None:
    async with backup_top() as s:
        with pytest.raises(PermissionConflict) as caught:
            await s.graph.backend("disk", writable=True, owner="sneaky")
        assert caught.value.permission == "write"
        assert caught.value.node == "disk"
        assert {caught.value.needs, caught.value.blocks} == {"sneaky", "top.file"}


@in_loop
async def test_resize_beside_the_filter_is_refused_on_both_sides() -> None:
    async with backup_top() as s:
        for node in ("disk", "target"):
            with pytest.raises(PermissionConflict):
                await s.graph.backend(node, writable=node == "target", resize=True)


@in_loop
async def test_writer_already_beside_refuses_the_filter() -> None:
    async with graph_of(*disk_and_target(CLUSTER), {"driver": "delay", "node-name": "side", "file": "disk"}) as graph:
        # A job's root stays at its node: the filter would not see what it writes.
        stays = await graph.backend("disk", writable=True, stays=True, owner="job 'other'")
        with pytest.raises(PermissionConflict) as caught:
            await graph.insert_filter(top_over(), above="disk")
        assert "job 'other'" in str(caught.value)
        assert not graph.model.has("top")
        await stays.pwrite(0, b"still works")


@in_loop
async def test_iotest_283_conflict_names_node_permission_and_both_edges() -> None:
    """base is used by source and, for writing, by other: a backup of source can not freeze base."""
    nodes = [
        memory("base", CLUSTER),
        {"driver": "raw", "node-name": "source", "file": "base"},
        fault("other", "base", **{"take-child-perms": ["write"]}),
        memory("target", CLUSTER),
    ]
    async with graph_of(*nodes) as graph:
        before = sorted(name for name, _ in graph.model.vertices())
        with pytest.raises(PermissionConflict) as caught:
            await graph.insert_filter(top_over(file="source"), above="source")
        error = caught.value
        assert (error.node, error.permission) == ("base", "write")
        assert {error.needs, error.blocks} == {"other.image", "source.file"}
        for part in ("base", "write", "other.image", "source.file"):
            assert part in str(error)
        assert sorted(name for name, _ in graph.model.vertices()) == before


# Bitmap.


@in_loop
async def test_bitmap_keeps_only_what_is_set_when_the_filter_is_made() -> None:
    async with graph_of(*disk_and_target(8 * CLUSTER)) as graph:
        old = pattern(8 * CLUSTER)
        await fill(graph, "disk-bytes", old)
        bitmap = await graph.add_bitmap("disk", "b0", granularity=4096)
        bitmap.recorder.set(CLUSTER + 4096, 10)
        await graph.insert_filter(top_over(bitmap={"node": "disk", "name": "b0"}), above="disk")
        bitmap.recorder.set(5 * CLUSTER, 10)  # too late
        guest = await graph.backend("top", writable=True)
        await guest.pwrite(0, b"n" * 8 * CLUSTER)
        kept = await content(graph, "target-bytes")
        assert kept == bytes(CLUSTER) + old[CLUSTER : 2 * CLUSTER] + bytes(6 * CLUSTER)


@pytest.mark.parametrize("ref", [("disk", "none"), ("nowhere", "b0"), ("small", "b0")], ids=["name", "node", "size"])
def test_bitmap_wrong_is_refused(ref: tuple[str, str]) -> None:
    @in_loop
    async def run() -> None:
        async with graph_of(*disk_and_target(2 * CLUSTER), memory("small", CLUSTER)) as graph:
            await graph.add_bitmap("disk", "b0")
            await graph.add_bitmap("small", "b0")
            with pytest.raises(GraphError):
                await graph.insert_filter(top_over(bitmap={"node": ref[0], "name": ref[1]}), above="disk")
            assert not graph.model.has("top")

    run()


# The target.


@in_loop
async def test_target_swapped_for_another_is_refused() -> None:
    async with backup_top() as s:
        await s.guest.pwrite(0, b"n")
        await s.graph.add_node(memory("else", 8 * CLUSTER))
        with pytest.raises(GraphError, match="else"):
            async with s.graph.transaction() as change:
                change.set_child("top", "target", "else")
        await s.guest.pwrite(CLUSTER, b"n")
        assert (await s.kept())[: 2 * CLUSTER] == s.old[: 2 * CLUSTER]


@in_loop
async def test_target_under_a_new_filter_goes_on() -> None:
    async with backup_top() as s:
        await s.guest.pwrite(0, b"n")
        await s.graph.insert_filter({"driver": "delay", "node-name": "slow", "file": "target"}, above="target")
        await s.guest.pwrite(CLUSTER, b"n")
        await s.graph.remove_filter("slow")
        await s.guest.pwrite(2 * CLUSTER, b"n")
        assert (await s.kept())[: 3 * CLUSTER] == s.old[: 3 * CLUSTER]
