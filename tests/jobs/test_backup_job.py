# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The backup job: what it copies, its error policies, its target, and that it leaves no filter behind.

guest --> (top) --file----> disk (inject-error) --> disk-bytes
           `----target---> target (inject-error) -> target-bytes
"""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest
from helpers.backup import CLUSTER, content, disk_and_target, fill, memory, pattern, settle, top_over
from helpers.backup_job import SIZE, Setup, fails, setup
from helpers.loop import driver_of, graph_of, in_loop

from blockgraph import trace
from blockgraph.create import create_file
from blockgraph.errors import BlockGraphError, GraphError, IOFailure, JobError
from blockgraph.filters.backup_top import BackupTop
from blockgraph.graph.load import check_description
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions

# What is copied.


@in_loop
async def test_full_copies_everything_and_takes_its_filter_out() -> None:
    async with setup() as s:
        job = await s.start()
        assert s.guest.node.name == job.filter_name
        await job.wait()
        assert job.error is None
        assert await content(s.graph, "target-bytes") == s.old
        assert s.kinds() == ["completed"]
        assert (job.progress.current, job.progress.total) == (SIZE, SIZE)
        await s.check_clean()


@in_loop
async def test_full_sparse_disk_moves_only_data() -> None:
    async with graph_of(memory("disk", 64 * CLUSTER), memory("target", 64 * CLUSTER)) as graph:
        await fill(graph, "disk", b"d" * CLUSTER)
        job = await JobManager(graph).backup(BackupOptions(device="disk", target="target", sync="full"))
        copy = driver_of(graph, job.filter_name, BackupTop).copy
        await job.wait()
        assert copy.bytes_moved == CLUSTER
        assert copy.bytes_copied == 64 * CLUSTER


@in_loop
async def test_full_of_an_empty_disk_succeeds() -> None:
    async with graph_of(memory("disk", 0), memory("target", 0)) as graph:
        job = await JobManager(graph).backup(BackupOptions(device="disk", target="target", sync="full"))
        await job.wait()
        assert job.error is None


def test_top_copies_only_what_the_top_layer_has(tmpfs: Path) -> None:
    @in_loop
    async def run() -> None:
        image = str(tmpfs / "overlay.qcow2")
        await create_file(image, SIZE, "qcow2", replace=False)
        overlay = {
            "driver": "qcow2",
            "node-name": "disk",
            "backing": "base",
            "file": {"driver": "file", "filename": image},
        }
        async with graph_of(memory("base", SIZE), overlay, memory("target", SIZE)) as graph:
            base = await graph.backend("base")
            assert base.size() == SIZE
            guest = await graph.backend("disk", writable=True)
            await guest.pwrite(2 * CLUSTER, b"t" * CLUSTER)
            await guest.write_zeroes(4 * CLUSTER, CLUSTER)
            await fill(graph, "target", b"?" * SIZE)
            job = await JobManager(graph).backup(BackupOptions(device="disk", target="target", sync="top"))
            copy = driver_of(graph, job.filter_name, BackupTop).copy
            await job.wait()
            assert job.error is None
            kept = await content(graph, "target")
            assert kept[2 * CLUSTER : 3 * CLUSTER] == b"t" * CLUSTER
            assert kept[4 * CLUSTER : 5 * CLUSTER] == bytes(CLUSTER)
            assert kept[: 2 * CLUSTER] == b"?" * 2 * CLUSTER
            assert copy.bytes_moved == CLUSTER

    run()


def test_top_guest_write_before_the_job_comes_there_copies_only_what_the_top_layer_has(tmpfs: Path) -> None:
    @in_loop
    async def run() -> None:
        image = str(tmpfs / "overlay.qcow2")
        await create_file(image, SIZE, "qcow2", replace=False)
        file = {"driver": "file", "filename": image}
        overlay = {"driver": "qcow2", "node-name": "disk", "backing": "base", "file": file}
        async with graph_of(memory("base", SIZE), overlay, memory("target", SIZE)) as graph:
            guest = await graph.backend("disk", writable=True)
            await guest.pwrite(2 * CLUSTER, b"t" * CLUSTER)
            await fill(graph, "target", b"?" * SIZE)
            options = BackupOptions(device="disk", target="target", sync="top", speed=1, max_workers=1)
            job = await JobManager(graph).backup(options)
            for cluster in (7, 2, 6):
                await guest.pwrite(cluster * CLUSTER, b"new" * 100)
            job.set_speed(0)
            await job.wait()
            assert job.error is None
            kept = await content(graph, "target")
            assert kept[2 * CLUSTER : 3 * CLUSTER] == b"t" * CLUSTER
            assert kept[: 2 * CLUSTER] + kept[3 * CLUSTER :] == b"?" * 7 * CLUSTER

    run()


@pytest.mark.parametrize("own", [True, False], ids=["inserted", "there-already"])
def test_top_with_a_target_backed_by_the_live_disk_is_refused(tmpfs: Path, own: bool) -> None:
    @in_loop
    async def run() -> None:
        image = str(tmpfs / "target.qcow2")
        await create_file(image, SIZE, "qcow2", replace=False)
        file = {"driver": "file", "filename": image}
        target = {"driver": "qcow2", "node-name": "target", "backing": "disk-bytes", "file": file}
        disk = {"driver": "delay", "node-name": "disk", "file": "disk-bytes"}
        async with graph_of(memory("disk-bytes", SIZE), disk, target) as graph:
            if not own:
                await graph.insert_filter(top_over(), above="disk")
            before = sorted(name for name, _ in graph.model.vertices())
            options = BackupOptions(device="disk", target="target", sync="top")
            with pytest.raises(GraphError, match="shows the live disk where nothing is copied"):
                await JobManager(graph).backup(options if own else BackupOptions(device="top", sync="top"))
            assert sorted(name for name, _ in graph.model.vertices()) == before
            nodes = [{"driver": "memory", "node-name": "disk-bytes", "size": SIZE}, disk, target]
            job = {"type": "backup", "device": "disk", "target": "target", "sync": "top"}
            if not own:
                nodes.append(top_over())
                job = {"type": "backup", "device": "top", "sync": "top"}
            (problem,) = check_description({"nodes": nodes, "jobs": [job]})
            assert str(problem).startswith("jobs[0].sync: the target shows the live disk")
            assert not check_description({"nodes": nodes, "jobs": [{**job, "sync": "full"}]})

    run()


@in_loop
async def test_none_copies_what_the_guest_overwrites_until_it_is_cancelled() -> None:
    async with setup() as s:
        job = await s.start(sync="none")
        await settle()
        await s.guest.pwrite(3 * CLUSTER, b"new")
        assert await content(s.graph, "target-bytes") == bytes(3 * CLUSTER) + s.old[3 * CLUSTER : 4 * CLUSTER] + bytes(
            4 * CLUSTER
        )
        job.pause()
        await settle()
        assert job.state == "paused"
        await s.guest.pwrite(5 * CLUSTER, b"new")  # the filter works on
        job.resume()
        await settle()
        assert job.state == "running"
        job.cancel()
        await job.wait()
        assert s.kinds() == ["cancelled"]
        await s.check_clean()


@in_loop
async def test_none_ends_with_its_snapshot() -> None:
    async with setup(target=fails("pwritev", "write", once=True)) as s:
        job = await s.start(sync="none", on_cbw_error="break-snapshot")
        await settle()
        await s.guest.pwrite(0, b"new")
        await job.wait()
        assert job.error is not None
        await s.check_clean()


@in_loop
async def test_backup_top_as_device_completes_its_target_and_stays() -> None:
    async with graph_of(*disk_and_target(SIZE)) as graph:
        old = pattern(SIZE)
        await fill(graph, "disk-bytes", old)
        await graph.insert_filter(top_over(), above="disk")
        guest = await graph.backend("top", writable=True)
        await guest.pwrite(CLUSTER, b"n" * CLUSTER)
        manager = JobManager(graph)
        job = await manager.backup(BackupOptions(device="top", sync="full"))
        with pytest.raises(GraphError, match="job 'top'"):
            await manager.backup(BackupOptions(device="top", sync="full", job_id="second"))
        await job.wait()
        assert await content(graph, "target-bytes") == old
        assert graph.model.has("top")
        assert guest.node.name == "top"
        assert manager.jobs == {}
        again = await manager.backup(BackupOptions(device="top", sync="full"))
        await again.wait()
        assert again.error is None


# Refusals: the graph and the disk stay as they were.


@pytest.mark.parametrize(
    "options, error",
    [
        ({"target": None}, "not a backup-top"),
        ({"target": "nowhere"}, "nowhere"),
        ({"target": "disk"}, "disk"),
        ({"target": "small"}, "bytes"),
        ({"device": "nowhere"}, "nowhere"),
        ({"target": {"driver": "file", "filename": "/nowhere/at/all"}}, "No such file"),
        ({"target": "target", "mode": "create"}, "description"),
        ({"target": {"driver": "null-co"}, "mode": "create"}, "raw"),
        ({"filter_node_name": "target"}, "name"),
        ({"filter_node_name": "not a name"}, "node name"),
    ],
    ids=["no-filter", "unknown", "same", "size", "device", "file", "create-name", "create-kind", "taken", "bad-name"],
)
def test_start_refused_leaves_everything_as_it_was(options: dict[str, Any], error: str) -> None:
    @in_loop
    async def run() -> None:
        async with graph_of(*disk_and_target(SIZE), memory("small", CLUSTER)) as graph:
            s = Setup(graph, await graph.backend("disk", writable=True), b"")
            before = graph.model
            with pytest.raises(BlockGraphError, match=error):
                await s.start(**options)
            assert graph.model is before or sorted(n for n, _ in graph.model.vertices()) == sorted(
                n for n, _ in before.vertices()
            )
            assert s.manager.jobs == {}
            await s.guest.pwrite(0, b"still works")

    run()


@in_loop
async def test_start_twice_under_one_id_is_refused() -> None:
    async with setup() as s:
        job = await s.start(sync="none")
        with pytest.raises(JobError, match="already"):
            await s.start(target="disk")
        job.cancel()
        await job.wait()


def test_start_refused_after_making_its_target_removes_the_file(tmp_path: Path) -> None:
    image = tmp_path / "new.raw"

    @in_loop
    async def run() -> None:
        async with setup() as s:
            with pytest.raises(BlockGraphError):
                await s.start(
                    target={"driver": "file", "filename": str(image)}, mode="create", filter_node_name="not a name"
                )
            assert not image.exists()

    run()


@in_loop
async def test_start_cancelled_while_requests_are_waited_for_changes_nothing() -> None:
    async with setup() as s:
        s.disk.break_at("pwritev", "held")
        write = asyncio.ensure_future(s.guest.pwrite(0, b"held"))
        await s.disk.wait_break("held")
        start = asyncio.ensure_future(s.start())
        await settle()
        start.cancel()
        await asyncio.wait({start})
        assert start.cancelled()
        s.disk.resume("held")
        await write
        assert s.manager.jobs == {}
        await s.check_clean()


# Targets.


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("mode", ["existing", "create"])
def test_target_image_holds_the_disk(tmpfs: Path, image_format: str, mode: str) -> None:
    image = tmpfs / "target"

    @in_loop
    async def run() -> None:
        async with setup() as s:
            await s.guest.write_zeroes(CLUSTER, CLUSTER)
            old = await content(s.graph, "disk-bytes")
            if mode == "existing":
                await create_file(str(image), SIZE, image_format, replace=False)
            file = {"driver": "file", "filename": str(image)}
            job = await s.start(target={"driver": image_format, "file": file}, mode=mode)
            await s.guest.pwrite(3 * CLUSTER, b"new")
            await job.wait()
            assert job.error is None
            assert sorted(node.name for node in s.graph.nodes()) == ["disk", "disk-bytes", "target", "target-bytes"]
            check = {
                "driver": image_format,
                "node-name": "check",
                "read-only": True,
                "file": {**file, "read-only": True},
            }
            await s.graph.add_node(check)
            assert await content(s.graph, "check") == old

    run()


def test_target_created_is_not_overwritten(tmpfs: Path) -> None:
    image = tmpfs / "precious.raw"
    image.write_bytes(b"precious")

    @in_loop
    async def run() -> None:
        async with setup() as s:
            with pytest.raises(IOFailure, match="exists"):
                await s.start(target={"driver": "file", "filename": str(image)}, mode="create")
            await s.check_clean()

    run()
    assert image.read_bytes() == b"precious"


# Flush.


@in_loop
async def test_success_comes_after_the_flush_of_the_target() -> None:
    async with setup() as s:
        with trace.record() as events:
            job = await s.start(auto_finalize=False)
            await settle()
            assert job.state == "pending"
        flushed = [index for index, e in enumerate(events) if (e.op, e.node) == ("flush", "target")]
        written = [index for index, e in enumerate(events) if (e.op, e.node) == ("pwrite", "target")]
        assert flushed
        assert flushed[-1] > written[-1]
        job.finalize()
        await job.wait()


@in_loop
async def test_flush_of_the_target_failing_fails_the_job_and_takes_the_filter_out() -> None:
    with pytest.raises(IOFailure, match="flush"):  # noqa: PT012 - closing the graph tells it again
        async with setup(target=fails("flush_to_disk", "flush")) as s:
            job = await s.start()
            await job.wait()
            assert job.error is not None
            assert job.error.errno == errno.EIO
            assert s.kinds() == ["completed"]
            assert not s.graph.model.has(job.filter_name)
            assert s.guest.node.name == "disk"
            await s.guest.pwrite(0, b"still works")


@in_loop
async def test_flush_of_the_disk_failing_does_not_keep_the_filter_in() -> None:
    with pytest.raises(IOFailure, match="flush"):  # noqa: PT012 - as above
        async with setup(disk=fails("flush_to_disk", "flush")) as s:
            job = await s.start()
            await s.guest.pwrite(0, b"x")
            await job.wait()
            assert job.error is None
            assert s.guest.node.name == "disk"
            assert not s.graph.model.has(job.filter_name)


# Error policies.


@pytest.mark.parametrize("side", ["source", "target"])
def test_report_fails_the_job(side: str) -> None:
    @in_loop
    async def run() -> None:
        rules = (
            {"disk": fails("preadv", "read", once=True)} if side == "source" else {"target": fails("pwritev", "write")}
        )
        async with setup(**rules) as s:
            job = await s.start(**{f"on_{side}_error": "report"})
            await job.wait()
            assert job.error is not None
            assert job.error.node == ("disk" if side == "source" else "target")
            assert s.kinds() == ["error", "completed"]
            assert s.events[-3].error == str(job.error)
            assert [e.action for e in s.events if e.kind == "error"] == ["report"]
            await s.check_clean()

    run()


@in_loop
async def test_ignore_tries_again_with_pauses_that_double_up_to_a_limit() -> None:
    async with setup(target=fails("pwritev", "write")) as s:
        job = await s.start(on_target_error="ignore")
        await settle()
        assert s.sleeps[:9] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
        assert job.state == "running"
        job.cancel()
        await job.wait()
        await s.check_clean()


@in_loop
async def test_ignore_error_once_copies_everything() -> None:
    async with setup(target=fails("pwritev", "write", once=True), disk=fails("preadv", "read", once=True)) as s:
        job = await s.start(on_target_error="ignore", on_source_error="ignore")
        await job.wait()
        assert job.error is None
        assert await content(s.graph, "target-bytes") == s.old
        assert s.kinds() == ["error", "error", "completed"]


@in_loop
async def test_stop_pauses_with_a_status_and_resume_goes_on() -> None:
    async with setup(target=fails("pwritev", "write", once=True)) as s:
        job = await s.start(on_target_error="stop")
        await settle()
        assert (job.state, job.io_status) == ("paused", "failed")
        assert [e.action for e in s.events if e.kind == "error"] == ["stop"]
        await s.guest.pwrite(4 * CLUSTER, b"new")  # the guest goes on meanwhile
        job.resume()
        assert job.io_status == "ok"
        await job.wait()
        assert job.error is None
        assert await content(s.graph, "target-bytes") == s.old


@pytest.mark.parametrize("code, state", [("ENOSPC", "paused"), ("EIO", None)], ids=["full", "other"])
def test_enospc_stops_when_full_and_reports_everything_else(code: str, state: str | None) -> None:
    @in_loop
    async def run() -> None:
        async with setup(target=fails("pwritev", "write", errno=code, once=True)) as s:
            job = await s.start(on_target_error="enospc")
            await settle()
            if state:
                assert (job.state, job.io_status) == (state, "nospace")
                job.resume()
            await job.wait()
            assert (job.error is None) == (state is not None)
            await s.check_clean()

    run()


@in_loop
async def test_policy_is_that_of_the_side_that_failed() -> None:
    async with setup(disk=fails("preadv", "read", once=True)) as s:
        job = await s.start(on_source_error="stop", on_target_error="report")
        await settle()
        assert job.state == "paused"
        job.resume()
        await job.wait()
        assert job.error is None


@in_loop
async def test_block_status_of_the_source_failing_copies_it_as_data() -> None:
    async with setup(disk=fails("none", "block-status")) as s:
        job = await s.start()
        await s.guest.pwrite(7 * CLUSTER, b"new")
        await job.wait()
        assert job.error is None
        assert await content(s.graph, "target-bytes") == s.old


@in_loop
async def test_block_status_of_the_source_failing_fails_a_job_that_needs_to_know_the_layer() -> None:
    async with setup(disk=fails("none", "block-status")) as s:
        job = await s.start(sync="top")
        await job.wait()
        assert isinstance(job.error, IOFailure)
        await s.check_clean()


@in_loop
async def test_guest_copy_failing_fails_the_write_and_not_the_job() -> None:
    async with setup(target=fails("pwritev", "write", once=True)) as s:
        job = await s.start(sync="none")
        await settle()
        with pytest.raises(IOFailure):
            await s.guest.pwrite(0, b"new")
        assert job.state == "running"
        assert "error" not in s.kinds()
        job.cancel()
        await job.wait()


@in_loop
async def test_snapshot_broken_by_a_guest_write_fails_the_job() -> None:
    async with setup(target=fails("pwritev", "write", once=True)) as s:
        job = await s.start(sync="full", on_cbw_error="break-snapshot", auto_finalize=True, on_target_error="ignore")
        await s.guest.pwrite(7 * CLUSTER, b"new")
        await job.wait()
        assert (await content(s.graph, "disk-bytes"))[7 * CLUSTER : 7 * CLUSTER + 3] == b"new"
        assert job.error is not None or await content(s.graph, "target-bytes") == s.old
        await s.check_clean()


# Pause, speed, cancel.


@in_loop
async def test_pause_stops_copying_and_resume_finishes() -> None:
    async with setup() as s:
        s.target.break_at("pwritev", "first")
        job = await s.start()
        await s.target.wait_break("first")
        job.pause()
        s.target.resume("first")
        await settle()
        assert job.state == "paused"
        with trace.record() as events:
            await settle()
        assert not events
        assert 0 < job.progress.current < SIZE
        job.resume()
        await job.wait()
        assert await content(s.graph, "target-bytes") == s.old


@in_loop
async def test_job_that_ended_gives_its_memory_back_and_still_tells_what_was_left() -> None:
    async with setup() as s:
        s.target.break_at("pwritev", "first")
        job = await s.start()
        copy = driver_of(s.graph, job.filter_name, BackupTop).copy
        await s.target.wait_break("first")
        job.cancel()
        s.target.resume("first")
        await job.wait()
        assert (copy.bitmap.size, copy.done.size) == (0, 0)
        assert copy.left > 0
        assert job.progress.total == copy.bytes_copied + copy.left == SIZE


@in_loop
async def test_pause_and_resume_at_once_leaves_nothing_out() -> None:
    async with setup() as s:
        s.target.break_at("pwritev", "first")
        job = await s.start()
        await s.target.wait_break("first")
        job.pause()
        s.target.resume("first")
        for _ in range(3):
            await asyncio.sleep(0)
        job.resume()
        await job.wait()
        assert await content(s.graph, "target-bytes") == s.old


@in_loop
async def test_speed_limit_asks_before_each_copy_and_is_charged_after() -> None:
    async with setup() as s:
        job = await s.start(speed=10 * CLUSTER)
        assert job._loop is not None
        limit = job._loop.limit
        now = [0.0]
        limit._clock = lambda: now[0]
        waits: list[float] = []

        async def wait() -> None:
            while (seconds := limit.delay()) > 0:
                waits.append(seconds)
                now[0] += seconds
                await asyncio.sleep(0)

        limit.wait = wait  # type: ignore[method-assign]
        await job.wait()
        assert job.error is None
        assert now[0] == pytest.approx(0.1 * 8, abs=0.11)  # eight clusters, one a slice
        with pytest.raises(JobError):
            job.set_speed(1)


@in_loop
async def test_speed_limit_does_not_hold_up_guest_writes() -> None:
    async with setup() as s:
        job = await s.start(speed=1)
        assert job._loop is not None
        copy = driver_of(s.graph, job.filter_name, BackupTop).copy
        for cluster in range(SIZE // CLUSTER):
            await s.guest.pwrite(cluster * CLUSTER, b"new")
        assert copy.bytes_for_guest >= SIZE - 2 * CLUSTER  # the job may have had one, and wait to be charged for it
        job.set_speed(0)
        await job.wait()
        assert await content(s.graph, "target-bytes") == s.old


@in_loop
async def test_speed_changes_while_running() -> None:
    async with setup() as s:
        job = await s.start(speed=1)
        await settle()
        assert job.state == "running"
        with pytest.raises(JobError, match="negative"):
            job.set_speed(-1)
        job.set_speed(0)
        await job.wait()
        assert await content(s.graph, "target-bytes") == s.old


@pytest.mark.parametrize("when", ["at-once", "copying", "paused", "waiting-for-speed", "pending"])
def test_cancel_in_every_state_takes_the_filter_out(when: str) -> None:
    @in_loop
    async def run() -> None:
        async with setup() as s:
            if when == "copying":
                s.target.break_at("pwritev", "copy")
            speed = 1 if when == "waiting-for-speed" else 0
            job = await s.start(auto_finalize=when != "pending", speed=speed)
            if when == "copying":
                await s.target.wait_break("copy")
            elif when == "paused":
                job.pause()
                await settle()
                assert job.state == "paused"
            elif when != "at-once":
                await settle()
            assert job.state == {"paused": "paused", "pending": "pending"}.get(when, "running")
            job.cancel()
            await job.wait()
            assert s.kinds() == ["cancelled"]
            assert s.manager.jobs == {}
            await s.check_clean()

    run()


@in_loop
async def test_finalize_held_back_keeps_the_filter_until_then() -> None:
    async with setup() as s:
        job = await s.start(auto_finalize=False, auto_dismiss=False)
        await settle()
        assert job.state == "pending"
        assert s.graph.model.has(job.filter_name)
        await s.guest.pwrite(0, b"new")
        job.finalize()
        await job.wait()
        assert await content(s.graph, "target-bytes") == s.old
        assert job.state == "concluded"
        assert s.manager.jobs == {"disk": job}
        job.dismiss()
        assert s.manager.jobs == {}
        await s.check_clean()


@in_loop
async def test_progress_of_a_running_job_never_falls() -> None:
    async with setup() as s:
        job = await s.start(max_workers=3)
        seen = [0]
        while not job.ending:
            seen.append(job.progress.current)
            assert job.progress.current <= job.progress.total
            await asyncio.sleep(0)
        assert seen == sorted(seen)
        assert max(seen) == SIZE


# The graph around a job.
