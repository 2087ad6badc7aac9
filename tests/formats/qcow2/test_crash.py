# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Power failures: every prefix of the writes between flushes, and random subsets of them with torn writes.

A state must be one that qemu-img check finds no corruption in (leaks are allowed), and that holds what was flushed.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.harness import EVERYTHING, edge, hold, make_node, put_child, read, write
from helpers.loop import in_loop
from helpers.qcow2 import QEMU, check, memory_image, over

from blockgraph.filters.log_writes import LogWrites
from blockgraph.flags import Flag
from blockgraph.node import Child, Node
from blockgraph.testing.write_log import WriteLog

pytestmark = [QEMU, pytest.mark.timeout(300)]
DISK = 96 << 10


class Known(NamedTuple):
    """From the mark of that number in the log on, the disk may hold these contents; if `flushed`, at least these."""

    number: int
    contents: bytes
    flushed: bool = False


class Recorder:
    """A disk over an image whose writes are recorded; knows what every sector may be after a crash."""

    def __init__(self, disk: Child, log: Node, recorded: LogWrites) -> None:
        self.disk = disk
        self.log = log
        self.recorded = recorded
        self.model = bytearray(disk.node.size())
        self.history: list[Known] = []

    async def note(self, *, flushed: bool = False) -> None:
        self.history.append(Known(len(self.history), bytes(self.model), flushed))
        await self.recorded.mark(str(len(self.history) - 1))

    async def write(self, offset: int, data: bytes) -> None:
        await self.note()
        self.model[offset : offset + len(data)] = data
        await self.note()
        await write(self.disk, offset, data)

    async def zero(self, offset: int, length: int, flags: Flag) -> None:
        await self.note()
        self.model[offset : offset + length] = bytes(length)
        await self.note()
        await self.disk.pwrite_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self.note()
        await self.disk.discard(offset, length)
        self.model[offset : offset + length] = await read(self.disk, offset, length)
        await self.note()

    async def flush(self) -> None:
        await self.disk.flush()
        await self.note(flushed=True)

    def allowed(self, log: WriteLog, completed: int) -> list[bytes]:
        """What the disk's sectors may hold when the power fails then: what was flushed last, or came later."""
        before = [known for known in self.history if log.marks[str(known.number)] < completed]
        since = max((known.number for known in before if known.flushed), default=0)
        return [known.contents for known in before if known.number >= since] or [self.history[0].contents]


@asynccontextmanager
async def recorded(cluster_size: int, compat: str, *, base: bool = False) -> AsyncIterator[tuple[Recorder, bytes]]:
    """A recorder, and the image before the first write."""
    names = {"backing_file": "base.raw", "backing_fmt": "raw"} if base else {}
    file = await memory_image(DISK, cluster_size=cluster_size, compat=compat, **names)
    before = await read(edge(file), 0, file.size())
    log = make_node("memory", "log", size=0)
    await log.driver.open()
    await hold(log, EVERYTHING)
    between = make_node("log-writes", "between", file="file", log="log")
    put_child(between, "file", file)
    put_child(between, "log", log)
    await between.driver.open()
    await between.driver.attached()
    await hold(between, EVERYTHING)
    backing = {}
    if base:
        node = make_node("memory", "base", size=DISK)
        await node.driver.open()
        await hold(node, EVERYTHING)
        await write(edge(node), 0, base_bytes())
        backing["backing"] = node
    async with over(between, **backing) as driver:
        assert isinstance(between.driver, LogWrites)
        recorder = Recorder(edge(driver.node), log, between.driver)
        if base:
            recorder.model[:] = base_bytes()
        await recorder.note()
        yield recorder, before


