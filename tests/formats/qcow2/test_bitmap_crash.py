# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Power failures while bitmaps are marked, saved, resized and removed: every prefix of the writes between flushes, and
random subsets of them with torn writes.

In each state qemu-img check finds no corruption, and a bitmap is in use (and of no use to anybody), or not there, or it
marks all that differs from the disk as it was when the bitmap was empty.
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
from helpers.qcow2 import QEMU, check, create, over

from blockgraph.bitmaps import DirtyBitmap
from blockgraph.filters.log_writes import LogWrites
from blockgraph.formats.qcow2 import Qcow2
from blockgraph.native import Bitmap
from blockgraph.node import Node
from blockgraph.testing.write_log import WriteLog

pytestmark = [QEMU, pytest.mark.timeout(300)]
DISK = 256 << 10
GRANULE = 512


class Since(NamedTuple):
    """From the mark of that number on, bitmaps that were empty then hold what changed since."""

    number: int
    contents: bytes
    names: frozenset[str]


class Sessions:
    """An image whose writes are recorded; it is opened, written, closed and opened again.

    Attributes:
        since: the moments at which bitmaps were begun.
    """

    def __init__(self, between: Node, log: Node, before: bytes) -> None:
        self.between = between
        self.log = log
        self.before = before
        self.model = bytearray(DISK)
        self.since: list[Since] = []

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Qcow2]:
        """One session; at its end the bitmaps are saved, as the graph does it."""
        async with over(self.between) as driver:
            node = driver.node
            assert node.bitmap_store is not None
            node.bitmaps = {bitmap.name: bitmap for bitmap in await node.bitmap_store.load()}
            yield driver
            await node.flush()
            await node.bitmap_store.save()

    async def begin(self, driver: Qcow2, *names: str) -> None:
        """New, empty bitmaps instead of those of these names."""
        store = driver.node.bitmap_store
        assert store is not None
        await store.begin()
        for name in names:
            driver.node.bitmaps[name] = DirtyBitmap(name, driver.size(), GRANULE, persistent=True)
        self.since.append(Since(len(self.since), bytes(self.model), frozenset(names)))
        assert isinstance(self.between.driver, LogWrites)
        await self.between.driver.mark(str(len(self.since) - 1))

    async def write(self, driver: Qcow2, offset: int, data: bytes) -> None:
        await write(edge(driver.node), offset, data)
        self.model[offset : offset + len(data)] = data


@asynccontextmanager
async def recorded(directory: Path, **options: object) -> AsyncIterator[Sessions]:
    """Sessions over an empty image."""
    await create(directory / "empty", DISK, **options)
    before = (directory / "empty").read_bytes()
    file, log = make_node("memory", "memory", size=0), make_node("memory", "log", size=0)
    for node in (file, log):
        await node.driver.open()
        await hold(node, EVERYTHING)
    await write(edge(file), 0, before)
    between = make_node("log-writes", "between", file="file", log="log")
    put_child(between, "file", file)
    put_child(between, "log", log)
    await between.driver.open()
    await between.driver.attached()
    await hold(between, EVERYTHING)
    yield Sessions(between, log, before)


async def judge(sessions: Sessions, directory: Path, seed: int, states: int) -> tuple[int, int]:
    """Judge sampled crash states; returns how many there were, and how many bitmaps that could be used."""
    assert isinstance(sessions.between.driver, LogWrites)
    await sessions.between.driver.sync_log()
    log = await WriteLog.read(sessions.log)
    crashes = list(log.crash_states(sessions.before, seed=seed, subsets=3))
    if len(crashes) > states:
        crashes = random.Random(seed).sample(crashes, states)
    image = directory / "crash.qcow2"
    usable = 0
    for crash in crashes:
        image.write_bytes(crash.image)
        check(image, leaks=True)
        begun = [since for since in sessions.since if log.marks[str(since.number)] <= crash.completed]
        usable += await check_bitmaps(bytes(crash.image), begun, crash.describe())
    return len(crashes), usable


async def check_bitmaps(image: bytes, begun: list[Since], where: str) -> int:
    """The bitmaps of an image mark all that changed; returns how many of them there are."""
    file = make_node("memory", "crashed", size=0)
    await file.driver.open()
    await hold(file, EVERYTHING)
    await write(edge(file), 0, image)
    usable = 0
    async with over(file, read_only=True, backing=None) as driver:
        assert driver.node.bitmap_store is not None
        bitmaps = await driver.node.bitmap_store.load()
        data = await read(edge(driver.node), 0, driver.size())
        for bitmap in bitmaps:
            if bitmap.inconsistent:
                continue
            usable += 1
            # Before a bitmap is begun, the one of that name on disk is durably in use.
            old = [since.contents for since in begun if bitmap.name in since.names]
            assert old, f"bitmap '{bitmap.name}' was never begun: {where}"
            missed = changes(old[-1], data) - marked(bitmap.contents())
            assert not missed, f"bitmap '{bitmap.name}' missed {sorted(missed)}: {where}"
    return usable


