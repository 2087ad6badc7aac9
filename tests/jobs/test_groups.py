# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Backups of several disks in one transaction, each for itself or all together.

guest a --> (top) --> a (inject-error) --> a-bytes      (top) --> ta (inject-error) --> ta-bytes      the same for b
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.backup import CLUSTER, content, fault, fill, memory, pattern, settle
from helpers.loop import driver_of, graph_of, in_loop

from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.errors import BlockGraphError, IOFailure, JobError
from blockgraph.filters.inject_error import InjectError
from blockgraph.graph.load import check_description, load
from blockgraph.jobs.backup import BackupJob
from blockgraph.jobs.group import JobGroup
from blockgraph.jobs.job import JobEvent
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions
from blockgraph.session import Session

SIZE = 4 * CLUSTER


class Setup:
    """Two disks, each with a target and a bitmap that marks cluster 1."""

    def __init__(self, graph: AsyncGraph, guests: dict[str, Backend]) -> None:
        self.graph = graph
        self.guests = guests
        self.manager = JobManager(graph)
        self.events: list[JobEvent] = []
        self.manager.listeners.append(self.events.append)

    async def start(self, mode: str = "grouped", **more: Any) -> list[BackupJob]:
        """Incremental backups of both; `a`, `b` in `more`: further members of one."""
        return await self.manager.backups([self.options(disk, mode, **more.get(disk, {})) for disk in "ab"])

    def options(self, disk: str, completion: str, **more: Any) -> BackupOptions:
        """An incremental backup."""
        members = {"device": disk, "target": f"t{disk}", "sync": "incremental", "bitmap": "b0", "max_workers": 1}
        return BackupOptions(completion_mode=completion, **members | more)

    def fault(self, node: str) -> InjectError:
        """A fault filter."""
        return driver_of(self.graph, node, InjectError)

    def marked(self) -> dict[str, list[tuple[int, int]]]:
        """What the bitmaps mark."""
        return {disk: list(self.graph.bitmap(disk, "b0").contents().dirty_extents()) for disk in "ab"}

    def kinds(self, job: str) -> list[str]:
        """How a job ended."""
        return [event.kind for event in self.events if event.job == job and event.kind in ("completed", "cancelled")]

    def check_gone(self) -> None:
        """No filter, no job."""
        assert [guest.node.name for guest in self.guests.values()] == ["a", "b"]
        assert self.manager.jobs == {}


OLD = {"a": [(CLUSTER, CLUSTER)], "b": [(CLUSTER, CLUSTER)]}
NONE: dict[str, list[tuple[int, int]]] = {"a": [], "b": []}


@asynccontextmanager
async def setup(**faults: dict[str, Any]) -> AsyncIterator[Setup]:
    """`faults`: members of the fault filters by name."""
    nodes = [
        node
        for name in ("a", "ta", "b", "tb")
        for node in (memory(f"{name}-bytes", SIZE), fault(name, f"{name}-bytes", **faults.get(name, {})))
    ]
    async with graph_of(*nodes) as graph:
        guests = {disk: await graph.backend(disk, writable=True) for disk in "ab"}
        for disk, guest in guests.items():
            await fill(graph, f"{disk}-bytes", pattern(SIZE, ord(disk)))
            await graph.add_bitmap(disk, "b0")
            await guest.pwrite(CLUSTER, b"changed")
        yield Setup(graph, guests)


def fails(event: str, iotype: str) -> dict[str, Any]:
    """A rule."""
    return {"inject-error": [{"event": event, "iotype": iotype, "errno": "EIO", "once": True}]}


async def until(job: BackupJob, state: str) -> None:
    """Let everything go on until the job is in that state."""
    for _ in range(100):
        if job.state == state:
            return
        await settle()
    raise AssertionError(f"{job.state}, never {state}")


@pytest.mark.parametrize("mode", ["individual", "grouped"])
def test_success_of_all_clears_all_bitmaps(mode: str) -> None:
    @in_loop
    async def run() -> None:
        async with setup() as s:
            jobs = await s.start(mode)
            for job in jobs:
                await job.wait()
                assert job.error is None
            assert s.marked() == NONE
            assert (await content(s.graph, "tb-bytes"))[CLUSTER : CLUSTER + 7] == b"changed"
            s.check_gone()

    run()


FAILURES = {
    "source": {"b": fails("preadv", "read")},
    "target": {"tb": fails("pwritev", "write")},
    "flush": {"tb": fails("flush_to_disk", "flush")},
    "cancel-running": {},
    "cancel-waiting": {},
    "cancel-pending": {},
}


