# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Native guest writes under backup-top: they copy first, once, and see to everything that Python would.

guest ==extent map==> disk (raw) -> file
  `--> top --file--> disk,  --target--> target (raw) -> file
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from helpers.backup import CLUSTER, backup_top, top_over
from helpers.backup_files import SIZE, Setup, files, image
from helpers.loop import graph_of, in_loop
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgraph import trace
from blockgraph.create import create_file
from blockgraph.errors import SnapshotBroken
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions
from blockgraph.native import MapExtent


def check(condition: Callable[[Setup], Any], tmpfs: Path, **more: Any) -> None:
    """Run a test's body with the maps filled."""

    @in_loop
    async def run() -> None:
        async with files(tmpfs, **more) as s:
            await s.learn()
            await condition(s)

    run()


def test_native_write_copies_first_and_only_once(tmpfs: Path) -> None:
    async def body(s: Setup) -> None:
        with trace.record() as events:
            for offset in (3 * CLUSTER + 7, 3 * CLUSTER + 7, 5 * CLUSTER - 1, SIZE - 2):
                assert s.extents.pwrite(offset, b"NN")
        assert events == []
        assert s.extents.stats().first_writes == 3
        stats = s.copy.copier.stats()
        assert stats.copied == stats.moved == 3 * CLUSTER + 512
        assert stats.refused == 0
        # With the one that a fault had copied natively.
        assert s.copy.bytes_for_guest == s.copy.bytes_copied == s.copy.bytes_moved == 4 * CLUSTER + 512
        kept, live = s.kept(), s.live()
        for at in range(0, SIZE, CLUSTER):
            copied = at // CLUSTER in (0, 3, 4, 5, 16)
            assert kept[at : at + CLUSTER] == (s.old[at : at + CLUSTER] if copied else bytes(min(CLUSTER, SIZE - at)))
        assert live[SIZE - 2 :] == live[5 * CLUSTER - 1 : 5 * CLUSTER + 1] == b"NN"

    check(body, tmpfs)


def test_new_qcow2_target_is_left_to_python_only_until_it_has_a_table(tmpfs: Path) -> None:
    @in_loop
    async def run() -> None:
        await create_file(str(tmpfs / "kept"), SIZE, "qcow2", replace=True)
        async with files(tmpfs, {**image(tmpfs, "kept", "qcow2"), "node-name": "target"}) as s:
            for number in range(SIZE // CLUSTER):
                if not s.extents.pwrite(number * CLUSTER, b"NN"):
                    await s.guest.pwrite(number * CLUSTER, b"NN")
            # The very first makes the L2 table, a second one finds it; native ones come after that.
            assert s.copy.copier.stats().copied >= (SIZE // CLUSTER - 2) * CLUSTER
            kept = await s.graph.backend("target")
            assert await kept.pread(0, SIZE // CLUSTER * CLUSTER) == s.old[: SIZE // CLUSTER * CLUSTER]

    run()


def test_copied_disk_is_one_extent_again(tmpfs: Path) -> None:
    async def body(s: Setup) -> None:
        offsets = list(range(0, SIZE, CLUSTER))
        random.Random(1).shuffle(offsets)
        for offset in offsets:
            assert s.extents.pwrite(offset, b"n")
        assert s.extents.find(0) == MapExtent(0, SIZE, 0, 0, True)
        assert s.extents.stats().extents == 1
        assert s.kept() == s.old

    check(body, tmpfs)


def test_job_makes_the_guest_free_of_the_copier(tmpfs: Path) -> None:
    async def body(s: Setup) -> None:
        while await s.copy.copy_next(CLUSTER) is not None:
            pass
        assert s.extents.find(0) == MapExtent(0, SIZE, 0, 0, True)
        assert s.extents.pwrite(9 * CLUSTER, b"new")
        assert s.extents.stats().first_writes == 0
        assert s.kept() == s.old

    check(body, tmpfs)


def test_what_guest_writes_have_left_in_short_runs_is_copied_at_once(tmpfs: Path) -> None:
    async def body(s: Setup) -> None:
        for number in range(2, SIZE // CLUSTER, 2):
            assert s.extents.pwrite(number * CLUSTER, b"NN")
        assert s.extents.pwrite(SIZE - 2, b"NN")
        for_guest = s.copy.bytes_for_guest
        with trace.record() as events:
            left = s.copy.bitmap.count()
            assert [await s.copy.copy_next(SIZE) for _ in range(2)] == [left, None]
        assert [event for event in events if event.op in ("pread", "pwrite")] == []
        assert s.copy.bytes_for_guest == for_guest
        assert s.copy.bytes_copied == s.copy.bytes_moved == SIZE
        assert s.kept() == s.old
        first_writes = s.extents.stats().first_writes
        assert s.extents.pwrite(3 * CLUSTER, b"NN")
        assert s.extents.stats().first_writes == first_writes  # in place: the guest need not ask any more

    check(body, tmpfs)


def test_clusters_outside_the_bitmap_are_written_in_place(tmpfs: Path) -> None:
    @in_loop
    async def run() -> None:
        for name in ("disk", "target"):
            await create_file(str(tmpfs / name), SIZE, "raw", replace=True)
        async with graph_of(image(tmpfs, "disk"), image(tmpfs, "target")) as graph:
            bitmap = await graph.add_bitmap("disk", "b0", granularity=CLUSTER)
            bitmap.recorder.set(4 * CLUSTER, CLUSTER)
            await graph.insert_filter(top_over(bitmap={"node": "disk", "name": "b0"}), above="disk")
            guest = await graph.backend("top", writable=True)
            extents = guest.use_map().extents
            await guest.pwrite(0, b"x")
            assert extents.find(0) == MapExtent(0, 4 * CLUSTER, 0, 0, True)
            assert extents.find(4 * CLUSTER) == MapExtent(4 * CLUSTER, CLUSTER, 0, 4 * CLUSTER, True, True)
            assert extents.pwrite(2 * CLUSTER, b"x")
            assert extents.stats().first_writes == 0

    run()


def test_native_write_to_a_frozen_range_is_left_to_python_which_waits(tmpfs: Path) -> None:
    async def body(s: Setup) -> None:
        async with s.top.frozen(3 * CLUSTER + 5, 10) as held:
            assert held
            assert not s.extents.pwrite(3 * CLUSTER, b"new")
            assert s.kept()[3 * CLUSTER : 4 * CLUSTER] == s.old[3 * CLUSTER : 4 * CLUSTER]  # copied, and
            assert s.live() == s.old  # not written yet
            write = asyncio.ensure_future(s.guest.pwrite(3 * CLUSTER, b"new"))
            await asyncio.sleep(0)
            assert s.copy.done.get(3 * CLUSTER)
            assert not s.extents.pwrite(3 * CLUSTER, b"new")
            assert s.extents.pwrite(4 * CLUSTER, b"new")
            assert not write.done()
        await write
        assert s.extents.pwrite(3 * CLUSTER, b"newer")

    check(body, tmpfs)


def test_frozen_comes_too_late_for_what_a_native_write_has_done(tmpfs: Path) -> None:
    async def body(s: Setup) -> None:
        assert s.top.snapshot_run(3 * CLUSTER, 10) == (10, False)
        assert s.extents.pwrite(3 * CLUSTER, b"new")
        async with s.top.frozen(3 * CLUSTER, 10) as held:
            assert not held
        assert s.top.snapshot_run(3 * CLUSTER, 10) == (10, True)

    check(body, tmpfs)


def test_native_write_leaves_a_claim_of_the_job_alone(tmpfs: Path) -> None:
    async def body(s: Setup) -> None:
        claim = s.copy.copier.take(2 * CLUSTER, 4 * CLUSTER)
        assert claim is not None
        assert not s.extents.pwrite(3 * CLUSTER, b"new")
        assert s.live() == s.old
        s.copy.copier.finish(claim.number, copied=False)
        assert s.extents.pwrite(3 * CLUSTER, b"new")
        assert s.kept()[3 * CLUSTER : 4 * CLUSTER] == s.old[3 * CLUSTER : 4 * CLUSTER]

    check(body, tmpfs)


def test_native_write_sets_dirty_bitmaps(tmpfs: Path) -> None:
    async def body(s: Setup) -> None:
        disk = await s.graph.add_bitmap("disk", "b0", granularity=4096)
        target = await s.graph.add_bitmap("target", "b1", granularity=4096)
        await s.learn(1)
        assert s.extents.pwrite(3 * CLUSTER, b"new")
        assert list(disk.recorder.dirty_extents(2 * CLUSTER)) == [(3 * CLUSTER, 4096)]
        assert (3 * CLUSTER, CLUSTER) in list(target.recorder.dirty_extents())

    check(body, tmpfs)


def test_native_copy_makes_the_next_flush_of_the_target_go_down(tmpfs: Path) -> None:
    async def body(s: Setup) -> None:
        await s.graph.node("target").flush()
        assert s.extents.pwrite(3 * CLUSTER, b"new")
        file = s.graph.node("target").children["file"].node.name
        with trace.record() as events:
            await s.graph.node("target").flush()
            await s.graph.node("target").flush()
        assert [event.node for event in events if event.op == "flush"].count(file) == 1

    check(body, tmpfs)


def test_target_under_a_new_filter_is_left_to_python(tmpfs: Path) -> None:
    async def body(s: Setup) -> None:
        assert s.extents.pwrite(3 * CLUSTER, b"new")
        await s.graph.insert_filter({"driver": "inject-error", "node-name": "seen", "image": "target"}, above="target")
        await s.guest.pwrite(4 * CLUSTER, b"new")
        assert not s.extents.pwrite(5 * CLUSTER, b"new")
        with trace.record() as events:
            await s.guest.pwrite(5 * CLUSTER, b"new")
        assert ("pwrite", "seen") in [(event.op, event.node) for event in events]
        await s.graph.remove_filter("seen")
        await s.guest.pwrite(6 * CLUSTER, b"new")
        assert s.extents.pwrite(7 * CLUSTER, b"new")
        assert s.kept()[3 * CLUSTER : 8 * CLUSTER] == s.old[3 * CLUSTER : 8 * CLUSTER]

    check(body, tmpfs)


@pytest.mark.parametrize("fleecing", [False, True], ids=["timeout", "fleecing"])
def test_what_native_writes_can_not_keep_is_left_to_python(tmpfs: Path, fleecing: bool) -> None:
    @in_loop
    async def run() -> None:
        await create_file(str(tmpfs / "fleece"), SIZE, "qcow2", replace=True)
        target = {**image(tmpfs, "fleece", "qcow2", backing="disk"), "node-name": "target"} if fleecing else None
        more = {} if fleecing else {"cbw-timeout": 5}
        async with files(tmpfs, target, **more) as s:
            await s.learn()
            assert not s.copy.native
            assert not s.extents.pwrite(3 * CLUSTER, b"new")
            await s.guest.pwrite(3 * CLUSTER, b"new")
            assert s.extents.pwrite(3 * CLUSTER, b"newer")
            assert s.copy.copier.stats().copied == 0

    run()


def test_sync_top_is_left_to_python(tmpfs: Path) -> None:
    async def body(s: Setup) -> None:
        s.copy.only_top = True
        assert not s.extents.pwrite(3 * CLUSTER, b"new")
        assert s.copy.bitmap.get(3 * CLUSTER)

    check(body, tmpfs)


def test_error_is_told_by_python_and_broken_snapshot_frees_native_writes(tmpfs: Path) -> None:
    async def body(s: Setup) -> None:
        await s.graph.add_node({"driver": "snapshot-access", "node-name": "kept", "file": "top"})
        reader = await s.graph.backend("kept")
        rule = {"event": "pwritev", "iotype": "write", "errno": "EIO"}
        broken = {"driver": "inject-error", "node-name": "broken", "image": "target", "inject-error": [rule]}
        await s.graph.insert_filter(broken, above="target")
        await s.guest.pread(0, 1)
        assert not s.extents.pwrite(3 * CLUSTER, b"new")
        await s.guest.pwrite(3 * CLUSTER, b"new")
        assert s.top.broken is not None
        copied = s.copy.bytes_copied
        await s.guest.pread(5 * CLUSTER, 1)
        assert s.extents.pwrite(5 * CLUSTER, b"new")
        assert s.copy.bytes_copied == copied
        with pytest.raises(SnapshotBroken):
            await reader.pread(5 * CLUSTER, 1)

    check(body, tmpfs, **{"on-cbw-error": "break-snapshot"})


def test_two_filters_on_one_disk_both_get_the_old_bytes(tmpfs: Path) -> None:
    async def body(s: Setup) -> None:
        await create_file(str(tmpfs / "second"), SIZE, "raw", replace=True)
        await s.graph.add_node(image(tmpfs, "second"))
        await s.graph.insert_filter(
            {"driver": "backup-top", "node-name": "over", "file": "top", "target": "second"}, above="top"
        )
        for offset in range(0, SIZE, CLUSTER):
            if not s.extents.pwrite(offset, b"new"):
                await s.guest.pwrite(offset, b"new")
        assert s.kept() == s.old
        assert (tmpfs / "second").read_bytes()[CLUSTER:] == s.old[CLUSTER:]

    check(body, tmpfs)


def test_guest_that_sees_a_part_of_the_disk_copies_at_the_right_place(tmpfs: Path) -> None:
    async def body(s: Setup) -> None:
        await s.graph.close_backend(s.guest)
        start, length = CLUSTER + 512, 5 * CLUSTER
        await s.graph.add_node({"driver": "raw", "node-name": "part", "file": "top", "offset": start, "size": length})
        part = await s.graph.backend("part", writable=True)
        extents = part.use_map().extents
        await part.pwrite(3 * CLUSTER, b"n")
        before = s.copy.copier.stats().copied
        assert extents.pwrite(0, b"first")
        assert extents.pwrite(length - 4, b"last")
        assert s.copy.copier.stats().copied == before + 2 * CLUSTER
        kept = s.kept()
        for cluster in (1, 6):
            area = slice(cluster * CLUSTER, (cluster + 1) * CLUSTER)
            assert kept[area] == s.old[area]
        assert s.live()[start : start + 5] == b"first"
        assert s.live()[start + length - 4 : start + length] == b"last"

    check(body, tmpfs)


@in_loop
async def test_memory_target_is_left_to_python() -> None:
    async with backup_top() as s:
        extents = s.guest.use_map().extents
        await s.guest.pwrite(0, b"new")
        assert not extents.pwrite(CLUSTER, b"new")
        await s.guest.pwrite(CLUSTER, b"new")
        assert s.copied() == [0, 1]


WRITES = st.lists(
    st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3 * CLUSTER), st.booleans()), min_size=1, max_size=30
)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_point_in_time_is_kept_while_threads_write_a_job_copies_and_a_reader_reads(
    data: st.DataObject,
) -> None:
    """Writers have a third of every cluster each, so that the end is known; zeroes and discards go through Python."""
    writes = data.draw(st.lists(WRITES, min_size=3, max_size=3))
    with_job = data.draw(st.booleans())
    chunk = data.draw(st.sampled_from([CLUSTER, 3 * CLUSTER]))
    seed = data.draw(st.integers(0, 1 << 30))

    @in_loop
    async def run() -> None:
        with TemporaryDirectory(dir="/dev/shm") as directory:
            await race(Path(directory))

    async def race(directory: Path) -> None:
        async with files(directory) as s:
            expected = bytearray(s.old)
            await s.learn()
            loop = asyncio.get_running_loop()
            failures: list[BaseException] = []

            def write(number: int) -> None:
                third = CLUSTER // 3
                for offset, length, slow in writes[number]:
                    start = offset - offset % CLUSTER + number * third
                    length = min(length, third, SIZE - start)
                    if length <= 0:
                        continue
                    new = bytes([number + 1]) * length
                    expected[start : start + length] = new
                    if slow or not s.extents.pwrite(start, new):
                        asyncio.run_coroutine_threadsafe(s.guest.pwrite(start, new), loop).result()

            def guarded(number: int) -> None:
                try:
                    write(number)
                except BaseException as error:
                    failures.append(error)

            await s.graph.add_node({"driver": "snapshot-access", "node-name": "kept", "file": "top"})
            reader = await s.graph.backend("kept")
            threads = [threading.Thread(target=guarded, args=(number,)) for number in range(3)]
            for thread in threads:
                thread.start()
            job = None
            if with_job:
                job = await JobManager(s.graph).backup(
                    BackupOptions(device="top", sync="full", max_chunk=chunk, max_workers=2)
                )
            rng = random.Random(seed)
            while any(thread.is_alive() for thread in threads):
                offset = rng.randrange(SIZE)
                length = rng.randint(1, min(2 * CLUSTER, SIZE - offset))
                assert await reader.pread(offset, length) == s.old[offset : offset + length]
            for thread in threads:
                thread.join()
            assert failures == []
            if job is not None:
                await job.wait()
                assert s.copy.bytes_copied == SIZE
                assert s.kept() == s.old
            assert s.copy.bytes_moved == s.copy.bytes_copied  # random bytes: none was spared, none was moved twice
            assert s.live() == bytes(expected)
            assert await reader.pread(0, SIZE) == s.old

    run()
