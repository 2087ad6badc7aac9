# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Two backup-tops on one disk, each with its own point in time: native guest writes copy for both.

guest ==extent map==> disk (raw) -> file
  `--> over --file--> top --file--> disk,  --target--> second and target (raw) -> file
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import random
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Literal

import pytest
from helpers.backup import CLUSTER, top_over
from helpers.backup_files import SIZE, Setup, files, image
from helpers.loop import driver_of, in_loop
from helpers.native_request import native_request

from blockgraph import trace
from blockgraph.backend import Backend
from blockgraph.create import create_file
from blockgraph.errors import IOFailure, SnapshotBroken
from blockgraph.filters.backup_top import BackupTop
from blockgraph.native import Zeroing

BIG = 4 * CLUSTER


def over(s: Setup) -> BackupTop:
    """The second filter."""
    return driver_of(s.graph, "over", BackupTop)


async def insert_over(s: Setup, path: Path, **more: Any) -> None:
    """Put the second filter over the first."""
    await create_file(str(path / "second"), len(s.old), "raw", replace=True)
    await s.graph.add_node(image(path, "second"))
    await s.graph.insert_filter(
        {"driver": "backup-top", "node-name": "over", "file": "top", "target": "second", **more}, above="top"
    )


async def reader_of(s: Setup, node: str) -> Backend:
    """What that filter keeps."""
    await s.graph.add_node({"driver": "snapshot-access", "node-name": f"{node}-kept", "file": node})
    return await s.graph.backend(f"{node}-kept")


def check(body: Callable[[Setup], Coroutine[Any, Any, None]], tmpfs: Path, **more: Any) -> None:
    """Run a test's body with both filters in place, and the maps filled."""

    @in_loop
    async def run() -> None:
        async with files(tmpfs) as s:
            await insert_over(s, tmpfs, **more)
            await s.learn()
            await body(s)

    run()


def test_native_write_copies_once_for_each(tmpfs: Path) -> None:
    async def body(s: Setup) -> None:
        copiers = s.copy.copier, over(s).copy.copier
        before = [copier.stats().copied for copier in copiers]
        with trace.record() as events:
            for offset in (3 * CLUSTER + 7, 3 * CLUSTER + 7, 5 * CLUSTER - 1, SIZE - 2):
                assert s.extents.pwrite(offset, b"NN")
        assert events == []
        assert s.extents.stats().first_writes == 3
        for copier, already in zip(copiers, before, strict=True):
            assert copier.stats().copied == copier.stats().moved == already + 3 * CLUSTER + 512
            assert copier.stats().refused == 0
        second = (tmpfs / "second").read_bytes()
        for at in (0, 3, 4, 5, 16):
            area = slice(at * CLUSTER, (at + 1) * CLUSTER)
            assert s.kept()[area] == second[area] == s.old[area]

    check(body, tmpfs)


def test_with_larger_clusters_for_one_only_what_both_have_is_written_in_place(tmpfs: Path) -> None:
    async def body(s: Setup) -> None:
        await s.guest.pread(5 * CLUSTER, 1)
        assert s.extents.pwrite(5 * CLUSTER, b"new")
        mine, others = s.copy.copier.stats().copied, over(s).copy.copier.stats().copied
        found = s.extents.find(5 * CLUSTER)
        assert found is not None
        assert (found.offset, found.length, found.copy) == (5 * CLUSTER, CLUSTER, False)
        for beside in (4, 6):
            found = s.extents.find(beside * CLUSTER)
            assert found is not None
            assert found.copy
        assert s.extents.pwrite(6 * CLUSTER, b"new")
        assert s.copy.copier.stats().copied == mine + CLUSTER
        assert over(s).copy.copier.stats().copied == others
        assert (tmpfs / "second").read_bytes()[BIG : 2 * BIG] == s.old[BIG : 2 * BIG]

    check(body, tmpfs, **{"min-cluster-size": BIG})


@pytest.mark.parametrize("whose", ["top", "over"])
def test_job_of_one_does_not_free_the_guest_of_the_other(tmpfs: Path, whose: str) -> None:
    async def body(s: Setup) -> None:
        done, left = (s.top, over(s)) if whose == "top" else (over(s), s.top)
        while await done.copy.copy_next(CLUSTER) is not None:
            pass
        await s.graph.node("over").wait_idle()
        before = left.copy.copier.stats().copied
        assert s.extents.pwrite(9 * CLUSTER, b"new")
        assert left.copy.copier.stats().copied == before + CLUSTER
        kept = s.kept() if whose == "over" else (tmpfs / "second").read_bytes()
        assert kept[9 * CLUSTER : 10 * CLUSTER] == s.old[9 * CLUSTER : 10 * CLUSTER]

    check(body, tmpfs)


@pytest.mark.parametrize("first", ["top", "over"])
def test_copier_that_joins_waits_for_writes_that_ask_the_other_only(tmpfs: Path, first: str) -> None:
    async def body(s: Setup) -> None:
        await s.graph.insert_filter(top_over(**{"node-name": "over", "file": "top", "target": "second"}), above="top")
        joining = s.copy if first == "over" else over(s).copy
        joining.only_top = True
        await s.guest.pwrite(0, b"n")  # done for both: the map asks the first
        at = s.extents.find(0)
        assert at is not None
        assert at.writable
        joining.only_top = False
        s.extents.start_invalidate(CLUSTER, SIZE - CLUSTER)
        with native_request(s.extents, 0, 1):
            write = asyncio.ensure_future(s.guest.pwrite(3 * CLUSTER, b"n"))
            await more_than(lambda: s.live()[3 * CLUSTER : 3 * CLUSTER + 1] == b"n")
            found = s.extents.find(4 * CLUSTER)
            assert found is None or not found.copy
            assert not write.done()
        await write
        assert s.extents.pwrite(4 * CLUSTER, b"n")
        for name in ("target", "second"):
            kept = (tmpfs / name).read_bytes()
            assert kept[4 * CLUSTER : 5 * CLUSTER] == s.old[4 * CLUSTER : 5 * CLUSTER]

    @in_loop
    async def run() -> None:
        await create_file(str(tmpfs / "second"), SIZE, "raw", replace=True)
        async with files(tmpfs) as s:
            await s.graph.add_node(image(tmpfs, "second"))
            await body(s)

    run()


@pytest.mark.parametrize("whose", ["top", "over"])
def test_range_frozen_under_one_is_left_to_python(tmpfs: Path, whose: str) -> None:
    async def body(s: Setup) -> None:
        async with driver_of(s.graph, whose, BackupTop).frozen(3 * CLUSTER + 5, 10) as held:
            assert held
            assert not s.extents.pwrite(3 * CLUSTER, b"new")
            assert s.live() == s.old
            assert s.extents.pwrite(4 * CLUSTER, b"new")
        assert s.extents.pwrite(3 * CLUSTER, b"new")

    check(body, tmpfs)


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
@pytest.mark.parametrize("target", ["target", "second"])
def test_copy_that_fails_for_one_leaves_the_other_whole(
    tmpfs: Path, target: str, policy: Literal["break-guest-write", "break-snapshot"]
) -> None:
    @in_loop
    async def run() -> None:
        async with files(tmpfs, **{"on-cbw-error": policy}) as s:
            await insert_over(s, tmpfs, **{"on-cbw-error": policy})
            failing, whole = ("top", "over") if target == "target" else ("over", "top")
            readers = {name: await reader_of(s, name) for name in ("top", "over")}
            await s.learn()
            rule = {"event": "pwritev", "iotype": "write", "errno": "EIO"}
            broken = {"driver": "inject-error", "node-name": "broken", "image": target, "inject-error": [rule]}
            await s.graph.insert_filter(broken, above=target)
            await s.guest.pread(0, 1)
            assert not s.extents.pwrite(3 * CLUSTER, b"new")
            if policy == "break-guest-write":
                for _ in range(2):
                    with pytest.raises(IOFailure) as failed:
                        await s.guest.pwrite(3 * CLUSTER, b"new")
                    assert failed.value.errno == errno.EIO
                assert s.live() == s.old
                assert await readers[failing].pread(0, SIZE) == s.old
            else:
                await s.guest.pwrite(3 * CLUSTER, b"new")
                assert driver_of(s.graph, failing, BackupTop).broken is not None
                await s.guest.pread(5 * CLUSTER, 1)
                copied = driver_of(s.graph, whole, BackupTop).copy.bytes_copied
                assert s.extents.pwrite(5 * CLUSTER, b"new")
                assert driver_of(s.graph, whole, BackupTop).copy.bytes_copied == copied + CLUSTER
                with pytest.raises(SnapshotBroken):
                    await readers[failing].pread(5 * CLUSTER, 1)
            assert driver_of(s.graph, whole, BackupTop).broken is None
            assert await readers[whole].pread(0, SIZE) == s.old

    run()


def test_second_filter_with_other_offsets_is_left_to_python(tmpfs: Path) -> None:
    @in_loop
    async def run() -> None:
        start, length = CLUSTER + 512, 5 * CLUSTER
        async with files(tmpfs) as s:
            await s.graph.close_backend(s.guest)
            await create_file(str(tmpfs / "second"), length, "raw", replace=True)
            await s.graph.add_node(image(tmpfs, "second"))
            part = {"driver": "raw", "node-name": "part", "file": "top", "offset": start, "size": length}
            await s.graph.add_node(part)
            await s.graph.insert_filter(
                top_over(**{"node-name": "over", "file": "part", "target": "second"}), above="part"
            )
            guest = await s.graph.backend("over", writable=True)
            extents = guest.use_map().extents
            for offset in range(0, length, CLUSTER):
                assert not extents.pwrite(offset, b"new")
                await guest.pwrite(offset, b"new")
            assert (tmpfs / "second").read_bytes() == s.old[start : start + length]
            assert s.kept()[CLUSTER : 6 * CLUSTER] == s.old[CLUSTER : 6 * CLUSTER]

    run()


class Writer:
    """Writes to its part of every cluster, one after the other, and remembers them all.

    Attributes:
        log: offset and bytes, entered before it is written.
        ended: how many of them are over.
    """

    def __init__(self, s: Setup, number: int, loop: asyncio.AbstractEventLoop) -> None:
        self.log: list[tuple[int, bytes]] = []
        self.ended = 0
        self.failure: BaseException | None = None
        self._s = s
        self._number = number
        self._clusters = len(s.old) // CLUSTER
        self._loop = loop
        self._rng = random.Random(number)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._write()
        except BaseException as error:
            self.failure = error

    def _write(self) -> None:
        s, rng, third = self._s, self._rng, CLUSTER // 3
        start = rng.randrange(self._clusters) * CLUSTER + self._number * third + rng.randrange(third - 600)
        data = bytes(600) if rng.random() < 0.2 else rng.randbytes(600)
        self.log.append((start, data))
        if any(data):
            done = s.extents.pwrite(start, data)
        else:
            done = s.extents.zero(start, len(data), Zeroing.PUNCH | Zeroing.ZERO_RANGE)
        if not done:
            asyncio.run_coroutine_threadsafe(s.guest.pwrite(start, data), self._loop).result()
        self.ended += 1

    def stop(self) -> None:
        """No more writes."""
        self._stop.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def when(self, image: bytes, old: bytes, first: int, last: int) -> int | None:
        """After how many writes, from `first` to `last`, its part of the disk was as in `image`."""
        model, third = bytearray(old), CLUSTER // 3
        different: set[int] = set()

        def compare(offset: int) -> None:
            start = offset - offset % CLUSTER + self._number * third
            alike = model[start : start + third] == image[start : start + third]
            (different.discard if alike else different.add)(start)

        for offset, data in self.log[:first]:
            model[offset : offset + len(data)] = data
        for offset in range(0, self._clusters * CLUSTER, CLUSTER):
            compare(offset)
        for number in range(first, last + 1):
            if not different:
                return number
            offset, data = self.log[number] if number < last else (0, b"")
            model[offset : offset + len(data)] = data
            compare(offset)
        return None


async def more_than(condition: Callable[[], bool]) -> None:
    """Until that has happened, and the loop has nothing more to do about it."""
    for turn in itertools.count():
        await asyncio.to_thread(threading.Event().wait, 0.001)
        if condition() and turn >= 20:
            return


async def more_of(writers: list[Writer], count: int) -> None:
    """Until each has written so often again."""
    wanted = [writer.ended + count for writer in writers]
    while any(w.ended < least and w.failure is None for w, least in zip(writers, wanted, strict=True)):
        await asyncio.to_thread(threading.Event().wait, 0.001)


@pytest.mark.parametrize("cluster", [CLUSTER, BIG], ids=["same-clusters", "larger-clusters"])
@pytest.mark.parametrize("removed", ["top", "over"])
def test_both_points_in_time_are_exact_while_threads_write_natively_and_one_is_removed(
    tmpfs: Path, removed: str, cluster: int
) -> None:
    @in_loop
    async def run() -> None:
        size = 512 * CLUSTER + 512
        async with files(tmpfs, size=size) as s:
            await s.learn()
            loop = asyncio.get_running_loop()
            writers = [Writer(s, number, loop) for number in range(3)]
            try:
                await more_of(writers, 5)
                lower = [writer.ended for writer in writers]
                await insert_over(s, tmpfs, **{"min-cluster-size": cluster})
                upper = [len(writer.log) for writer in writers]
                second, first = await reader_of(s, "over"), await reader_of(s, "top")
                at_first = s.extents.stats().first_writes
                # Until its maps know enough, which takes some writes, Python copies.
                while not over(s).copy.copier.stats().copied or s.extents.stats().first_writes == at_first:
                    await more_of(writers, 1)
                assert await first.pread(0, size) == s.old
                image = await second.pread(0, size)
                await s.graph.close_backend(first if removed == "top" else second)
                await s.graph.remove_node(f"{removed}-kept")
                await s.graph.remove_filter(removed)
                await more_of(writers, 100)
            finally:
                for writer in writers:
                    await asyncio.to_thread(writer.stop)
            for writer, least, most in zip(writers, lower, upper, strict=True):
                assert writer.when(image, s.old, least, most) is not None
            if removed == "top":
                assert await second.pread(0, size) == image
            else:
                assert await first.pread(0, size) == s.old
            expected = bytearray(s.old)
            for writer in writers:
                for offset, data in writer.log:
                    expected[offset : offset + len(data)] = data
            assert s.live() == expected

    run()
