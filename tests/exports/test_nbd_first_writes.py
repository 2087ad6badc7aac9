# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""First writes of an NBD client to a qcow2 image: which thread makes them, and that Python makes none."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from helpers.harness import EVERYTHING, edge, opened
from helpers.qcow2 import create, over

from blockgraph.backend import Backend
from blockgraph.exports.nbd import NbdExport, NbdServer, protocol
from blockgraph.exports.nbd.protocol import Cmd
from blockgraph.formats.qcow2 import Qcow2
from blockgraph.testing.nbd_client import NbdClient
from tests.helpers.nbd import leave_replies, run_async

CLUSTER = 64 << 10
CLUSTERS = 8  # fewer than the least reserve


@asynccontextmanager
async def exported(tmpfs: Path, *, backed: bool) -> AsyncIterator[tuple[NbdClient, NbdServer, Backend, Qcow2]]:
    """The image "disk", with "base" behind it or not."""
    async with (
        opened("file", "base", filename=str(tmpfs / "base")) as base,
        opened("file", "file", filename=str(tmpfs / "disk")) as file,
        over(file.node, backing=base.node if backed else None) as driver,
    ):
        backend = Backend("root", need=EVERYTHING)
        backend.set_child("root", edge(driver.node))
        server = NbdServer(threads=1)
        await server.listen_unix(str(tmpfs / "socket"))
        server.add_export(NbdExport("disk", backend, writable=True))
        try:
            async with await NbdClient.connect_unix(str(tmpfs / "socket"), "disk") as client:
                yield client, server, backend, driver
        finally:
            await server.close()
            assert backend.map is not None
            await backend.map.clear()
            await driver.node.wait_idle()


@pytest.mark.parametrize(
    "length, by_the_pool",
    [(4096, False), (CLUSTER // 2, False), (CLUSTER, True), (4 * CLUSTER, True)],
    ids=["4k", "half-a-cluster", "cluster", "four-clusters"],
)
@pytest.mark.parametrize("backed", [False, True], ids=["alone", "with-backing"])
@run_async
async def test_short_first_writes_in_memory_are_made_by_the_thread_that_received_them(
    tmpfs: Path, backed: bool, length: int, by_the_pool: bool
) -> None:
    size = (CLUSTERS + 1) * CLUSTER
    old = bytes(i // 512 % 255 + 1 for i in range(size)) if backed else bytes(size)
    (tmpfs / "base").write_bytes(old)
    await create(tmpfs / "disk", size, backing_file=str(tmpfs / "base"), backing_fmt="raw")
    async with exported(tmpfs, backed=backed) as (client, server, backend, driver):
        # Writing begins, by Python, in the last cluster.
        await client.pwrite(size - CLUSTER, old[size - CLUSTER :])
        assert await client.pread(0, size) == old  # and everything is mapped
        assert driver.first_writes is not None
        while not driver.first_writes.reserve:
            await client.pread(0, 1)
        before = server.stats
        assert before is not None
        offsets = range(0, CLUSTERS * CLUSTER, max(length, CLUSTER))
        for offset in offsets:
            await client.pwrite(offset + 512 * (length < CLUSTER), b"\xff" * length)
        after = server.stats
        assert after is not None
        assert after.faults == before.faults
        # Whole clusters whose payload came alone went through a pipe, and at once.
        piped = after.piped - before.piped
        assert after.blocked - before.blocked == (len(offsets) - piped if by_the_pool else 0)
        assert backend.use_map().extents.stats().first_writes == len(offsets)
        model = bytearray(old)
        for offset in offsets:
            start = offset + 512 * (length < CLUSTER)
            model[start : start + length] = b"\xff" * length
        assert await client.pread(0, size) == model


@run_async
async def test_many_at_once_with_old_bytes_to_copy_are_shared_with_the_pool(tmpfs: Path) -> None:
    clusters = 300
    size = clusters * CLUSTER
    old = bytes(i // 512 % 255 + 1 for i in range(size))
    (tmpfs / "base").write_bytes(old)
    await create(tmpfs / "disk", size, backing_file=str(tmpfs / "base"), backing_fmt="raw")
    async with exported(tmpfs, backed=True) as (client, server, _, driver):
        await client.pwrite(size - CLUSTER, old[size - CLUSTER :])
        assert await client.pread(0, size) == old
        assert driver.first_writes is not None
        before = server.stats
        assert before is not None
        model = bytearray(old)
        writer = await NbdClient.connect_unix(str(tmpfs / "socket"), "disk")
        await leave_replies(writer)
        together = 8
        for first in range(0, clusters - together, together):
            while driver.first_writes.reserve < together:
                await client.pread(0, 1)
            message = b""
            for cluster in range(first, first + together):
                start, data = cluster * CLUSTER + 512 * (cluster % 100), bytes([cluster % 251]) * 1024
                header = protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, Cmd.WRITE, cluster, start, len(data))
                message += header + data
                model[start : start + len(data)] = data
            await writer.wire.send(message)  # to be received at once
            for _ in range(together):
                await writer.wire.reply(None)
        await writer.disconnect()
        after = server.stats
        assert after is not None
        # The very first one shows what it costs; after that the pool has a half.
        halves = (clusters - 1) // together * together // 2 - 1
        assert after.blocked - before.blocked == (halves if len(os.sched_getaffinity(0)) > 1 else 0)
        assert await client.pread(0, size) == model
