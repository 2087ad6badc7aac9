# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Backup jobs beside other jobs, filters, readers and changes of the graph."""

from __future__ import annotations

import asyncio

import pytest
from helpers.backup import CLUSTER, content, disk_and_target, fill, memory, pattern, settle
from helpers.backup_job import SIZE, Setup, setup
from helpers.loop import graph_of, in_loop

from blockgraph import trace
from blockgraph.errors import NodeInUse


@in_loop
async def test_filter_of_a_job_can_not_be_removed() -> None:
    async with setup() as s:
        job = await s.start(sync="none")
        with pytest.raises(NodeInUse, match="job 'disk'"):
            await s.graph.remove_filter(job.filter_name)
        await s.guest.pwrite(0, b"new")
        assert (await content(s.graph, "target-bytes"))[:CLUSTER] == s.old[:CLUSTER]
        job.cancel()
        await job.wait()


@in_loop
async def test_reader_left_on_the_filter_keeps_it_and_the_job_tells() -> None:
    async with setup() as s:
        job = await s.start(sync="none", filter_node_name="top")
        await s.graph.add_node({"driver": "snapshot-access", "node-name": "fleece", "file": "top"})
        await s.guest.pwrite(0, b"new")
        job.cancel()
        await job.wait()
        assert job.error is not None
        assert s.graph.model.has("top")
        fleece = await s.graph.backend("fleece")
        assert await fleece.pread(0, CLUSTER) == s.old[:CLUSTER]
        await s.graph.close_backend(fleece)
        await s.graph.remove_node("fleece")
        await s.graph.remove_filter("top")  # nobody holds it any more
        await s.check_clean()


@in_loop
async def test_filter_inserted_above_the_disk_during_the_job_does_not_disturb_it() -> None:
    async with setup() as s:
        s.target.break_at("pwritev", "copy")
        job = await s.start()
        await s.target.wait_break("copy")
        s.target.resume("copy")
        await s.graph.insert_filter({"driver": "delay", "node-name": "slow", "file": "disk"}, above="disk")
        await s.guest.pwrite(7 * CLUSTER, b"new")
        await job.wait()
        assert job.error is None
        assert await content(s.graph, "target-bytes") == s.old


@in_loop
async def test_two_jobs_on_one_disk_both_keep_their_point_in_time() -> None:
    async with graph_of(*disk_and_target(SIZE), memory("second", SIZE)) as graph:
        old = pattern(SIZE)
        await fill(graph, "disk-bytes", old)
        s = Setup(graph, await graph.backend("disk", writable=True), old)
        first = await s.start(sync="full", job_id="a", auto_finalize=False)
        await s.guest.pwrite(0, b"between")
        middle = await content(graph, "disk-bytes")
        second = await s.start(sync="full", job_id="b", target="second", auto_finalize=False)
        await s.guest.pwrite(10, b"later")
        await settle()
        for job in (first, second):
            job.finalize()
            await job.wait()
            assert job.error is None
        assert await content(graph, "target-bytes") == old
        assert await content(graph, "second") == middle
        assert s.guest.node.name == "disk"


@in_loop
async def test_graph_closing_cancels_its_jobs() -> None:
    async with setup() as s:
        job = await s.start(sync="none")
        paused = await s.start(job_id="b", target={"driver": "memory", "size": SIZE})
        paused.pause()
        await s.graph.close()
        assert job.cancelled
        assert paused.cancelled
        assert s.kinds() == ["cancelled", "cancelled"]


@in_loop
async def test_drain_holds_the_job_and_its_flush() -> None:
    async with setup() as s:
        async with s.graph.drained(["target"]):
            start = asyncio.ensure_future(s.start())
            await settle()
            with trace.record() as events:
                await settle()
            assert not [e for e in events if e.node == "target" and e.op != "map"]
        job = await start
        await job.wait()
        assert job.error is None
