# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Chain jobs of several disks in one transaction: one point in time, and with completion mode "grouped" one fate."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.backup import fault
from helpers.loop import driver_of, graph_of, in_loop

from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.chains import Chain
from blockgraph.chains.restore import restore
from blockgraph.errors import BlockGraphError
from blockgraph.filters.fault_rules import FaultRules, InjectRule
from blockgraph.filters.inject_error import InjectError
from blockgraph.jobs.backup import BackupJob
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions

MIB = 1 << 20
SIZE = 4 * MIB


class Pair:
    """Disks "a" and "b", each with a chain.

    Attributes:
        references: what both disks were at each backup that should be there.
    """

    def __init__(self, folder: Path, graph: AsyncGraph, guests: dict[str, Backend], image_format: str) -> None:
        self.folder = folder
        self.graph = graph
        self.guests = guests
        self.manager = JobManager(graph)
        self.references: list[dict[str, bytes]] = []
        self._format = image_format

    async def write(self, source: random.Random) -> None:
        for guest in self.guests.values():
            for _ in range(3):
                await guest.pwrite(source.randrange(SIZE - 5000), source.randbytes(5000))

    async def contents(self) -> dict[str, bytes]:
        return {disk: await guest.pread(0, SIZE) for disk, guest in self.guests.items()}

    def options(self, disk: str, mode: str, **more: Any) -> BackupOptions:
        members = {"sync": "incremental", "chain": str(self.folder / disk), "chain_format": self._format, **more}
        return BackupOptions(device=f"{disk}-top", completion_mode=mode, **members)  # type: ignore[arg-type]

    async def start(self, mode: str, **more: Any) -> dict[str, BackupJob]:
        """`a`, `b` in `more`: further members of one."""
        options = [self.options(disk, mode, **more.get(disk, {})) for disk in "ab"]
        return dict(zip("ab", await self.manager.backups(options), strict=True))

    async def backup(self, mode: str) -> None:
        """One that succeeds; it is judged by `check`."""
        self.references.append(await self.contents())
        jobs = await self.start(mode)
        for job in jobs.values():
            await job.wait()
            assert job.error is None

    async def check(self, disks: str = "ab") -> None:
        """Every point of the disks is what they were."""
        for disk in disks:
            chain = Chain.load(str(self.folder / disk))
            assert not chain.damaged
            points = chain.points()
            assert len(points) == len(self.references)
            for point, reference in zip(points, self.references, strict=True):
                out = self.folder / "restored"
                await restore(chain, point, str(out), force=True)
                assert out.read_bytes() == reference[disk]

    def kinds(self) -> list[list[str]]:
        """Of the backups of each disk."""
        return [[point.manifest.kind for point in Chain.load(str(self.folder / disk)).points()] for disk in "ab"]

    def files(self) -> dict[str, set[str]]:
        """What is in the directories."""
        return {disk: {path.name for path in (self.folder / disk).glob("*")} for disk in "ab"}


@asynccontextmanager
async def pair(folder: Path, image_format: str) -> AsyncIterator[Pair]:
    nodes: list[dict[str, Any]] = []
    for disk in "ab":
        (folder / f"{disk}.img").write_bytes(random.Random(disk).randbytes(SIZE))
        file = {"driver": "file", "filename": str(folder / f"{disk}.img")}
        nodes += [{"driver": "raw", "node-name": disk, "file": file}, fault(f"{disk}-top", disk)]
    async with graph_of(*nodes) as graph:
        guests = {disk: await graph.backend(f"{disk}-top", writable=True) for disk in "ab"}
        yield Pair(folder, graph, guests, image_format)


def formats(test: Any) -> Any:
    return pytest.mark.parametrize("image_format", ["raw", "qcow2"])(test)


@formats
@pytest.mark.parametrize("mode", ["individual", "grouped"])
def test_links_of_several_disks_are_of_one_instant(tmp_path: Path, mode: str, image_format: str) -> None:
    @in_loop
    async def run() -> None:
        async with pair(tmp_path, image_format) as p:
            for number in range(3):
                await p.write(random.Random(number))
                await p.backup(mode)
            await p.check()
            assert p.kinds() == [["full", "incremental", "incremental"]] * 2

    run()


@formats
@pytest.mark.parametrize("how", ["fails", "cancelled"])
def test_group_that_fails_leaves_no_link_and_misses_nothing_later(tmp_path: Path, how: str, image_format: str) -> None:
    """The other job waits to be finalized, with its link complete but for that."""

    @in_loop
    async def run() -> None:
        async with pair(tmp_path, image_format) as p:
            await p.backup("grouped")
            before = p.files()
            await p.write(random.Random(1))
            filter_of_b = driver_of(p.graph, "b-top", InjectError)
            if how == "fails":
                broken = InjectRule(event="none", iotype="read", errno=errno.EIO)
                filter_of_b.rules = FaultRules((broken,), ())
                filter_of_b.rules.reach("none")
            waits = {"auto_finalize": False}
            jobs = await p.start("grouped", a=waits, b=waits)
            if how == "cancelled":
                jobs["b"].cancel()
            for job in jobs.values():
                await job.wait()
            assert (jobs["b"].error is not None) is (how == "fails")
            assert jobs["b"].cancelled is (how == "cancelled")
            assert jobs["a"].cancelled
            filter_of_b.rules = FaultRules((), ())
            assert p.files() == before, "no image, manifest or sums of a link that nobody made"
            await p.write(random.Random(2))
            await p.backup("grouped")
            await p.check()
            assert p.kinds() == [["full", "incremental"]] * 2

    run()


@formats
def test_individual_jobs_of_a_group_keep_what_succeeded(tmp_path: Path, image_format: str) -> None:
    @in_loop
    async def run() -> None:
        async with pair(tmp_path, image_format) as p:
            await p.backup("individual")
            await p.write(random.Random(1))
            p.references.append(await p.contents())
            jobs = await p.start("individual", b={"auto_finalize": False})
            jobs["b"].cancel()
            for job in jobs.values():
                await job.wait()
            assert jobs["a"].error is None
            assert jobs["b"].cancelled
            await p.check("a")
            del p.references[1]
            await p.check("b")

    run()


@formats
def test_link_that_can_not_be_begun_leaves_the_others_unbegun(tmp_path: Path, image_format: str) -> None:
    @in_loop
    async def run() -> None:
        async with pair(tmp_path, image_format) as p:
            (tmp_path / "b").write_text("no directory")
            with pytest.raises(BlockGraphError):
                await p.start("grouped")
            assert p.manager.jobs == {}
            assert [name for disk in "ab" for name in p.graph.node(disk).bitmaps] == []
            assert p.files()["a"] == set()
            (tmp_path / "b").unlink()
            await p.backup("grouped")
            await p.check()

    run()