@pytest.mark.parametrize("mode", ["individual", "grouped"])
@pytest.mark.parametrize("failure", FAILURES)
def test_failure_of_one_leaves_all_bitmaps_only_in_a_group(mode: str, failure: str) -> None:
    @in_loop
    async def run() -> None:
        async with setup(**FAILURES[failure]) as s:
            s.fault("ta").break_at("pwritev", "held")
            if failure == "cancel-running":
                s.fault("tb").break_at("pwritev", "held")
            a, b = await s.start(mode, b={"auto_finalize": failure != "cancel-pending"})
            await s.fault("ta").wait_break("held")
            await s.guests["a"].pwrite(0, b"new")
            if failure == "cancel-running":
                await s.fault("tb").wait_break("held")
                b.cancel()
            elif failure == "cancel-waiting" and mode == "grouped":
                await until(b, "waiting")
                b.cancel()
            elif failure == "cancel-waiting":
                await b.wait()
            s.fault("ta").resume("held")
            if failure == "cancel-pending":
                await until(b, "pending")
                b.cancel()
            await a.wait()
            await b.wait()
            succeeded = failure == "cancel-waiting" and mode == "individual"
            assert b.failed != succeeded
            assert a.failed == (mode == "grouped")
            marked = s.marked()
            assert marked["b"] == ([] if succeeded else OLD["b"])
            if mode == "grouped":
                assert marked["a"] == [(0, 2 * CLUSTER)]
                assert s.kinds("a") == ["cancelled"]
            else:
                assert marked["a"] == [(0, CLUSTER)]
                assert s.kinds("a") == ["completed"]
            s.check_gone()

    run()


@in_loop
async def test_one_that_waits_for_finalize_holds_all_and_any_finalizes_all() -> None:
    async with setup() as s:
        a, b = await s.start(b={"auto_finalize": False})
        await until(a, "pending")
        await until(b, "pending")
        assert s.marked() == OLD
        assert s.graph.model.has(a.filter_name)
        a.finalize()
        await b.wait()
        await a.wait()
        assert s.marked() == NONE
        s.check_gone()


@in_loop
async def test_failure_while_concluding_clears_nothing() -> None:
    """A filter that can not be taken out: somebody reads the kept image through it."""
    async with setup() as s:
        a, b = await s.start(b={"auto_finalize": False})
        await until(b, "pending")
        await s.graph.add_node({"driver": "snapshot-access", "node-name": "then", "file": b.filter_name})
        b.finalize()
        await a.wait()
        await b.wait()
        assert a.error is None
        assert b.error is not None
        assert s.marked() == OLD
        await s.graph.remove_node("then")
        await s.graph.remove_filter(b.filter_name)
        s.check_gone()


@in_loop
async def test_always_in_a_group_that_fails_keeps_what_was_not_copied() -> None:
    async with setup(tb=fails("pwritev", "write")) as s:
        always = {"sync": "bitmap", "bitmap_mode": "always"}
        a, b = await s.start(a=always, b=always)
        await a.wait()
        await b.wait()
        assert a.cancelled
        assert s.marked()["b"] == OLD["b"]
        copied = (await content(s.graph, "ta-bytes"))[CLUSTER : CLUSTER + 7] == b"changed"
        assert s.marked()["a"] == ([] if copied else OLD["a"])


# Starting.


@in_loop
async def test_points_in_time_of_several_disks_are_one() -> None:
    """A guest writes a number to one disk, then the same to the other: no backup has the second without the first."""
    async with setup() as s:
        going = True

        async def count() -> None:
            number = 0
            while going:
                number += 1
                for disk in "ab":
                    await s.guests[disk].pwrite(0, number.to_bytes(8, "big"))
                await asyncio.sleep(0)

        counting = asyncio.ensure_future(count())
        for _ in range(20):
            for _ in range(3):
                await asyncio.sleep(0)
            full = {"sync": "full", "bitmap": None}
            for job in await s.start("individual", a=full, b=full):
                await job.wait()
            first, second = [int.from_bytes((await content(s.graph, f"t{disk}-bytes"))[:8], "big") for disk in "ab"]
            assert first - second in (0, 1)
            assert second > 0
        going = False
        await counting


@in_loop
async def test_one_that_can_not_start_keeps_all_from_starting(tmp_path: Path) -> None:
    async with setup() as s:
        image = tmp_path / "new.raw"
        made = {"target": {"driver": "file", "filename": str(image)}, "mode": "create"}
        for wrong in ({"bitmap": "nowhere"}, {"target": "nowhere"}, {"device": "a"}, {"job_id": "a"}, {"bitmap": None}):
            with pytest.raises(BlockGraphError):
                await s.start(a=made, b=wrong)
            assert not image.exists()
            assert s.marked() == OLD
            assert all(s.graph.bitmap(disk, "b0").holders == [] for disk in "ab")
            s.check_gone()


