# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""snapshot-access: the kept image, read while the guest writes.

reader --> fleece (snapshot-access) --> top --file----> disk --> disk-bytes
                                         `--target---> target --> target-bytes
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from helpers.backup import CLUSTER, Setup, backup_top, disk_and_target, fill, pattern, settle, top_over
from helpers.loop import graph_of, in_loop

from blockgraph import trace
from blockgraph.backend import Backend
from blockgraph.errors import GraphError, SnapshotBroken, Unsupported
from blockgraph.flags import Flag

FLEECE = {"driver": "snapshot-access", "node-name": "fleece", "file": "top"}


@asynccontextmanager
async def fleecing(size: int = 8 * CLUSTER, **more: Any) -> AsyncIterator[tuple[Setup, Backend]]:
    """A backup-top, and a reader of what it keeps."""
    async with backup_top(size, **more) as s:
        await s.graph.add_node(FLEECE)
        yield s, await s.graph.backend("fleece", writable=True)


@in_loop
async def test_read_shows_the_old_bytes_on_both_sides() -> None:
    async with fleecing() as (s, reader):
        await s.guest.pwrite(CLUSTER + 10, b"n" * CLUSTER)
        await s.guest.write_zeroes(4 * CLUSTER, CLUSTER)
        await s.guest.discard(6 * CLUSTER, CLUSTER)
        assert await reader.pread(0, 8 * CLUSTER) == s.old
        assert await reader.pread(2 * CLUSTER - 5, 10) == s.old[2 * CLUSTER - 5 : 2 * CLUSTER + 5]


@in_loop
async def test_read_of_a_cluster_being_copied_comes_from_the_disk_or_the_target() -> None:
    async with fleecing() as (s, reader):
        s.target.break_at("pwritev", "copy")
        write = asyncio.ensure_future(s.guest.pwrite(0, b"new"))
        await s.target.wait_break("copy")
        assert await reader.pread(0, CLUSTER) == s.old[:CLUSTER]  # the disk still has it
        s.target.resume("copy")
        await write
        assert await reader.pread(0, CLUSTER) == s.old[:CLUSTER]


@in_loop
async def test_read_from_the_disk_holds_guest_writes() -> None:
    async with fleecing() as (s, reader):
        s.disk.break_at("preadv", "frozen", offset=0)
        read = asyncio.ensure_future(reader.pread(0, CLUSTER))
        await s.disk.wait_break("frozen")
        write = asyncio.ensure_future(s.guest.pwrite(5, b"new"))
        away = asyncio.ensure_future(s.guest.pwrite(3 * CLUSTER, b"away"))
        await away
        await settle()
        assert not write.done()
        assert (await s.live())[:CLUSTER] == s.old[:CLUSTER]
        s.disk.resume("frozen")
        assert await read == s.old[:CLUSTER]
        await write
        assert (await s.live())[5:8] == b"new"


@in_loop
async def test_read_cancelled_lets_guest_writes_go_on() -> None:
    async with fleecing() as (s, reader):
        s.disk.break_at("preadv", "frozen", offset=0)
        read = asyncio.ensure_future(reader.pread(0, CLUSTER))
        await s.disk.wait_break("frozen")
        write = asyncio.ensure_future(s.guest.pwrite(5, b"new"))
        await settle()
        read.cancel()
        await write
        assert read.cancelled()


@in_loop
async def test_read_from_the_target_holds_nobody() -> None:
    async with fleecing() as (s, reader):
        await s.guest.pwrite(0, b"new")
        s.target.break_at("preadv", "kept")
        read = asyncio.ensure_future(reader.pread(0, CLUSTER))
        await s.target.wait_break("kept")
        await asyncio.wait_for(s.guest.pwrite(0, b"newer"), 5)
        s.target.resume("kept")
        assert await read == s.old[:CLUSTER]


@in_loop
async def test_read_outside_the_bitmap_fails_as_a_whole_with_eacces() -> None:
    async with graph_of(*disk_and_target(8 * CLUSTER)) as graph:
        old = pattern(8 * CLUSTER)
        await fill(graph, "disk-bytes", old)
        (await graph.add_bitmap("disk", "b0")).recorder.set(CLUSTER, 2 * CLUSTER)
        await graph.insert_filter(top_over(bitmap={"node": "disk", "name": "b0"}), above="disk")
        await graph.add_node(FLEECE)
        reader = await graph.backend("fleece")
        assert await reader.pread(CLUSTER, 2 * CLUSTER) == old[CLUSTER : 3 * CLUSTER]
        for offset, length in ((0, 1), (CLUSTER - 1, 2), (3 * CLUSTER - 1, 2), (0, 8 * CLUSTER)):
            with trace.record() as events, pytest.raises(SnapshotBroken) as caught:
                await reader.pread(offset, length)
            assert caught.value.errno == errno.EACCES
            assert [e.node for e in events] == ["fleece"]  # nothing was read
            with pytest.raises(SnapshotBroken):
                await reader.block_status(offset, length)


@in_loop
async def test_filters_above_its_backup_top_do_not_come_between() -> None:
    async with fleecing() as (s, reader):
        await s.graph.add_node({"driver": "memory", "node-name": "later-bytes", "size": len(s.old)})
        await s.guest.pwrite(0, b"before the second")
        later = {"driver": "backup-top", "node-name": "later", "file": "top", "target": "later-bytes"}
        await s.graph.insert_filter(later, above="top")
        await s.graph.insert_filter({"driver": "delay", "node-name": "slow", "file": "later"}, above="later")
        await s.guest.pwrite(CLUSTER, b"after the second")
        assert await reader.pread(0, len(s.old)) == s.old


@in_loop
async def test_read_after_the_snapshot_broke_fails_with_eacces() -> None:
    rule = {"event": "pwritev", "iotype": "write", "errno": "EIO", "once": True}
    async with fleecing(top={"on-cbw-error": "break-snapshot"}, target={"inject-error": [rule]}) as (s, reader):
        await s.guest.pwrite(0, b"new")
        for offset in (0, 4 * CLUSTER):
            with pytest.raises(SnapshotBroken) as caught:
                await reader.pread(offset, 10)
            assert caught.value.errno == errno.EACCES
            assert "target" in str(caught.value)


@in_loop
async def test_read_in_flight_when_the_snapshot_breaks_fails() -> None:
    rule = {"event": "pwritev", "iotype": "write", "errno": "EIO", "once": True}
    async with fleecing(top={"on-cbw-error": "break-snapshot"}, target={"inject-error": [rule]}) as (s, reader):
        s.disk.break_at("preadv_done", "read", offset=4 * CLUSTER)
        read = asyncio.ensure_future(reader.pread(4 * CLUSTER, 10))
        await s.disk.wait_break("read")
        await s.guest.pwrite(0, b"new")
        s.disk.resume("read")
        with pytest.raises(SnapshotBroken):
            await read


@in_loop
async def test_writes_are_unsupported() -> None:
    async with fleecing() as (s, reader):
        with pytest.raises(Unsupported):
            await reader.pwrite(0, b"x")
        with pytest.raises(Unsupported):
            await reader.write_zeroes(0, CLUSTER)
        with pytest.raises(Unsupported):
            await reader.write_zeroes(0, CLUSTER, Flag.NO_FALLBACK)
        assert await s.live() == s.old


# Discard.


@in_loop
async def test_discard_forgets_and_frees_whole_clusters_only() -> None:
    async with fleecing() as (s, reader):
        await s.guest.pwrite(0, b"n" * 4 * CLUSTER)
        await reader.discard(CLUSTER - 10, 2 * CLUSTER + 20)  # clusters 1 and 2, and a bit of 0 and 3
        kept = await s.kept()
        assert kept[:CLUSTER] == s.old[:CLUSTER]
        assert kept[CLUSTER : 3 * CLUSTER] == bytes(2 * CLUSTER)
        assert kept[3 * CLUSTER : 4 * CLUSTER] == s.old[3 * CLUSTER : 4 * CLUSTER]
        assert await reader.pread(0, CLUSTER) == s.old[:CLUSTER]
        for offset in (CLUSTER, 3 * CLUSTER - 1):
            with pytest.raises(SnapshotBroken):
                await reader.pread(offset, 1)


@in_loop
async def test_discard_of_what_is_not_copied_is_never_copied() -> None:
    async with fleecing() as (s, reader):
        await reader.discard(0, 2 * CLUSTER)
        await s.guest.pwrite(0, b"n" * 3 * CLUSTER)
        assert s.copy.bytes_moved == CLUSTER
        assert (await s.kept())[: 2 * CLUSTER] == bytes(2 * CLUSTER)


@in_loop
async def test_discard_reaches_a_tail_cluster() -> None:
    async with fleecing(CLUSTER + 512) as (s, reader):
        await reader.discard(CLUSTER, 512)
        await s.guest.pwrite(CLUSTER, b"n")
        assert s.copy.bytes_moved == 0


@in_loop
async def test_discard_during_a_copy_that_fails_stays_forgotten() -> None:
    async with fleecing() as (s, reader):
        s.target.break_at("pwritev", "copy")
        write = asyncio.ensure_future(s.guest.pwrite(0, b"new"))
        await s.target.wait_break("copy")
        forget = asyncio.ensure_future(reader.discard(0, CLUSTER))
        await settle()
        assert not forget.done()
        write.cancel()
        await forget
        assert not s.copy.bitmap.get(0)
        assert (await s.kept())[:CLUSTER] == bytes(CLUSTER)


# Block status.


@in_loop
async def test_block_status_is_cut_where_copied_and_not_copied_meet() -> None:
    async with graph_of(*disk_and_target(4 * CLUSTER)) as graph:
        await fill(graph, "disk-bytes", pattern(4 * CLUSTER))
        await graph.insert_filter(top_over(), above="disk")
        await graph.add_node(FLEECE)
        guest = await graph.backend("top", writable=True)
        reader = await graph.backend("fleece")
        await guest.pwrite(0, b"n")  # cluster 0 is kept,
        await guest.write_zeroes(CLUSTER, CLUSTER, Flag.MAY_UNMAP)  # and so is 1, which is zero on the live disk
        status = await reader.block_status(0, 4 * CLUSTER)
        assert (status.offset, status.length, status.data, status.zero) == (0, 2 * CLUSTER, True, False)
        status = await reader.block_status(CLUSTER, 3 * CLUSTER)
        assert (status.length, status.data) == (CLUSTER, True)
        status = await reader.block_status(2 * CLUSTER, 2 * CLUSTER)
        assert (status.length, status.data) == (2 * CLUSTER, True)


@in_loop
async def test_block_status_shows_old_zeroes_where_the_guest_has_written_data() -> None:
    async with graph_of(*disk_and_target(4 * CLUSTER), top_over(), FLEECE) as graph:
        guest = await graph.backend("top", writable=True)
        reader = await graph.backend("fleece")
        await guest.pwrite(0, b"n" * CLUSTER)
        status = await reader.block_status(0, 4 * CLUSTER)
        assert status.zero
        assert status.length == CLUSTER
        assert await reader.pread(0, 4 * CLUSTER) == bytes(4 * CLUSTER)


@in_loop
async def test_block_status_never_leads_to_the_live_disk() -> None:
    async with fleecing() as (s, reader):
        await s.guest.pwrite(0, b"new")
        for offset in (0, CLUSTER, 7 * CLUSTER):
            status = await reader.block_status(offset, CLUSTER)
            assert (status.depth, status.host, status.host_offset) == (0, None, None)
            assert status.node is not None
            assert status.node.name == "fleece"


@in_loop
async def test_block_status_of_the_disk_is_asked_frozen() -> None:
    async with fleecing() as (s, reader):
        s.disk.break_at("block_status", "status")
        ask = asyncio.ensure_future(reader.block_status(0, CLUSTER))
        await s.disk.wait_break("status")
        write = asyncio.ensure_future(s.guest.pwrite(0, b"new"))
        await settle()
        assert not write.done()
        s.disk.resume("status")
        assert (await ask).data
        await write


# Graph.


@in_loop
async def test_child_without_permissions_lets_everything_else_be() -> None:
    async with fleecing() as (s, _):
        edge = s.graph.model.edge("fleece", "file")
        assert edge is not None
        assert edge.need == 0


@in_loop
async def test_child_that_is_no_backup_top_is_refused() -> None:
    async with graph_of(*disk_and_target(CLUSTER)) as graph:
        with pytest.raises(GraphError, match="backup-top"):
            await graph.add_node({**FLEECE, "file": "disk"})
        assert not graph.model.has("fleece")


@in_loop
async def test_filter_below_can_not_be_removed_while_it_is_read() -> None:
    async with fleecing() as (s, reader):
        with pytest.raises(GraphError):
            await s.graph.remove_filter("top")
        await s.guest.pwrite(0, b"new")
        assert await reader.pread(0, CLUSTER) == s.old[:CLUSTER]
