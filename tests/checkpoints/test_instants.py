# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Views, exports and backups of checkpoints: two disks at one instant, byte for byte, while they are written."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.backup import content, fault, memory
from helpers.loop import graph_of, in_loop

from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.checkpoints import Checkpoints
from blockgraph.errors import GraphError, NodeInUse, OptionError
from blockgraph.exports.nbd import NbdServer, start_server
from blockgraph.exports.options import NbdServerOptions, UnixAddress
from blockgraph.jobs.manager import JobManager
from blockgraph.testing.nbd_client import NbdClient
from tests.helpers.nbd import run_tool

GRANULE = 64 << 10
GRANULES = 16
SIZE = GRANULES * GRANULE
DISKS = ("a", "b")


class Guest:
    """One writer of both disks, one write after the other; knows what they held after each.

    Attributes:
        begun, ended: writes.
    """

    def __init__(self, guests: dict[str, Backend], seed: int) -> None:
        self._guests = guests
        self._rng = random.Random(seed)
        self._writes: list[tuple[str, int, bytes]] = []
        self._step = asyncio.Event()
        self.going = True
        self.ended = 0
        self.native = 0

    @property
    def begun(self) -> int:
        return len(self._writes)

    async def run(self) -> None:
        while self.going:
            await self.write()
            await asyncio.sleep(0)

    async def write(self) -> None:
        length = self._rng.choice([512, 4096, GRANULE, 2 * GRANULE])
        offset = self._rng.randrange((SIZE - length) // 512) * 512
        disk, data = self._rng.choice(DISKS), self._rng.randbytes(length)
        self._writes.append((disk, offset, data))
        extents = self._guests[disk].use_map().extents
        if await asyncio.to_thread(extents.pwrite, offset, data):
            self.native += 1
        else:
            await self._guests[disk].pwrite(offset, data)
        self.ended += 1
        self._step.set()

    async def more(self, count: int) -> None:
        wanted = self.ended + count
        while self.ended < wanted:
            self._step.clear()
            await self._step.wait()

    def disks(self, count: int) -> dict[str, bytes]:
        """What both held after so many writes."""
        held = {disk: bytearray(SIZE) for disk in DISKS}
        for disk, offset, data in self._writes[:count]:
            held[disk][offset : offset + len(data)] = data
        return {disk: bytes(data) for disk, data in held.items()}

    def touched(self, disk: str, first: int, end: int) -> set[int]:
        """Granules of the writes from `first` to before `end`."""
        return {
            granule
            for which, offset, data in self._writes[first:end]
            if which == disk
            for granule in range(offset // GRANULE, (offset + len(data) - 1) // GRANULE + 1)
        }

    def instant(self, seen: dict[str, bytes], between: tuple[int, int]) -> int:
        """The number of writes after which both disks were as they were seen.

        A write that was held by the checkpoint had begun and is not in what was seen.
        """
        for count in range(between[0], between[1] + 1):
            if self.disks(count) == seen:
                return count
        raise AssertionError("the disks never were so at one instant")


@asynccontextmanager
async def running(directory: Path, seed: int = 0) -> AsyncIterator[tuple[AsyncGraph, Guest]]:
    """Both disks in files, and the guest, which is not writing yet."""
    for disk in DISKS:
        (directory / disk).write_bytes(bytes(SIZE))
    nodes = [{"driver": "file", "node-name": disk, "filename": str(directory / disk)} for disk in DISKS]
    async with graph_of(*nodes) as graph:
        yield graph, Guest({disk: await graph.backend(disk, writable=True) for disk in DISKS}, seed)


def kept(*disks: str) -> dict[str, dict[str, Any]]:
    return {disk: {"driver": "memory", "size": SIZE} for disk in disks}


def dirty(graph: AsyncGraph, disk: str, name: str) -> set[int]:
    return {n for at, length in graph.dirty_extents(disk, name) for n in range(at // GRANULE, (at + length) // GRANULE)}


@pytest.mark.parametrize("epochs", [False, True], ids=["bitmaps", "epochs"])
@pytest.mark.parametrize("seed", range(4))
def test_views_of_two_disks_are_of_one_instant(tmpfs: Path, seed: int, epochs: bool) -> None:
    """And the bitmap in them has what changed between two instants: three checkpoints, all views open at the end."""

    @in_loop
    async def run() -> None:
        async with running(tmpfs, seed) as (graph, guest):
            checkpoints = Checkpoints(graph, epochs=epochs)
            writing = asyncio.create_task(guest.run())
            between: dict[str, tuple[int, int]] = {}
            for name in ("one", "two", "three"):
                await guest.more(6)
                before = guest.ended
                made = await checkpoints.create(name, DISKS, view=kept(*DISKS))
                between[name] = before, guest.begun
                assert set(made.full) == (set(DISKS) if name == "one" else set())
            await guest.more(20)
            instants: dict[str, int] = {}
            for name, bounds in between.items():
                view = checkpoints.view(name)
                seen = {disk: await content(graph, view.disks[disk].access) for disk in DISKS}
                instants[name] = guest.instant(seen, bounds)
            guest.going = False
            await writing
            assert guest.native
            for since, name in (("one", "two"), ("two", "three")):
                for disk, shown in checkpoints.view(name).disks.items():
                    assert shown.bitmap == f"{since}..{name}"
                    assert dirty(graph, disk, shown.bitmap) == guest.touched(disk, instants[since], instants[name])
            with pytest.raises(NodeInUse, match="the view of checkpoint 'two' is open"):
                await checkpoints.delete("two")
            for name in ("two", "one", "three"):
                await checkpoints.close_view(name)
            assert {node.name for node in graph.nodes()} == set(DISKS)
            assert all(bitmap.name.startswith("checkpoint:") for bitmap in graph.bitmaps())

    run()


@in_loop
async def test_backups_of_one_instant_and_an_added_disk(tmpfs: Path) -> None:
    """Monday "a" alone; tuesday "b" is new and copied as a whole; then all is incremental, over what was there."""
    async with running(tmpfs) as (graph, guest):
        checkpoints, jobs = Checkpoints(graph), JobManager(graph)
        for disk in DISKS:
            await graph.add_node(memory(f"copy-{disk}", SIZE))
        writing = asyncio.create_task(guest.run())
        for name, disks, full in (
            ("monday", ("a",), {"a": "there is no checkpoint before this one"}),
            ("tuesday", DISKS, {"b": "the disk was not in checkpoint 'monday'"}),
            ("wednesday", DISKS, {}),
            ("thursday", DISKS, {}),
        ):
            await guest.more(5)
            before = guest.ended
            backups = await checkpoints.backup(name, jobs, {disk: f"copy-{disk}" for disk in disks}, grouped=True)
            between = before, guest.begun
            assert backups.checkpoint.full == full
            assert {disk for disk, job in backups.jobs.items() if job.options.sync == "full"} == set(full)
            await guest.more(5)
            await backups.wait()
            assert [job.error for job in backups.jobs.values()] == [None] * len(disks)
            if disks == DISKS:
                seen = {disk: await content(graph, f"copy-{disk}") for disk in DISKS}
                guest.instant(seen, between)
        guest.going = False
        await writing
        assert [each.name for each in checkpoints.list()] == ["monday", "tuesday", "wednesday", "thursday"]
        assert all(bitmap.name.startswith("checkpoint:") for bitmap in graph.bitmaps())


@in_loop
async def test_checkpoint_of_a_failed_backup_is_deleted_and_nothing_lost(tmpfs: Path) -> None:
    async with running(tmpfs) as (graph, guest):
        checkpoints, jobs = Checkpoints(graph), JobManager(graph)
        rules = [{"event": "none", "iotype": "write", "errno": "EIO"}]
        for node in (memory("copy-a", SIZE), memory("lost", SIZE), fault("bad", "lost", **{"inject-error": rules})):
            await graph.add_node(node)
        first = await checkpoints.backup("one", jobs, {"a": "copy-a"})
        await first.wait()
        for _ in range(20):
            await guest.write()
        failed = await checkpoints.backup("two", jobs, {"a": "bad"})
        await failed.wait()
        assert failed.jobs["a"].error is not None
        await guest.write()
        await checkpoints.delete("two")
        third = await checkpoints.backup("three", jobs, {"a": "copy-a"})
        await third.wait()
        assert third.checkpoint.full == {}
        assert third.jobs["a"].options.sync == "differential"
        assert await content(graph, "copy-a") == guest.disks(guest.ended)["a"]


def state(graph: AsyncGraph) -> object:
    return [node.name for node in graph.nodes()], graph.bitmaps(), [backend.name for backend in graph.backends()]


@pytest.mark.parametrize("epochs", [False, True], ids=["bitmaps", "epochs"])
@in_loop
async def test_when_one_disk_refuses_nothing_has_happened(tmpfs: Path, epochs: bool) -> None:
    async with running(tmpfs) as (graph, guest):
        checkpoints, jobs = Checkpoints(graph, epochs=epochs), JobManager(graph)
        await checkpoints.create("one", DISKS)
        for _ in range(6):
            await guest.write()
        await graph.add_bitmap("b", "one..two")  # the name that the second disk needs
        await graph.add_node(memory("copy", SIZE))
        before = state(graph)
        with pytest.raises(GraphError, match=r"'b'.*there already is a bitmap 'one\.\.two'"):
            await checkpoints.create("two", DISKS, view=kept(*DISKS))
        with pytest.raises(GraphError, match=r"'b'.*there already is a bitmap 'one\.\.two'"):
            await checkpoints.backup("two", jobs, {"a": "copy", "b": {"driver": "memory", "size": SIZE}})
        small = {"a": {"driver": "memory", "size": SIZE}, "b": {"driver": "memory", "size": SIZE - 512}}
        with pytest.raises(GraphError, match="but the disk"):
            await checkpoints.create("three", DISKS, view=small)
        with pytest.raises(OptionError, match="bitmap-mode"):
            await checkpoints.backup("three", jobs, {"a": "copy"}, bitmap_mode="always")
        assert state(graph) == before
        assert checkpoints.views == {}
        assert jobs.jobs == {}
        for disk in DISKS:
            bits = checkpoints.since("one", disk)
            found = {n for at, length in bits.dirty_extents() for n in range(at // GRANULE, (at + length) // GRANULE)}
            assert found == guest.touched(disk, 0, 6)
        await graph.remove_bitmap("b", "one..two")
        await checkpoints.create("two", DISKS, view=kept(*DISKS))
        assert set(checkpoints.view("two").disks) == set(DISKS)


async def listening(path: Path) -> NbdServer:
    return await start_server(NbdServerOptions(addr=UnixAddress(path=str(path))))


@in_loop
async def test_changes_since_a_checkpoint_are_pulled(require_tool: Callable[[str], str], tmpfs: Path) -> None:
    """nbdinfo --map shows them; reading just these brings a copy of the older instant to the newer one."""
    nbdinfo = require_tool("nbdinfo")
    async with running(tmpfs) as (graph, guest):
        checkpoints, server = Checkpoints(graph), await listening(tmpfs / "s")
        for _ in range(10):
            await guest.write()
        await checkpoints.create("one", DISKS)
        copies = {disk: bytearray(data) for disk, data in guest.disks(guest.ended).items()}
        await guest.write()
        await checkpoints.create("between", ["a"])
        for _ in range(3):
            await guest.write()
        await checkpoints.create("two", DISKS, view=kept(*DISKS), since="one")
        instant = guest.ended
        added = await checkpoints.export("two", server, name="vm-{disk}")
        assert [each.options.export_name for each in added] == ["vm-a", "vm-b"]
        for _ in range(10):
            await guest.write()
        context = "qemu:dirty-bitmap:one..two"
        for disk, copy in copies.items():
            uri = f"nbd+unix:///vm-{disk}?socket={tmpfs / 's'}"
            told = json.loads(await run_tool(nbdinfo, "--json", f"--map={context}", uri))
            changed = [(each["offset"], each["length"]) for each in told if each["type"] & 1]
            granules = {n for at, length in changed for n in range(at // GRANULE, (at + length) // GRANULE)}
            assert granules == guest.touched(disk, 10, instant)
            async with await NbdClient.connect_unix(str(tmpfs / "s"), f"vm-{disk}") as client:
                for at, length in changed:
                    copy[at : at + length] = await client.pread(at, length)
            assert copy == guest.disks(instant)[disk] != guest.disks(guest.ended)[disk]
        await checkpoints.close_view("two", hard=True)
        assert {node.name for node in graph.nodes()} == set(DISKS)
        with pytest.raises(GraphError, match="no view of checkpoint 'two' is open"):
            await checkpoints.export("two", server)
        await server.close()


@in_loop
async def test_export_of_what_is_not_in_the_view(tmpfs: Path) -> None:
    async with running(tmpfs) as (graph, _):
        checkpoints, server = Checkpoints(graph), await listening(tmpfs / "s")
        await checkpoints.create("one", DISKS, view=kept("a"))
        before = state(graph)
        with pytest.raises(GraphError, match=r"'b': .*not in the view of checkpoint 'one'"):
            await checkpoints.export("one", server, disks=["a", "b"])
        assert state(graph) == before
        (added,) = await checkpoints.export("one", server)
        assert added.options.bitmaps == ()  # only a full backup is possible
        reader = await graph.backend(checkpoints.view("one").disks["a"].access)
        with pytest.raises(NodeInUse):
            await checkpoints.close_view("one")
        await graph.close_backend(reader)
        await checkpoints.close_view("one")
        assert {node.name for node in graph.nodes()} == set(DISKS)
        await server.close()


@in_loop
async def test_view_whose_end_or_exports_are_cancelled_at_any_step_can_be_closed(tmpfs: Path) -> None:
    """A change that was under way is completed, though nobody waits for it any more: what it did is known."""
    async with running(tmpfs) as (graph, _):
        checkpoints, server = Checkpoints(graph), await listening(tmpfs / "s")
        outcomes = set()
        for steps in range(60):
            name = str(steps)
            await checkpoints.create(name, ["a"], view=kept("a"))
            for change in (checkpoints.export(name, server), checkpoints.close_view(name)):
                task = asyncio.ensure_future(change)
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait({task})
                outcomes.add((task.cancelled(), name in checkpoints.views))
            if name in checkpoints.views:
                await checkpoints.close_view(name)
            assert {node.name for node in graph.nodes()} == set(DISKS)
            await checkpoints.delete(name)
        assert {(True, True), (True, False)} <= outcomes
        await server.close()
