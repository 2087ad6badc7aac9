# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Exports that come and go in transactions, with the bitmaps they show."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from blockgraph.backend import Backend
from blockgraph.bitmaps.actions import AddBitmap, BitmapName
from blockgraph.errors import GraphError, NodeInUse
from blockgraph.exports.nbd import AddExport, RemoveExport
from blockgraph.exports.options import NbdExportOptions
from blockgraph.graph.action import Abort
from blockgraph.graph.load import load
from blockgraph.options import BitmapRef
from blockgraph.session import Session
from blockgraph.testing.nbd_client import NbdClient, OptionRefusedError
from tests.helpers.nbd import run_async

GRANULE = 64 << 10
SIZE = 16 * GRANULE
B0 = "qemu:dirty-bitmap:b0"


def memory(name: str, size: int = SIZE) -> dict[str, Any]:
    return {"node-name": name, "driver": "memory", "size": size}


class Running:
    """A session with a disk that has the bitmap 'b0'."""

    def __init__(self, session: Session, guest: Backend, socket: str) -> None:
        self.session = session
        self.graph = session.graph
        self.guest = guest
        self.socket = socket

    async def client(self, name: str, *contexts: str) -> NbdClient:
        return await NbdClient.connect_unix(self.socket, name, contexts=contexts or [B0])

    async def dirty(self, name: str) -> list[int]:
        """Numbers of the granules that an export shows as dirty."""
        async with await self.client(name) as client:
            found = await client.map(B0)
        assert self.session.server is not None
        while self.session.server.connections:  # noqa: ASYNC110  # the server announces it to nobody
            await asyncio.sleep(0.001)
        ends = [sum(length for length, _ in found[: n + 1]) for n in range(len(found))]
        return [
            at // GRANULE
            for (length, flags), end in zip(found, ends, strict=True)
            if flags
            for at in range(end - length, end, GRANULE)
        ]

    def state(self) -> object:
        return (
            [node.name for node in self.graph.nodes()],
            sorted(backend.name for backend in self.graph.backends()),
            self.graph.bitmaps(),
            sorted(self.session.exports),
        )


@asynccontextmanager
async def running(tmp_path: Path, *nodes: dict[str, Any]) -> AsyncIterator[Running]:
    socket = str(tmp_path / "s")
    description = load(
        {
            "nodes": [memory("disk"), memory("kept"), *nodes],
            "bitmaps": [{"node": "disk", "name": "b0"}],
            "nbd-server": {"addr": {"type": "unix", "path": socket}},
        }
    )
    async with await Session.start(description) as session:
        guest = await session.graph.backend("disk", writable=True)
        yield Running(session, guest, socket)


def options(name: str, node: str = "disk", *bitmaps: str | BitmapRef, **more: Any) -> NbdExportOptions:
    return NbdExportOptions(id=name, name=name, node_name=node, bitmaps=bitmaps, **more)