def base_bytes() -> bytes:
    return bytes(i // 512 % 255 + 1 for i in range(DISK))


def without_beginning(log: WriteLog, start: int, before: bytes) -> bytes:
    """Drop the entries before `start`; returns the disk that the log then begins with."""
    base = bytes(log.replay(start, before))
    log.entries = [entry._replace(number=number) for number, entry in enumerate(log.entries[start:])]
    return base


async def judge(recorder: Recorder, before: bytes, directory: Path, seed: int, states: int) -> int:
    """Every sampled crash state is consistent and holds what was flushed. Returns how many there were."""
    await recorder.flush()
    log = await WriteLog.read(recorder.log)
    crashes = list(log.crash_states(before, seed=seed, subsets=3))
    rng = random.Random(seed)
    if len(crashes) > states:
        crashes = rng.sample(crashes, states)
    image = directory / "crash.qcow2"
    (directory / "base.raw").write_bytes(base_bytes())
    for crash in crashes:
        image.write_bytes(crash.image)
        check(image, leaks=True)
        allowed = recorder.allowed(log, crash.completed)
        await check_contents(recorder, bytes(crash.image), allowed, crash.describe())
    return len(crashes)


async def check_contents(recorder: Recorder, image: bytes, allowed: list[bytes], where: str) -> None:
    file = make_node("memory", "crashed", size=0)
    await file.driver.open()
    await hold(file, EVERYTHING)
    await write(edge(file), 0, image)
    base = recorder.disk.node.children.get("backing")
    async with over(file, read_only=True, **({"backing": base.node} if base else {"backing": None})) as driver:
        data = await read(edge(driver.node), 0, DISK)
    for sector in range(DISK // 512):
        at = slice(sector * 512, sector * 512 + 512)
        assert any(data[at] == contents[at] for contents in allowed), f"sector {sector}: {where}"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("base", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("cluster_size, compat", [(512, "1.1"), (1024, "0.10"), (4096, "1.1")])
@in_loop
async def test_crash_at_any_point_leaves_a_consistent_image(
    tmpfs: Path, cluster_size: int, compat: str, base: bool, seed: int
) -> None:
    rng = random.Random(seed)
    async with recorded(cluster_size, compat, base=base) as (recorder, before):
        for number in range(1, 45):
            offset = rng.randrange(DISK // 512) * 512
            length = min(rng.choice([512, 512, 4096, 20000 // 512 * 512]), DISK - offset)
            match rng.choice("wwwwzudff"):
                case "w":
                    await recorder.write(offset, bytes([number]) * length)
                case "z":
                    await recorder.zero(offset, length, Flag.NONE)
                case "u":
                    await recorder.zero(offset, length, Flag.MAY_UNMAP)
                case "d":
                    await recorder.discard(offset, length)
                case _:
                    await recorder.flush()
        assert await judge(recorder, before, tmpfs, seed, 25)


@in_loop
async def test_crash_while_clusters_are_reused_never_shows_other_data(tmpfs: Path) -> None:
    """Freed clusters go to other guest clusters and to tables at once; an old entry must not lead to them."""
    async with recorded(512, "1.1") as (recorder, before):
        rng = random.Random(7)
        for number in range(1, 60):
            cluster = rng.randrange(DISK // 512)
            if number % 3:
                await recorder.write(cluster * 512, bytes([number]) * 512)
            else:
                first = rng.randrange(DISK // 512 - 64)
                await recorder.discard(first * 512, 64 * 512)
            if number % 5 == 0:
                await recorder.flush()
        assert await judge(recorder, before, tmpfs, 7, 60)


@in_loop
async def test_crash_while_the_refcount_table_grows_leaves_a_consistent_image(tmpfs: Path) -> None:
    """512-byte clusters: a table cluster reaches 8 MiB, so an 18 MiB disk makes it grow."""
    size = 18 << 20
    file = await memory_image(size, cluster_size=512)
    before = await read(edge(file), 0, file.size())
    log = make_node("memory", "log", size=0)
    await log.driver.open()
    await hold(log, EVERYTHING)
    between = make_node("log-writes", "between", file="file", log="log")
    put_child(between, "file", file)
    put_child(between, "log", log)
    await between.driver.open()
    await between.driver.attached()
    await hold(between, EVERYTHING)
    async with over(between) as driver:
        disk = edge(driver.node)
        clusters = driver.image.header.reftable_clusters
        step = 1 << 20
        for offset in range(0, 8 << 20, step):
            await write(disk, offset, b"a" * step)
        await disk.flush()
        start = len(await WriteLog.read(log))
        await write(disk, 8 << 20, b"b" * (200 << 10))
        await disk.flush()
        await write(disk, 17 << 20, b"c" * 512)
        await disk.flush()
        assert driver.image.header.reftable_clusters > clusters
        writes = await WriteLog.read(log)
    image = tmpfs / "crash.qcow2"
    image.write_bytes(await read(edge(file), 0, file.size()))
    check(image)
    base = without_beginning(writes, start, before)
    crashes = list(writes.crash_states(base, seed=1, prefixes=False, subsets=4))
    for crash in crashes:
        image.write_bytes(crash.image)
        check(image, leaks=True)
    assert len(crashes) >= 20


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@in_loop
async def test_crash_while_the_disk_is_resized_keeps_the_rest(tmpfs: Path, compat: str) -> None:
    async with recorded(512, compat, base=True) as (recorder, before):
        disk = recorder.disk
        await recorder.write(0, b"\xff" * DISK)  # no byte of the backing file
        await recorder.flush()
        # The L1 table has 64 entries in its cluster and moves when the disk gets more than 2 MiB.
        for size in (DISK // 2, DISK - 512, DISK // 2, DISK * 4, 3 << 20, DISK):
            await disk.truncate(size)
        await recorder.recorded.sync_log()
        log = await WriteLog.read(recorder.log)
        image = tmpfs / "crash.qcow2"
        (tmpfs / "base.raw").write_bytes(base_bytes())
        start = log.marks[str(recorder.history[-1].number)]
        base = without_beginning(log, start, before)
        for crash in log.crash_states(base, seed=3, subsets=8):
            image.write_bytes(crash.image)
            check(image, leaks=True)
            file = make_node("memory", "crashed", size=0)
            await file.driver.open()
            await hold(file, EVERYTHING)
            await write(edge(file), 0, bytes(crash.image))
            base_node = disk.node.children["backing"].node
            async with over(file, read_only=True, backing=base_node) as driver:
                data = await read(edge(driver.node), 0, driver.size())
                assert data[: DISK // 2] == b"\xff" * (DISK // 2)
                # Neither the backing file's bytes nor, in a disk that grew again, those cut off.
                assert set(data[DISK // 2 : DISK]) <= {0, 255}, crash.describe()
                assert set(data[DISK:]) <= {0}, crash.describe()
