# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Two disks, their bitmaps and backups in any mode at once, failures and guests, against sets and plain bytes.

A chain is restored as a user would: the clusters that a backup has are put over the image that its bitmap's last
backup gave. What a bitmap marks is kept as a list of (moment, granule); each backup knows the moment of its view.

guest --> (tops) --> a (flaky) --> a-bytes      (top) --> t1 (flaky) --> t1-bytes
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from helpers.backup import CLUSTER, Flake, Flaky, content, memory, settle
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import blockgraph
from blockgraph.api import AsyncGraph
from blockgraph.graph.action import Action
from blockgraph.graph.transaction import Transaction
from blockgraph.jobs.backup import BackupJob
from blockgraph.jobs.group import JobGroup
from blockgraph.jobs.job import JobEvent
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions
from blockgraph.native import Bitmap

T = TypeVar("T")

CLUSTERS = 6
GRANULARITIES = st.sampled_from([4096, 64 << 10, 128 << 10])
SIZE = CLUSTERS * CLUSTER - 1000
DISKS = "ab"


@dataclass
class Image:
    """What a chain of backups gives.

    Attributes:
        epoch: of the bitmap at that point; another one now: changes since are not all in the bitmap.
        data: bytes, once it has been restored.
    """

    epoch: tuple[int, int]
    data: bytes = b""