@run_async
async def test_export_shows_what_the_bitmap_held_when_it_was_added(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        await run.guest.pwrite(GRANULE, b"x")
        await run.session.add_export(options("first", "disk", "b0"))
        await run.guest.pwrite(5 * GRANULE, b"x")
        await run.session.add_export(options("second", "disk", BitmapRef(node="disk", name="b0")))
        await run.guest.pwrite(7 * GRANULE, b"x")
        assert await run.dirty("first") == [1]
        assert await run.dirty("second") == [1, 5]
        assert run.graph.dirty_extents("disk", "b0") == [(n * GRANULE, GRANULE) for n in (1, 5, 7)]
        with pytest.raises(NodeInUse, match="bitmap 'b0' is in use by export 'first', export 'second'"):
            await run.graph.remove_bitmap("disk", "b0")
        await run.graph.clear_bitmap("disk", "b0")
        assert await run.dirty("first") == [1]
        for name in ("first", "second"):
            await run.session.remove_export(name)
        await run.graph.remove_bitmap("disk", "b0")


@run_async
async def test_writable_export_of_a_bitmap_that_records(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        await run.session.add_export(options("rw", "disk", "b0", writable=True))
        async with await run.client("rw") as client:
            await client.pwrite(0, b"x" * 512)
            assert await client.map(B0) == [(SIZE, 0)]
        assert run.graph.dirty_extents("disk", "b0") == [(0, GRANULE)]


@run_async
async def test_name_is_looked_for_on_what_the_node_shows(tmp_path: Path) -> None:
    overlay = {"driver": "delay", "node-name": "top", "file": "disk"}
    raw = {"driver": "raw", "node-name": "raw", "file": "top"}
    window = {"driver": "raw", "node-name": "window", "file": "kept", "size": GRANULE, "offset": 0}
    async with running(tmp_path, overlay, raw, window) as run:
        await run.guest.pwrite(GRANULE, b"\0")
        await run.session.add_export(options("e", "raw", "b0"))
        assert await run.dirty("e") == [1]
        with pytest.raises(GraphError, match="no bitmap 'b0' on it or on those below it") as told:
            await run.session.add_export(options("w", "window", "b0"))
        assert "kept" in str(told.value)


@pytest.mark.parametrize(
    "wanted, message",
    [
        ("b1", r"node 'disk': export 'e': there is no bitmap 'b1' on it; there are: 'b0'"),
        (BitmapRef(node="kept", name="b0"), "there is no bitmap 'b0' on it; there are: none"),
        (BitmapRef(node="nobody", name="b0"), "there is no such node"),
        (BitmapRef(node="small", name="s"), "bitmap 's' covers 65536 bytes, and the export 'e' has 1048576"),
        ("old", r"bitmap 'old' is inconsistent: .* full backup next"),
    ],
    ids=["name", "node", "no-node", "size", "inconsistent"],
)
@run_async
async def test_bitmap_that_can_not_be_shown_is_refused(tmp_path: Path, wanted: str | BitmapRef, message: str) -> None:
    async with running(tmp_path, memory("small", GRANULE)) as run:
        await run.graph.add_bitmap("small", "s")
        first = ["b0"] if isinstance(wanted, str) or wanted.name != "b0" else []
        if wanted == "old":
            await run.graph.add_bitmap("disk", "old")
            run.graph.bitmap("disk", "old").inconsistent = True
        before = run.state()
        with pytest.raises(GraphError, match=message):
            await run.session.add_export(options("e", "disk", *first, wanted))
        assert run.state() == before
        with pytest.raises(OptionRefusedError):
            await run.client("e")
        await run.session.add_export(options("e", "disk", "b0"))


@run_async
async def test_transaction_that_fails_leaves_no_export_and_no_view(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        server = run.session.server
        assert server is not None
        before = run.state()

        async def fail() -> None:
            async with run.graph.transaction() as change:
                change.add({"driver": "backup-top", "node-name": "top", "file": "disk", "target": "kept"})
                change.insert("top", above="disk")
                AddExport(change, server, options("e", "top", "b0"))
                change.act(AddBitmap(BitmapName("disk", "b1")))
                change.act(Abort())

        with pytest.raises(GraphError, match="asked to abort"):
            await fail()
        assert run.state() == before
        with pytest.raises(OptionRefusedError, match="no export is named 'e'"):
            await run.client("e")
        await run.session.add_export(options("e", "disk", "b0"))


@run_async
async def test_names_and_ids_are_taken_once(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        await run.session.add_export(options("e", "disk", "b0"))
        before = run.state()
        with pytest.raises(GraphError, match="already is an export 'e'"):
            await run.session.add_export(options("e"))
        with pytest.raises(GraphError, match="already an NBD export named 'e'; give it another 'name'"):
            await run.session.add_export(NbdExportOptions(id="other", name="e", node_name="disk", bitmaps=("b0",)))
        with pytest.raises(GraphError, match="no export 'x'"):
            await run.session.remove_export("x")
        assert run.state() == before
        server = run.session.server
        assert server is not None

        async def add_two() -> None:
            async with run.graph.transaction() as change:
                AddExport(change, server, NbdExportOptions(id="1", name="twice", node_name="disk"))
                AddExport(change, server, NbdExportOptions(id="2", name="twice", node_name="disk"))

        with pytest.raises(GraphError, match="already an NBD export named 'twice'"):
            await add_two()
        assert run.state() == before


@run_async
async def test_export_with_clients_is_removed_only_the_hard_way(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        await run.session.add_export(options("e", "disk", "b0"))
        client = await run.client("e")
        with pytest.raises(GraphError, match=r"NBD export 'e' has 1 client\(s\); disconnect them"):
            await run.session.remove_export("e")
        assert await client.pread(0, 16) == bytes(16)
        await run.session.remove_export("e", hard=True)
        with pytest.raises(OSError):  # noqa: PT011  # the connection is gone, in whatever way it is noticed
            await client.pread(0, 16)
        await client.disconnect()
        assert run.graph.bitmap("disk", "b0").holders == []
        with pytest.raises(OptionRefusedError):
            await run.client("e")
        await run.session.add_export(options("e", "disk", "b0"))
        assert await run.dirty("e") == []


@run_async
async def test_removal_that_is_taken_back_leaves_the_export(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        added = (await run.session.add_export(options("e", "disk", "b0"))).added

        async def fail() -> None:
            async with run.graph.transaction() as change:
                RemoveExport(change, added, hard=True)
                change.act(Abort())

        async with await run.client("e") as client:
            with pytest.raises(GraphError, match="asked to abort"):
                await fail()
            assert await client.pread(0, 16) == bytes(16)
        assert await run.dirty("e") == []
        assert run.graph.bitmap("disk", "b0").holders == ["export 'e'"]


@run_async
async def test_one_export_takes_the_place_of_another_at_one_instant(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        await run.guest.pwrite(0, b"x")
        first = (await run.session.add_export(options("one", "disk", "b0"))).added
        await run.guest.pwrite(3 * GRANULE, b"x")
        assert run.session.server is not None
        async with run.graph.transaction() as change:
            RemoveExport(change, first)
            second = AddExport(
                change, run.session.server, NbdExportOptions(id="two", name="one", node_name="disk", bitmaps=("b0",))
            )
        assert await run.dirty("one") == [0, 3]
        assert run.graph.bitmap("disk", "b0").holders == ["export 'two'"]
        second.end_views()


@run_async
async def test_point_in_time_and_its_export_begin_and_end_at_one_instant(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        assert run.session.server is not None
        await run.guest.pwrite(0, b"old")
        async with run.graph.transaction() as change:
            change.add({"driver": "backup-top", "node-name": "top", "file": "disk", "target": "kept"})
            change.insert("top", above="disk")
            change.add({"driver": "snapshot-access", "node-name": "then", "file": "top"})
            added = AddExport(change, run.session.server, options("then", "then", "b0"))
        await run.guest.pwrite(0, b"new")
        async with await run.client("then") as client:
            assert await client.pread(0, 3) == b"old"
        async with run.graph.transaction() as change:
            RemoveExport(change, added, hard=True)
            change.remove("then")
            change.remove_filter("top")
        assert [node.name for node in run.graph.nodes()] == ["disk", "kept"]
        assert run.graph.bitmap("disk", "b0").holders == []
        assert await run.guest.pread(0, 3) == b"new"
        with pytest.raises(OptionRefusedError):
            await run.client("then")


@run_async
async def test_session_knows_its_exports_when_changes_are_cancelled_at_any_step(tmp_path: Path) -> None:
    """A change that was under way is completed, though nobody waits for it any more."""
    async with running(tmp_path) as run:
        outcomes = set()
        for steps in range(60):
            for change in (run.session.add_export(options("e", "disk", "b0")), run.session.remove_export("e")):
                task = asyncio.ensure_future(change)
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait({task})
                served = any(backend.name == "export-e" for backend in run.graph.backends())
                assert ("e" in run.session.exports) is served
                outcomes.add((task.cancelled(), served))
            if "e" in run.session.exports:
                await run.session.remove_export("e")
        assert {(True, True), (True, False)} <= outcomes
