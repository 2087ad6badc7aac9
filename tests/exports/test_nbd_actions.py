# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Exports added and removed in transactions."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.loop import graph_of, in_loop

from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.errors import GraphError
from blockgraph.exports.nbd import NbdServer
from blockgraph.exports.nbd.actions import AddExport, RemoveExport
from blockgraph.graph.action import Abort, Action
from blockgraph.testing.nbd_client import NbdClient, OptionRefusedError

DISK = {"driver": "memory", "node-name": "disk", "size": 1 << 20}
KEPT = {"driver": "memory", "node-name": "kept", "size": 1 << 20}
TOP = {"driver": "backup-top", "node-name": "top", "file": "disk", "target": "kept"}
THEN = {"driver": "snapshot-access", "node-name": "then", "file": "top"}


async def acted(graph: AsyncGraph, *actions: Action) -> None:
    """One transaction."""
    async with graph.transaction() as change:
        for action in actions:
            change.act(action)


@in_loop
async def test_point_in_time_and_its_export_begin_and_end_at_one_instant(tmp_path: Path) -> None:
    async with graph_of(DISK, KEPT) as graph:
        guest = await graph.backend("disk", writable=True)
        await guest.pwrite(0, b"old")
        server = NbdServer()
        path = await server.listen_unix(str(tmp_path / "s"))
        backend = Backend("then")
        async with graph.transaction() as change:
            change.add(TOP)
            change.insert("top", above="disk")
            change.add(THEN)
            change.attach(backend, "then")
            change.act(AddExport(server, backend, "then", writable=False))
        await guest.pwrite(0, b"new")
        async with await NbdClient.connect_unix(path, "then") as client:
            assert await client.pread(0, 3) == b"old"
            with pytest.raises(GraphError, match="has 1 client"):
                await acted(graph, RemoveExport(server, "then"))
            assert await client.pread(0, 3) == b"old"
        await server.remove_export("then", hard=True)  # the client may not have left yet
        await acted(graph, AddExport(server, backend, "then", writable=False))
        async with graph.transaction() as change:
            change.act(RemoveExport(server, "then"))
            change.detach(backend)
            change.remove("then")
            change.remove_filter("top")
        with pytest.raises(OptionRefusedError):
            await NbdClient.connect_unix(path, "then")
        assert [node.name for node in graph.nodes()] == ["disk", "kept"]
        await server.close()


@in_loop
async def test_transaction_that_fails_leaves_the_exports_as_they_were(tmp_path: Path) -> None:
    async with graph_of(DISK) as graph:
        server = NbdServer()
        path = await server.listen_unix(str(tmp_path / "s"))
        backend = await graph.backend("disk")
        await acted(graph, AddExport(server, backend, "first", writable=False))
        for name, message in (("second", "asked to abort"), ("first", "already an NBD export named 'first'")):
            with pytest.raises(GraphError, match=message):
                await acted(
                    graph, AddExport(server, backend, name, writable=False), RemoveExport(server, "first"), Abort()
                )
            with pytest.raises(OptionRefusedError):
                await NbdClient.connect_unix(path, "second")
            async with await NbdClient.connect_unix(path, "first") as client:
                assert await client.pread(0, 3) == bytes(3)
            await server.remove_export("first", hard=True)
            await acted(graph, AddExport(server, backend, "first", writable=False))
        with pytest.raises(GraphError, match="read-only"):
            await acted(graph, AddExport(server, backend, "third", writable=True))
        await server.close()