@dataclass
class Marks:
    """The model of a bitmap.

    Attributes:
        written: (moment, granule).
        readers: moments of those that want to clear and run.
        ended: moments of those that have, with what they left.
        missed, cleared: how often it missed writes, and lost marks.
        base: what the chain of its backups gives.
    """

    granularity: int
    enabled: bool = True
    now: int = 0
    written: list[tuple[int, int]] = field(default_factory=list)
    readers: list[int] = field(default_factory=list)
    ended: list[tuple[int, set[int]]] = field(default_factory=list)
    missed: int = 0
    cleared: int = 0
    base: Image | None = None

    def granules(self, offset: int, length: int) -> set[int]:
        """Those that a range touches."""
        return set(range(offset // self.granularity, -(-(offset + length) // self.granularity)))

    def of(self, bits: Bitmap) -> set[int]:
        """Those that are set."""
        return {granule for run in bits.dirty_extents() for granule in self.granules(*run)}

    def record(self, offset: int, length: int) -> None:
        """A write."""
        if self.enabled:
            self.mark(self.granules(offset, length))
        else:
            self.missed += 1

    def mark(self, granules: set[int]) -> None:
        """Now."""
        self.now += 1
        self.written += [(self.now, granule) for granule in granules]

    def held(self) -> set[int]:
        """What it marks."""
        return {granule for _, granule in self.written}

    def end(self, moment: int, *, wanted: bool, clears: bool, left: set[int]) -> None:
        """A reader has ended."""
        if wanted:
            self.readers.remove(moment)
        if clears:
            self.ended.append((moment, left))
        if self.ended and not self.readers:
            since = min(moment for moment, _ in self.ended)
            self.written = [(moment, granule) for moment, granule in self.written if moment > since]
            for _, granules in self.ended:
                self.mark(granules)
            self.ended = []

    @property
    def epoch(self) -> tuple[int, int]:
        """See Image."""
        return self.missed, self.cleared


@dataclass
class Instant(Action):
    """The point in time of a job: bytes of the disk, and what its bitmap marked."""

    disk: str
    marks: Marks | None
    wanted: bool
    data: bytes = b""
    bits: set[int] = field(default_factory=set)
    moment: int = 0
    base: Image | None = None
    epoch: tuple[int, int] = (0, 0)

    def nodes(self) -> list[str]:
        return [self.disk]

    async def prepare(self, change: Transaction) -> None:
        data = bytearray(SIZE)
        await change.node(f"{self.disk}-bytes").pread(0, memoryview(data))
        self.data = bytes(data)
        if self.marks is not None:
            self.bits, self.moment = self.marks.held(), self.marks.now
            self.base, self.epoch = self.marks.base, self.marks.epoch

    def commit(self) -> None:
        if self.marks is not None and self.wanted:
            self.marks.readers.append(self.moment)


@dataclass
class Running:
    """A job and its point in time.

    Attributes:
        number: of its target.
        image: what its chain gives; None: its bitmap's last backup is no base for it.
    """

    job: BackupJob
    instant: Instant
    number: int
    image: Image | None = None


def put_over(below: bytes, above: bytes, clusters: set[int]) -> bytes:
    """`below` with some clusters of `above`."""
    return b"".join(
        (above if number in clusters else below)[number * CLUSTER : (number + 1) * CLUSTER]
        for number in range(CLUSTERS)
    )


def flaky_disk(name: str) -> list[dict[str, Any]]:
    """A disk in memory and its fault filter."""
    return [memory(f"{name}-bytes", SIZE), {"driver": Flaky.name, "node-name": name, "file": f"{name}-bytes"}]


class Backups(RuleBasedStateMachine):
    """See the module's text."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.marks: dict[tuple[str, str], Marks] = {}
        self.jobs: dict[str, Running] = {}
        self.ended: list[str] = []
        self.numbers = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """In the loop."""
        return self.loop.run_until_complete(work)

    @initialize(granularity=GRANULARITIES)
    def open(self, granularity: int) -> None:
        """Each disk begins with a bitmap and a full backup."""
        self.run(self._open())
        for disk in DISKS:
            self.add_or_remove(disk, "x", granularity)
            self.guest(disk, [(CLUSTER // 2, SIZE - CLUSTER, "write")], b"")
            self.run(self._start([(disk, "x", {"sync": "full", "bitmap_mode": "on-success"})], None))
            (job,) = [running.job for running in self.jobs.values()]
            self.run(self._end(job, cancel=False))
            self.ended_backups_are_the_disk_at_their_instant()

    async def _open(self) -> None:
        nodes = [node for disk in DISKS for node in flaky_disk(disk)]
        self.graph: AsyncGraph = await blockgraph.aopen({"nodes": nodes})
        self.guests = {disk: await self.graph.backend(disk, writable=True) for disk in DISKS}
        self.manager = JobManager(self.graph)
        self.manager.listeners.append(self._told)

    def _told(self, event: JobEvent) -> None:
        """When a job concludes, at this very instant, its bitmap changes."""
        if event.kind != "state" or event.state != "concluded":
            return
        running = self.jobs[event.job]
        job, instant, marks = running.job, running.instant, running.instant.marks
        self.ended.append(event.job)
        if marks is None:
            return
        mode = job._use.mode  # type: ignore[union-attr]
        succeeded = not job.failed
        if all(not member.failed for member in job.group.jobs) != succeeded:
            raise AssertionError("one of a group has failed alone")
        left = self._left(running)
        clears = mode == "always" or (mode == "on-success" and succeeded)
        marks.end(instant.moment, wanted=mode != "never", clears=clears, left=set() if succeeded else left)
        base = instant.base
        if not job._use.reduces or (base is not None and base.epoch == instant.epoch):  # type: ignore[union-attr]
            running.image = Image(instant.epoch)
            if clears:  # from this very instant on other backups build upon it
                marks.base = running.image

    def _left(self, running: Running) -> set[int]:
        """Granules that a job has not copied, as it says itself; that it is right shows when chains are restored."""
        job, marks = running.job, running.instant.marks
        assert marks is not None
        if job._left is not None:
            return marks.of(job._left)
        return running.instant.bits if job._use.reduces else marks.granules(0, SIZE)  # type: ignore[union-attr]

    def flaky(self, node: str) -> Flaky:
        """A fault filter."""
        driver = self.graph.node(node).driver
        assert isinstance(driver, Flaky)
        return driver

    # Guests and bitmaps.

    @rule(
        disk=st.sampled_from(DISKS),
        changes=st.lists(
            st.tuples(
                st.integers(0, SIZE - 1), st.integers(1, 2 * CLUSTER), st.sampled_from(["write", "zero", "discard"])
            ),
            min_size=1,
            max_size=4,
        ),
        seed=st.binary(max_size=2),
    )
    def guest(self, disk: str, changes: list[tuple[int, int, str]], seed: bytes) -> None:
        guest = self.guests[disk]

        async def change(at: int, length: int, op: str) -> None:
            length = min(length, SIZE - at)
            if op == "write":
                await guest.pwrite(at, ((seed + b"g") * length)[:length])
            elif op == "zero":
                await guest.write_zeroes(at, length)
            else:
                await guest.discard(at, length)

        for each in changes:
            with suppress(Flake):  # the copy before it failed: nothing was written
                self.run(change(*each))

    @rule(disk=st.sampled_from(DISKS), name=st.sampled_from("yz"), granularity=GRANULARITIES)
    def add_or_remove(self, disk: str, name: str, granularity: int) -> None:
        key = disk, name
        if key not in self.marks:
            self.run(self.graph.add_bitmap(disk, name, granularity=granularity))
            self.marks[key] = Marks(granularity)
            self.flaky(disk).changed[name] = self.marks[key].record
        elif not self.graph.bitmap(disk, name).holders:
            self.run(self.graph.remove_bitmap(disk, name))
            del self.marks[key], self.flaky(disk).changed[name]

    @precondition(lambda self: self.marks)
    @rule(data=st.data(), op=st.sampled_from(["merge", "enable", "enable", "merge", "disable", "clear"]))
    def change_bitmap(self, data: st.DataObject, op: str) -> None:
        disk, name = key = data.draw(st.sampled_from(sorted(self.marks)))
        marks = self.marks[key]
        if op == "clear":
            self.run(self.graph.clear_bitmap(disk, name))
            marks.written, marks.cleared = [], marks.cleared + 1
        elif op == "merge":
            other = data.draw(st.sampled_from(sorted(self.marks)))
            self.run(self.graph.merge_bitmaps(disk, name, [other]))
            marks.mark(marks.of(self.graph.bitmap(*other).contents()))
        else:
            marks.enabled = op == "enable"
            self.run(self.graph.enable_bitmap(disk, name, enabled=marks.enabled))

    # Jobs.

    @precondition(lambda self: len(self.jobs) < 4)
    @rule(data=st.data(), grouped=st.booleans(), disks=st.sampled_from(["a", "b", "ab", "ba", "aa", "aab"]))
    def start(self, data: st.DataObject, grouped: bool, disks: str) -> None:
        wanted = []
        for disk in disks:
            names = [name for owner, name in sorted(self.marks) if owner == disk]
            name = data.draw(st.sampled_from([*names, "x", None]))
            how = data.draw(st.sampled_from(PLAIN if name is None else WITH_BITMAP))
            if grouped and how["sync"] == "none":
                continue
            held = data.draw(st.booleans())
            wanted.append((disk, name, {**how, "auto_finalize": not held}))
        group = JobGroup() if grouped and wanted else None
        self.run(self._start(wanted, group))

    async def _start(self, wanted: list[tuple[str, str | None, dict[str, Any]]], group: JobGroup | None) -> None:
        numbers = []
        for _ in wanted:
            self.numbers += 1
            numbers.append(self.numbers)
            for node in flaky_disk(f"t{self.numbers}"):
                await self.graph.add_node(node)
        async with self.graph.transaction() as change:
            for number, (disk, name, how) in zip(numbers, wanted, strict=True):
                job_id = f"j{number}"
                marks = None if name is None else self.marks[disk, name]
                how |= {"job_id": job_id, "device": disk, "target": f"t{number}", "bitmap": name}
                options = BackupOptions(max_chunk=CLUSTER, max_workers=1, **how)
                job = await self.manager.add(change, options, group)
                mode = "never" if job._use is None else job._use.mode
                change.act(instant := Instant(disk, marks, mode != "never"))
                self.jobs[job_id] = Running(job, instant, number)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), op=st.sampled_from(["pwrite", "pread", "pwrite", "flush"]))
    def fail(self, data: st.DataObject, op: str) -> None:
        running = self.jobs[data.draw(st.sampled_from(sorted(self.jobs)))]
        self.flaky(running.instant.disk if op == "pread" else f"t{running.number}").failing = op

    @rule(ticks=st.integers(1, 30))
    def go_on(self, ticks: int) -> None:
        async def tick() -> None:
            for _ in range(ticks):
                await asyncio.sleep(0)

        self.run(tick())

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), how=st.sampled_from(["cancel", "finish", "finish"]))
    def end(self, data: st.DataObject, how: str) -> None:
        job = self.jobs[data.draw(st.sampled_from(sorted(self.jobs)))].job
        self.run(self._end(job, cancel=how == "cancel" or job.options.sync == "none"))

    async def _end(self, job: BackupJob, *, cancel: bool) -> None:
        if cancel and not job.ending:
            job.cancel()
        while not job.ending:
            if job.state == "pending":
                job.finalize()
            await settle()
        await job.wait()

    # What must hold.

    @invariant()
    def bitmaps_mark_what_the_model_marks(self) -> None:
        for (disk, name), marks in self.marks.items():
            assert marks.of(self.graph.bitmap(disk, name).contents()) == marks.held(), (disk, name)

    @invariant()
    def ended_backups_are_the_disk_at_their_instant(self) -> None:
        while self.ended:
            self.run(self._restore(self.jobs.pop(self.ended.pop(0))))

    async def _restore(self, running: Running) -> None:
        job, instant, marks = running.job, running.instant, running.instant.marks
        target = await content(self.graph, f"t{running.number}-bytes")
        self.flaky(f"t{running.number}").failing = ""
        await self.graph.remove_node(f"t{running.number}")
        await self.graph.remove_node(f"t{running.number}-bytes")
        everything = set(range(CLUSTERS))
        if marks is None:
            if not job.failed:
                assert target == instant.data
            return
        use = job._use
        assert use is not None
        bits = self._clusters(marks, instant.bits) if use.reduces else everything
        left = self._clusters(marks, self._left(running)) if job.failed else set()
        # Of a failed job only mode "always" says what it has copied.
        if job.failed and use.mode != "always":
            return
        copied = bits - left
        below = instant.base.data if instant.base is not None else bytes(SIZE)
        restored = put_over(below, target, copied)
        assert put_over(instant.data, target, copied) == instant.data
        if running.image is not None:
            running.image.data = restored
            if not job.failed:
                assert restored == instant.data

    def _clusters(self, marks: Marks, granules: set[int]) -> set[int]:
        unit = marks.granularity
        return {
            cluster
            for granule in granules
            for cluster in range(granule * unit // CLUSTER, min(CLUSTERS, -(-(granule + 1) * unit // CLUSTER)))
        }

    def teardown(self) -> None:
        try:
            if hasattr(self, "graph"):
                self.run(self._close())
        finally:
            self.loop.close()

    async def _close(self) -> None:
        for running in list(self.jobs.values()):
            self.flaky(f"t{running.number}").failing = ""
            self.flaky(running.instant.disk).failing = ""
            await self._end(running.job, cancel=running.job.options.sync == "none")
            assert running.job.error is None or isinstance(running.job.error, Flake)
        for disk in DISKS:
            self.flaky(disk).failing = ""
        self.bitmaps_mark_what_the_model_marks()
        while self.ended:
            await self._restore(self.jobs.pop(self.ended.pop(0)))
        assert all(bitmap.holders == [] for disk in DISKS for bitmap in self.graph.node(disk).bitmaps.values())
        assert all(guest.node.name == disk for disk, guest in self.guests.items())
        await self.graph.close()


PLAIN: list[dict[str, Any]] = [{"sync": "full"}]

WITH_BITMAP: list[dict[str, Any]] = [
    {"sync": "full", "bitmap_mode": "on-success"},
    {"sync": "full", "bitmap_mode": "always"},
    {"sync": "incremental"},
    {"sync": "incremental"},
    {"sync": "differential"},
    {"sync": "bitmap", "bitmap_mode": "always"},
    {"sync": "bitmap", "bitmap_mode": "always"},
    {"sync": "full", "bitmap_mode": "on-success", "bitmap_use": "reduce"},
    {"sync": "none", "bitmap_mode": "always"},
    {"sync": "none"},
]


TestBackups = Backups.TestCase
TestBackups.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