def changes(before: bytes, after: bytes) -> set[int]:
    """Granules that differ."""
    return {
        at
        for at in range(0, min(len(before), len(after)), GRANULE)
        if before[at : at + GRANULE] != after[at : at + GRANULE]
    }


def marked(bits: Bitmap) -> set[int]:
    """Offsets of marked granules."""
    return {at for start, length in bits.dirty_extents() for at in range(start, start + length, GRANULE)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cluster_size", [512, 4096])
@in_loop
async def test_crash_at_any_point_never_leaves_a_bitmap_that_missed_a_write(
    tmpfs: Path, cluster_size: int, seed: int
) -> None:
    rng = random.Random(seed)
    async with recorded(tmpfs, cluster_size=cluster_size) as sessions:
        number = 0
        for session in range(5):
            async with sessions.opened() as driver:
                if session == 0:
                    await sessions.begin(driver, "a", "b")
                elif session == 2:
                    await sessions.begin(driver, "b", "c")
                elif session == 4:
                    del driver.node.bitmaps["a"]
                for _ in range(rng.randrange(1, 9)):
                    number += 1
                    offset = rng.randrange(DISK // 512 - 16) * 512
                    await sessions.write(driver, offset, bytes([number]) * rng.choice([512, 4096]))
                    if rng.random() < 0.3:
                        await driver.node.flush()
        states, usable = await judge(sessions, tmpfs, seed, 60)
        assert states > 50
        assert usable > 3


@pytest.mark.parametrize("name", [None, "base.raw", "b" * 250], ids=["alone", "backed", "long-name"])
@in_loop
async def test_crash_while_the_first_bitmap_comes_and_the_last_one_goes(tmpfs: Path, name: str | None) -> None:
    names = {} if name is None else {"backing_file": name, "backing_fmt": "raw"}
    (tmpfs / (name or "none")).write_bytes(bytes(DISK))
    async with recorded(tmpfs, cluster_size=1024, **names) as sessions:
        for _ in range(2):
            async with sessions.opened() as driver:
                await sessions.begin(driver, "a")
                await sessions.write(driver, 0, b"x" * 512)
            async with sessions.opened() as driver:
                assert driver.node.bitmap_store is not None
                await driver.node.bitmap_store.begin()
                driver.node.bitmaps.clear()
        states, usable = await judge(sessions, tmpfs, 1, 1000)
        assert states > 50
        assert usable


@in_loop
async def test_crash_while_a_disk_with_bitmaps_is_resized(tmpfs: Path) -> None:
    async with recorded(tmpfs, cluster_size=512) as sessions:
        for size in (DISK // 2, 4 * DISK, DISK):
            async with sessions.opened() as driver:
                if not sessions.since:
                    await sessions.begin(driver, "a")
                    await sessions.write(driver, 1000, b"x" * 3000)
                await edge(driver.node).truncate(size)
                await sessions.write(driver, size // 4, b"y" * 512)
        states, usable = await judge(sessions, tmpfs, 2, 150)
        assert states > 80
        assert usable > 5


@in_loop
async def test_image_that_was_not_closed_is_written_on(tmpfs: Path) -> None:
    """After a crash: bitmaps in use stay so, new ones are begun, and all of it is consistent through another crash."""
    async with recorded(tmpfs, cluster_size=512) as sessions:
        async with sessions.opened() as driver:
            await sessions.begin(driver, "a")
            await sessions.write(driver, 0, b"x" * 4096)
        async with over(sessions.between) as driver:  # ends without saving
            await sessions.write(driver, 8192, b"y" * 4096)
        async with sessions.opened() as driver:
            assert driver.node.bitmaps["a"].inconsistent
            await sessions.begin(driver, "b")
            await sessions.write(driver, 65536, b"z" * 4096)
        states, usable = await judge(sessions, tmpfs, 3, 150)
        assert states > 20
        assert usable


def test_a_missed_write_would_be_found() -> None:
    """The judge of this file judges."""
    bits = Bitmap(DISK, GRANULE)
    bits.set(0, GRANULE)
    assert changes(bytes(DISK), b"x" * 513 + bytes(DISK)) - marked(bits) == {GRANULE}
