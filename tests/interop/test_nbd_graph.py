# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A real graph behind the export: what clients write is in the image, what they see is what it holds."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import blockgraph
from blockgraph.errors import IOFailure
from blockgraph.exports.nbd import NbdExport, NbdServer
from blockgraph.testing.nbd_client import NbdClient
from tests.helpers.nbd import run_async, run_tool

MIB = 1 << 20


def description(image: Path) -> dict[str, object]:
    return {
        "nodes": [{"node-name": "disk", "driver": "raw", "file": {"driver": "file", "filename": str(image)}}],
    }


@run_async
async def test_graph_copied_in_over_nbd_is_on_disk(require_tool: Callable[[str], str], tmp_path: Path) -> None:
    nbdcopy, qemu_img = require_tool("nbdcopy"), require_tool("qemu-img")
    source, image = tmp_path / "source", tmp_path / "image"
    with source.open("wb") as file:
        file.write(os.urandom(2 * MIB))
        file.seek(20 * MIB)
        file.write(os.urandom(4 * MIB + 512))
        file.truncate(32 * MIB)
    image.write_bytes(b"\xee" * (32 * MIB))
    server = NbdServer()
    async with await blockgraph.aopen(description(image)) as graph:
        backend = await graph.backend("disk", writable=True, owner="export 'e'")
        await server.listen_unix(str(tmp_path / "s"))
        server.add_export(NbdExport("disk", backend, writable=True))
        await run_tool(nbdcopy, "--flush", str(source), server.uri("disk"))
        await run_tool(qemu_img, "compare", "-f", "raw", "-F", "raw", server.uri("disk"), str(source))
        await server.close()
    assert image.read_bytes() == source.read_bytes()
    assert image.stat().st_blocks * 512 < 10 * MIB


@run_async
async def test_graph_many_clients_overlapping_unaligned_writes_all_arrive(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    server = NbdServer()
    async with await blockgraph.aopen(description(image)) as graph:
        backend = await graph.backend("disk", writable=True)
        path = await server.listen_unix(str(tmp_path / "s"))
        server.add_export(NbdExport("disk", backend, writable=True))
        clients = await asyncio.gather(*(NbdClient.connect_unix(path, "disk") for _ in range(8)))
        # Neighbouring 100-byte pieces share blocks and belong to different clients.
        await asyncio.gather(*(clients[n % 8].pwrite(n * 100, bytes([n % 256]) * 100) for n in range(2000)))
        await clients[0].flush()
        assert image.read_bytes()[:200_000] == b"".join(bytes([n % 256]) * 100 for n in range(2000))
        with pytest.raises(IOFailure):
            await clients[0].pwrite(MIB - 1, b"xx")
        await server.close()
        for client in clients:
            await client.disconnect()