@in_loop
async def test_start_cancelled_starts_none() -> None:
    async with setup() as s:
        s.fault("b").break_at("pwritev", "held")
        write = asyncio.ensure_future(s.guests["b"].pwrite(0, b"held"))
        await s.fault("b").wait_break("held")
        start = asyncio.ensure_future(s.start())
        await settle()
        start.cancel()
        await asyncio.wait({start})
        assert start.cancelled()
        s.fault("b").resume("held")
        await write
        s.check_gone()
        assert s.marked()["a"] == OLD["a"]


@in_loop
async def test_what_can_not_be_grouped_is_refused() -> None:
    async with setup() as s:
        with pytest.raises(JobError, match="ends by being cancelled, and would cancel the rest"):
            await s.start(b={"sync": "none"})
        with pytest.raises(JobError, match="different completion modes"):
            await s.manager.backups([s.options("a", "grouped"), s.options("b", "individual")])
        s.check_gone()
        group = JobGroup()
        async with s.graph.transaction() as change:
            job = await s.manager.add(change, s.options("a", "grouped", auto_finalize=False), group)
        with pytest.raises(JobError, match="runs already"):
            async with s.graph.transaction() as change:
                await s.manager.add(change, s.options("b", "grouped"), group)
        assert list(s.manager.jobs) == ["a"]
        await until(job, "pending")
        job.finalize()
        await job.wait()
        s.check_gone()


# Graph files.


def described(*jobs: dict[str, Any]) -> dict[str, Any]:
    """A description with two disks and these jobs."""
    nodes = [memory(name, SIZE) for name in ("a", "ta", "b", "tb")]
    both = zip("ab", jobs, strict=True)
    each = {"type": "backup", "sync": "full"}
    return {"nodes": nodes, "jobs": [{**each, "device": disk, "target": f"t{disk}", **job} for disk, job in both]}


GROUPED = {"group": "g", "completion-mode": "grouped"}


@pytest.mark.parametrize(
    "jobs, message",
    [
        (
            ({"completion-mode": "grouped"}, {}),
            "jobs[0].completion-mode: completion-mode 'grouped' needs member 'group'",
        ),
        (
            (GROUPED, {"group": "g"}),
            "jobs[1].completion-mode: group 'g' has completion-mode 'grouped' in jobs[0] and 'individual' here",
        ),
        (
            (
                {"group": "g", "completion-mode": "grouped"},
                {"group": "g", "completion-mode": "grouped", "sync": "none"},
            ),
            "jobs[1].completion-mode: with sync 'none' a job ends by being cancelled",
        ),
    ],
    ids=["no-group", "differ", "none"],
)
def test_group_that_makes_no_sense_is_refused(jobs: tuple[dict[str, Any], ...], message: str) -> None:
    (problem,) = check_description(described(*jobs))
    assert str(problem).startswith(message)


@in_loop
async def test_session_starts_the_jobs_of_a_group_in_one_transaction() -> None:
    grouped = {"group": "nightly", "completion-mode": "grouped", "auto-finalize": False, "speed": 1}
    async with await Session.start(load(described(grouped, grouped))) as session:
        a, b = session.jobs
        assert a.group is b.group
        assert a.group.jobs == [a, b]
        a.cancel()
        await session.wait_jobs()
        assert b.cancelled
    alone = {"group": "nightly"}
    async with await Session.start(load(described(alone, alone))) as session:
        await session.wait_jobs()
        assert [job.error for job in session.jobs] == [None, None]
        assert session.jobs[0].group is not session.jobs[1].group


@in_loop
async def test_session_whose_group_can_not_start_starts_nothing() -> None:
    members = {"group": "g", "sync": "incremental", "bitmap": "not there"}
    with pytest.raises(BlockGraphError, match="no bitmap 'not there'"):
        await Session.start(load(described({"group": "g"}, members)))


@in_loop
async def test_disk_that_fails_to_flush_at_the_end_does_not_count_as_failure_of_the_group() -> None:
    with pytest.raises(IOFailure, match="flush"):  # noqa: PT012 - closing the graph tells it again
        async with setup(b={"inject-error": [{"event": "flush_to_disk", "iotype": "flush", "errno": "EIO"}]}) as s:
            for job in await s.start():
                await job.wait()
                assert job.error is None
            assert s.marked() == NONE
