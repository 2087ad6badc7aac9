# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Backups with dirty bitmaps: what each sync copies, and what the bitmap holds afterwards, whatever happens.

guest --> (top) --file----> disk (inject-error, or a file for native writes); bitmap b0
           `----target---> target (inject-error) -> target-bytes

Clusters 1, 2, 5 and 6 of 8 are marked when a job starts, and the bitmap's granules are clusters, unless a test says
otherwise.
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
from blockgraph.bitmaps.actions import AddBitmap, BitmapName, TakeView
from blockgraph.create import create_file
from blockgraph.errors import BlockGraphError, GraphError, IOFailure, JobError, NodeInUse, OptionError
from blockgraph.filters.inject_error import InjectError
from blockgraph.graph.action import Abort
from blockgraph.graph.load import check_description
from blockgraph.jobs.backup import BackupJob
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions
from blockgraph.options import BitmapRef

SIZE = 8 * CLUSTER
OLD = {1, 2, 5, 6}


class Setup:
    """A running graph and its jobs.

    Attributes:
        old: the disk's bytes when the bitmap had OLD.
        guest: a writable root over the disk.
    """

    def __init__(self, graph: AsyncGraph, guest: Backend, old: bytes) -> None:
        self.graph = graph
        self.guest = guest
        self.old = old
        self.manager = JobManager(graph)

    def options(self, sync: str, mode: str | None = None, **more: Any) -> BackupOptions:
        """A backup of the disk with the bitmap, a cluster at a time."""
        options = {"device": "disk", "target": "target", "max_chunk": CLUSTER, "max_workers": 1, "bitmap": "b0"}
        return BackupOptions(sync=sync, **options | {"bitmap_mode": mode} | more)

    async def start(self, sync: str, mode: str | None = None, **more: Any) -> BackupJob:
        """Start it."""
        return await self.manager.backup(self.options(sync, mode, **more))

    @property
    def target(self) -> InjectError:
        """The fault filter of the target."""
        return driver_of(self.graph, "target", InjectError)

    def marked(self) -> set[int]:
        """Numbers of the clusters that the bitmap marks."""
        return clusters(self.graph, "b0")

    async def copied(self) -> set[int]:
        """Clusters that the target has from the disk as it was; the others are as they were in the target."""
        target = await content(self.graph, "target-bytes")
        for number in range(8):
            part = target[number * CLUSTER : (number + 1) * CLUSTER]
            assert part in (self.old[number * CLUSTER : (number + 1) * CLUSTER], b"?" * CLUSTER)
        return {number for number in range(8) if target[number * CLUSTER] != ord("?")}


def clusters(graph: AsyncGraph, name: str) -> set[int]:
    """Numbers of the clusters that a bitmap of the disk marks."""
    extents = graph.bitmap("disk", name).contents().dirty_extents()
    return {number for at, length in extents for number in range(at // CLUSTER, -(-(at + length) // CLUSTER))}


@asynccontextmanager
async def setup(disk: dict[str, Any] | None = None, **target: Any) -> AsyncIterator[Setup]:
    """`target`: members of its fault filter. No cluster of the disk begins with a question mark."""
    nodes = [memory("target-bytes", SIZE), fault("target", "target-bytes", **target)]
    nodes += [disk] if disk is not None else [memory("disk-bytes", SIZE), fault("disk", "disk-bytes")]
    async with graph_of(*nodes) as graph:
        data = bytearray(pattern(SIZE))
        data[::CLUSTER] = b"d" * 8
        await fill(graph, "disk", bytes(data))
        await fill(graph, "target-bytes", b"?" * SIZE)
        guest = await graph.backend("disk", writable=True)
        guest.use_map()
        await graph.add_bitmap("disk", "b0", granularity=CLUSTER)
        for number in OLD:
            data[number * CLUSTER + 1] = number
            await guest.pwrite(number * CLUSTER + 1, bytes([number]))
        yield Setup(graph, guest, bytes(data))


def fails(event: str, iotype: str, cluster: int | None = None) -> dict[str, Any]:
    """Rules that fail requests, those to a cluster only or all."""
    sector = {} if cluster is None else {"sector": cluster * CLUSTER // 512}
    return {"inject-error": [{"event": event, "iotype": iotype, "errno": "EIO", **sector}]}


# The end: semantics of every mode.

WRITTEN = {4, 6}

#: How a job ends -> clusters that are then not copied, if the guest writes none; None: it succeeds.
ENDS: dict[str, set[int] | None] = {
    "success": None,
    "source-error": {5, 6},
    "target-error": {5, 6},
    "flush-error": OLD,  # nothing is safe
    "cancel-early": {1, 2, 5, 6},
    "cancel-amid": {2, 5, 6},
    "cancel-late": set(),
    "snapshot-lost": {2, 5, 6},
}

#: A disk with a fault filter sees every request: none is native. A snapshot is lost by a guest's write.
CELLS = [
    (mode, end, writes)
    for mode in ("on-success", "never", "always")
    for end in ENDS
    for writes in ("none", "python", "native")
    if (end, writes) not in (("source-error", "native"), ("snapshot-lost", "none"))
]


@pytest.mark.parametrize("mode, end, writes", CELLS)
def test_bitmap_at_the_end_is_as_its_mode_says(tmpfs: Path, mode: str, end: str, writes: str) -> None:
    disk = fault("disk", memory("disk-bytes", SIZE))
    if writes == "native":
        (tmpfs / "disk").write_bytes(bytes(SIZE))
        disk = {"node-name": "disk", "driver": "file", "filename": str(tmpfs / "disk")}
    elif end == "source-error":
        disk |= fails("preadv", "read", 5)
    target = {
        "target-error": fails("pwritev", "write", 5),
        "flush-error": fails("flush_to_disk", "flush"),
        "snapshot-lost": fails("pwritev", "write", 6),
    }.get(end, {})

    @in_loop
    async def run() -> None:
        async with setup(disk, **target) as s:
            s.target.break_at("pwritev", "held")
            more = {"on_cbw_error": "break-snapshot"} if end == "snapshot-lost" else {}
            job = await s.start("bitmap", mode, auto_finalize=end != "cancel-late", **more)
            await s.target.wait_break("held")  # the first copy, of cluster 1
            new = set() if writes == "none" else WRITTEN
            for number in new:
                await write(s.guest, number, native=writes == "native" and number == 4)
            if end == "cancel-early":
                job.cancel()
            elif end == "cancel-amid":
                s.target.break_at("pwritev", "second", offset=2 * CLUSTER)
                s.target.resume("held")
                await s.target.wait_break("second")
                job.cancel()
                s.target.resume("second")
            if end not in ("cancel-early", "cancel-amid"):
                s.target.resume("held")
            if end == "cancel-late":
                while job.state != "pending":
                    await settle()
                assert s.marked() == OLD | new  # before the end nothing is cleared
                job.cancel()
            await job.wait()
            left = ENDS[end]
            assert job.failed == (left is not None)
            if left is None:
                assert s.marked() == (OLD | new if mode == "never" else new)
                assert await s.copied() == OLD
            elif mode == "always":
                assert s.marked() == new | left  # 6 is in `new`, if the guest's write has copied it
            else:
                assert s.marked() == OLD | new
            assert s.graph.bitmap("disk", "b0").holders == []
            await write(s.guest, 3, native=False)
            assert s.marked() >= {3}

    if end == "flush-error":
        with pytest.raises(IOFailure, match="flush"):  # closing the graph tells it again
            run()
    else:
        run()


async def write(guest: Backend, number: int, *, native: bool) -> None:
    """Change a cluster."""
    if native:
        await guest.pread(number * CLUSTER, 1)
        assert guest.map is not None
        assert guest.map.extents.pwrite(number * CLUSTER + 9, b"native")
    else:
        await guest.pwrite(number * CLUSTER + 9, b"python")


@in_loop
async def test_finalize_held_back_holds_back_the_bitmap() -> None:
    async with setup() as s:
        job = await s.start("incremental", auto_finalize=False)
        while job.state != "pending":
            await settle()
        await s.guest.pwrite(0, b"new")
        assert s.marked() == OLD | {0}
        assert s.graph.bitmap("disk", "b0").holders == ["job 'disk'"]
        job.finalize()
        await job.wait()
        assert s.marked() == {0}


# What is copied.


@pytest.mark.parametrize(
    "sync, mode, use, copied, marked",
    [
        ("bitmap", "on-success", None, OLD, set()),
        ("bitmap", "never", "reduce", OLD, OLD),
        ("bitmap", "always", None, OLD, set()),
        ("incremental", None, None, OLD, set()),
        ("incremental", "on-success", "reduce", OLD, set()),
        ("differential", None, None, OLD, OLD),
        ("differential", "never", None, OLD, OLD),
        ("full", "on-success", None, set(range(8)), set()),
        ("full", "always", "reset", set(range(8)), set()),
        ("full", "on-success", "reduce", OLD, set()),
        ("full", "never", "reduce", OLD, OLD),
        ("full", "always", "reduce", OLD, set()),
    ],
)
def test_legal_combination_copies_what_it_says(
    sync: str, mode: str | None, use: str | None, copied: set[int], marked: set[int]
) -> None:
    @in_loop
    async def run() -> None:
        async with setup() as s:
            job = await s.start(sync, mode, bitmap_use=use)
            await job.wait()
            assert job.error is None
            assert await s.copied() == copied
            assert s.marked() == marked

    run()


@pytest.mark.parametrize("mode, marked", [(None, OLD | {0}), ("never", OLD | {0}), ("always", {0, 1, 2, 6})])
def test_none_with_a_bitmap_keeps_what_is_overwritten_and_marked(mode: str | None, marked: set[int]) -> None:
    @in_loop
    async def run() -> None:
        async with setup() as s:
            job = await s.start("none", mode)
            await settle()
            await s.guest.pwrite(0, b"n")
            await s.guest.pwrite(5 * CLUSTER, b"n")
            assert await s.copied() == {5}
            job.cancel()
            await job.wait()
            assert s.marked() == marked | {5}  # overwritten after the start

    run()


def test_top_with_a_bitmap_copies_what_both_have(tmpfs: Path) -> None:
    @in_loop
    async def run() -> None:
        await create_file(str(tmpfs / "top.qcow2"), SIZE, "qcow2", replace=False)
        file = {"driver": "file", "filename": str(tmpfs / "top.qcow2")}
        base = memory("base", SIZE)
        async with setup({"driver": "qcow2", "node-name": "disk", "file": file, "backing": base}) as s:
            await s.guest.discard(0, SIZE)  # what is discarded the top layer still has, as zeroes
            await s.guest.write_zeroes(0, SIZE)
            s.old = bytes(SIZE)
            await s.graph.clear_bitmap("disk", "b0")
            await s.guest.pwrite(5 * CLUSTER, b"\0")
            job = await s.start("top", "on-success", bitmap_use="reduce")
            await job.wait()
            assert await s.copied() == {5}
            job = await s.start("top", "on-success")
            await job.wait()
            assert await s.copied() == set(range(8))

    run()


@pytest.mark.parametrize("granularity", [4096, CLUSTER, 4 * CLUSTER])
@pytest.mark.parametrize("backing", [True, False], ids=["backing", "alone"])
def test_target_with_large_clusters_has_whole_ones(tmpfs: Path, granularity: int, backing: bool) -> None:
    """Without a backing node the target's clusters are written whole; with one it fills them itself."""

    @in_loop
    async def run() -> None:
        async with setup() as s:
            await s.graph.add_bitmap("disk", "other", granularity=granularity)
            await s.guest.pwrite(5 * CLUSTER + 4096, b"x" * 4096)
            await s.guest.write_zeroes(6 * CLUSTER, CLUSTER)  # zeroes are copied as zeroes
            old = await content(s.graph, "disk")
            target = str(tmpfs / "target.qcow2")
            await create_file(target, SIZE, "qcow2", replace=False, cluster_size=4 * CLUSTER)
            file = {"driver": "file", "filename": target}
            image: dict[str, Any] = {"driver": "qcow2", "node-name": "t", "file": file}
            await s.graph.add_node(image | ({"backing": "target-bytes"} if backing else {}))
            job = await s.start("incremental", target="t", bitmap="other")
            await job.wait()
            assert job.error is None
            kept = await content(s.graph, "t")
            first, end = (4, 8) if granularity > CLUSTER or not backing else (5, 7)
            rest = b"?" if backing else b"\0"
            expected = rest * first * CLUSTER + old[first * CLUSTER : end * CLUSTER] + rest * (8 - end) * CLUSTER
            assert kept == expected

    run()


@in_loop
async def test_bitmap_below_a_filter_and_of_another_node_are_found() -> None:
    async with setup() as s:
        await s.graph.insert_filter({"driver": "delay", "node-name": "slow", "file": "disk"}, above="disk")
        job = await s.start("differential", device="slow")
        await job.wait()
        assert await s.copied() == OLD
        await s.graph.add_bitmap("disk-bytes", "below")
        await s.guest.pwrite(0, b"n")
        job = await s.start("incremental", device="slow", bitmap=BitmapRef(node="disk-bytes", name="below"))
        await job.wait()
        assert s.graph.bitmap("disk-bytes", "below").count() == 0
        assert (await content(s.graph, "target-bytes"))[:1] == b"n"


@in_loop
async def test_view_is_of_the_instant_at_which_the_filter_is_inserted() -> None:
    """A write that is in flight when the job starts is in both, one that comes later in neither."""
    async with setup() as s:
        disk = driver_of(s.graph, "disk", InjectError)
        disk.break_at("pwritev_done", "write")
        before = asyncio.ensure_future(s.guest.pwrite(0, b"before"))
        await disk.wait_break("write")
        starting = asyncio.ensure_future(s.start("incremental", auto_finalize=False))
        await settle()
        after = asyncio.ensure_future(s.guest.pwrite(7 * CLUSTER, b"after"))
        await settle()
        assert not starting.done()
        disk.resume("write")
        await before
        job = await starting
        await after
        while job.state != "pending":
            await settle()
        job.finalize()
        await job.wait()
        target = await content(s.graph, "target-bytes")
        assert target[:6] == b"before"
        assert target[7 * CLUSTER :] == b"?" * CLUSTER
        assert s.marked() == {7}


# Refusals.

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "bitmap-without": ({"sync": "bitmap"}, "bitmap", "member 'bitmap' is missing"),
    "incremental-without": ({"sync": "incremental"}, "bitmap", "member 'bitmap' is missing"),
    "differential-without": ({"sync": "differential"}, "bitmap", "member 'bitmap' is missing"),
    "mode-without": ({"sync": "full", "bitmap-mode": "never"}, "bitmap-mode", "no effect without"),
    "use-without": ({"sync": "full", "bitmap-use": "reduce"}, "bitmap-use", "no effect without"),
    "bitmap-no-mode": ({"sync": "bitmap", "bitmap": "b0"}, "bitmap-mode", "needs member 'bitmap-mode'"),
    "full-no-mode": ({"sync": "full", "bitmap": "b0"}, "bitmap-mode", "needs member 'bitmap-mode'"),
    "top-no-mode": ({"sync": "top", "bitmap": "b0"}, "bitmap-mode", "needs member 'bitmap-mode'"),
    "full-never": ({"sync": "full", "bitmap": "b0", "bitmap-mode": "never"}, "bitmap-mode", "would have no effect"),
    "incremental-never": (
        {"sync": "incremental", "bitmap": "b0", "bitmap-mode": "never"},
        "bitmap-mode",
        "sync 'incremental' is sync 'bitmap' with bitmap-mode 'on-success'; leave 'bitmap-mode' out",
    ),
    "differential-always": (
        {"sync": "differential", "bitmap": "b0", "bitmap-mode": "always"},
        "bitmap-mode",
        "with bitmap-mode 'never'",
    ),
    "none-on-success": ({"sync": "none", "bitmap": "b0", "bitmap-mode": "on-success"}, "bitmap-mode", "is no success"),
    "none-reset": ({"sync": "none", "bitmap": "b0", "bitmap-use": "reset"}, "bitmap-use", "copies no more than"),
    "bitmap-reset": (
        {"sync": "bitmap", "bitmap": "b0", "bitmap-mode": "never", "bitmap-use": "reset"},
        "bitmap-use",
        "copies no more than",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_illegal_combination_is_refused_in_a_description_and_at_the_start(name: str) -> None:
    members, path, message = REFUSED[name]
    nodes = [memory("disk", SIZE), memory("target", SIZE)]
    job = {"type": "backup", "device": "disk", "target": "target", **members}
    bitmaps = [{"node": "disk", "name": job["bitmap"]}] if "bitmap" in job else []
    (problem,) = check_description({"nodes": nodes, "bitmaps": bitmaps, "jobs": [job]})
    assert str(problem).startswith(f"jobs[0].{path}: ")
    assert message in str(problem)

    @in_loop
    async def run() -> None:
        async with setup() as s:
            with pytest.raises(OptionError, match=message) as refused:
                await s.manager.backup(
                    BackupOptions(
                        device="disk", target="target", **{k.replace("-", "_"): v for k, v in members.items()}
                    )
                )
            assert refused.value.path == path
            await check_unchanged(s)

    run()


async def check_unchanged(s: Setup, marked: set[int] = OLD) -> None:
    """No job, no filter, no holder."""
    assert s.manager.jobs == {}
    assert s.guest.node.name == "disk"
    assert s.graph.bitmap("disk", "b0").holders == []
    assert s.marked() == marked
    await s.guest.pwrite(0, b"still works")
    assert s.marked() == marked | {0}


@pytest.mark.parametrize(
    "name, message",
    [
        ("b9", r"no bitmap 'b9' \(there are: 'b0', 'broken'\)"),
        ("broken", "inconsistent.*full backup"),
        (BitmapRef(node="target", name="b0"), r"no bitmap 'b0' \(there are: none\)"),
        (BitmapRef(node="small", name="s"), "covers 65536 bytes but the disk has 524288"),
        (BitmapRef(node="nowhere", name="s"), "nowhere"),
    ],
    ids=["missing", "inconsistent", "other-node", "size", "no-node"],
)
def test_bitmap_that_can_not_be_used_is_refused(name: Any, message: str) -> None:
    @in_loop
    async def run() -> None:
        async with setup() as s:
            await s.graph.add_bitmap("disk", "broken")
            s.graph.bitmap("disk", "broken").inconsistent = True
            await s.graph.add_node(memory("small", CLUSTER))
            await s.graph.add_bitmap("small", "s")
            with pytest.raises(BlockGraphError, match=message):
                await s.start("incremental", bitmap=name)
            await check_unchanged(s)

    run()


@in_loop
async def test_bitmap_with_a_backup_top_that_was_there_is_refused() -> None:
    async with setup() as s:
        await s.graph.insert_filter(
            {"driver": "backup-top", "node-name": "top", "file": "disk", "target": "target"}, above="disk"
        )
        with pytest.raises(GraphError, match="its point in time is over"):
            await s.start("incremental", device="top", target=None)
        assert s.marked() == OLD
    nodes = [memory("disk", SIZE), memory("target", SIZE)]
    nodes.append({"driver": "backup-top", "node-name": "top", "file": "disk", "target": "target"})
    job = {"type": "backup", "device": "top", "sync": "incremental", "bitmap": "b0"}
    bitmaps = [{"node": "disk", "name": "b0"}]
    (problem,) = check_description({"nodes": nodes, "bitmaps": bitmaps, "jobs": [job]})
    assert str(problem).startswith("jobs[0].bitmap: a bitmap can not be used with a device that is a backup-top")


def test_description_with_a_bitmap_of_a_wrong_node_is_refused() -> None:
    nodes = [memory("disk", SIZE), memory("target", SIZE), memory("small", CLUSTER)]
    job = {"type": "backup", "device": "disk", "target": "target", "sync": "incremental"}

    def told(node: str) -> str:
        jobs = [{**job, "bitmap": {"node": node, "name": "b0"}}]
        return str(check_description({"nodes": nodes, "jobs": jobs})[0])

    assert told("dis") == (
        "jobs[0].bitmap.node: job 'disk' refers to node 'dis', which does not exist; did you mean 'disk'?"
    )
    assert told("small").startswith("jobs[0].bitmap: the bitmap's node has 65536 bytes but the device has 524288")


@pytest.mark.parametrize("why", ["abort", "filter-name", "same-node"])
def test_start_that_fails_leaves_the_bitmap_as_it_was(why: str) -> None:
    @in_loop
    async def run() -> None:
        async with setup() as s:
            more = {"filter-name": {"filter_node_name": "target"}, "same-node": {"target": "disk"}}.get(why, {})
            with pytest.raises(BlockGraphError):
                await started_then_aborted(s, s.options("incremental", **more))
            await check_unchanged(s)

    run()


async def started_then_aborted(s: Setup, options: BackupOptions) -> None:
    """One transaction."""
    async with s.graph.transaction() as change:
        await s.manager.add(change, options)
        change.act(TakeView(BitmapName("disk", "b0"), "test"))
        change.act(Abort())


# Sharing.


@in_loop
async def test_bitmap_of_a_running_job_can_be_used_but_not_removed() -> None:
    async with setup() as s:
        job = await s.start("incremental", auto_finalize=False)
        await s.graph.add_bitmap("disk", "sum", granularity=CLUSTER)
        await s.graph.merge_bitmaps("disk", "sum", [("disk", "b0")])
        assert clusters(s.graph, "sum") == OLD
        with pytest.raises(NodeInUse, match="bitmap 'b0' is in use by job 'disk'"):
            await s.graph.remove_bitmap("disk", "b0")
        with pytest.raises(JobError, match="already"):
            await s.start("incremental")
        while job.state != "pending":
            await settle()
        job.finalize()
        await job.wait()
        await s.graph.remove_bitmap("disk", "b0")


@in_loop
async def test_bitmap_added_in_the_transaction_of_a_full_backup_has_what_comes_after() -> None:
    async with setup() as s:
        async with s.graph.transaction() as change:
            change.act(AddBitmap(BitmapName("disk", "next"), granularity=CLUSTER))
            job = await s.manager.add(change, BackupOptions(device="disk", target="target", sync="full"))
        await s.guest.pwrite(3 * CLUSTER, b"new")
        await job.wait()
        assert await s.copied() == set(range(8))
        assert clusters(s.graph, "next") == {3}
