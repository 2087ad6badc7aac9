# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The bound of extent maps, and the statistics of exports."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.command import command, disk, graph_file

import blockgraph
from blockgraph.cli.stats import describe
from blockgraph.create import create_file
from blockgraph.errors import OptionError
from blockgraph.exports.options import MIN_EXTENT_MAP
from blockgraph.graph.load import load
from blockgraph.session import Session
from blockgraph.testing.nbd_client import NbdClient

CLUSTER = 4096
CLUSTERS = 16384
STRIDE = 65536  # many regions of the map, and no neighbours to be one extent with


@pytest.fixture(scope="module")
def fragmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qcow2 image of small clusters, far from each other, each an extent of its own."""
    path = tmp_path_factory.mktemp("fragmented") / "disk.qcow2"
    asyncio.run(create_file(str(path), CLUSTERS * STRIDE, "qcow2", replace=False, cluster_size=CLUSTER))

    async def fill() -> None:
        async with await blockgraph.aopen({"nodes": [node(path)]}) as graph:
            backend = await graph.backend("disk", writable=True)
            for cluster in range(CLUSTERS):
                await backend.pwrite(cluster * STRIDE, cluster.to_bytes(4, "big") * (CLUSTER // 4))

    asyncio.run(fill())
    return path


def node(path: Path) -> dict[str, Any]:
    return {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": str(path)}}


def test_extent_map_size_bounds_the_map_and_every_byte_is_still_right(fragmented: Path) -> None:
    with blockgraph.open({"nodes": [node(fragmented)]}) as graph:
        small = graph.backend("disk", extent_map_size=MIN_EXTENT_MAP)
        large = graph.backend("disk")
        for _ in range(2):
            for cluster in range(CLUSTERS):
                assert small.pread(cluster * STRIDE, 4) == cluster.to_bytes(4, "big")
                assert large.pread(cluster * STRIDE, 4) == cluster.to_bytes(4, "big")
        bounded, free = small.stats(), large.stats()
    assert bounded.limit == MIN_EXTENT_MAP
    assert bounded.bytes <= MIN_EXTENT_MAP < free.bytes
    assert bounded.evictions > 0 == free.evictions
    assert free.extents == CLUSTERS > bounded.extents


@pytest.mark.parametrize("size", [-1, 0, MIN_EXTENT_MAP - 1, 1 << 63])
def test_extent_map_size_out_of_range_is_refused_and_leaves_no_root(tmp_path: Path, size: int) -> None:
    disk(tmp_path, 4096)
    nodes = [{"driver": "file", "node-name": "disk", "filename": str(tmp_path / "disk.img")}]
    with blockgraph.open({"nodes": nodes}) as graph:
        with pytest.raises(OptionError, match="at least 262144 bytes"):
            graph.backend("disk", extent_map_size=size)
        assert graph.graph.backends() == []


def description(path: Path, **export: Any) -> dict[str, Any]:
    socket = str(path.with_suffix(".sock"))
    return {
        "nodes": [node(path)],
        "exports": [{"type": "nbd", "id": "guest", "node-name": "disk", **export}],
        "nbd-server": {"addr": {"type": "unix", "path": socket}},
    }


def test_export_has_the_size_of_its_map_from_the_graph_file_and_counts(fragmented: Path) -> None:
    async def run() -> None:
        async with await Session.start(load(description(fragmented, **{"extent-map-size": "1M"}))) as session:
            export = session.exports["guest"].export
            before = export.stats()
            assert before.map is not None
            assert (before.hits, before.faults, before.map.limit) == (0, 0, 1 << 20)
            async with await NbdClient.connect_unix(str(fragmented.with_suffix(".sock")), "disk") as client:
                for _ in range(3):
                    await client.pread(0, CLUSTER)
                await client.flush()
            after = export.stats()
            assert (after.hits, after.faults, after.bytes_read, after.bytes_written) == (2, 2, 3 * CLUSTER, 0)
            assert session.server is not None
            served = session.server.stats
            assert served is not None
            assert (served.requests, served.hits, served.faults) == (4, 2, 2)
            text = describe(session)
            for part in ("export 'guest'", "2 (native, 50.0 %)", "2 (Python)", "12 KiB", "of at most 1 MiB"):
                assert part in text, text
        after_all = session.server.stats
        assert after_all is not None
        assert after_all.requests == served.requests

    asyncio.run(run())


def test_run_tells_statistics_when_asked_and_at_the_end(tmp_path: Path) -> None:
    disk(tmp_path, 1 << 20)
    socket = str(tmp_path / "s.sock")

    async def read() -> None:
        async with await NbdClient.connect_unix(socket, "disk") as client:
            await client.pread(0, 4096)

    with command(tmp_path, "run", str(graph_file(tmp_path)), "--stats") as running:
        running.wait_line("ready")
        running.process.send_signal(signal.SIGUSR2)
        running.wait_line("export 'guest':")
        assert "0 (native, no requests yet)" in running.wait_line("hits:")
        asyncio.run(read())
        running.wait_line("sent:")
        running.process.send_signal(signal.SIGUSR2)
        assert "1 (Python)" in running.wait_line("faults:")
        asyncio.run(read())
        running.process.send_signal(signal.SIGTERM)
        assert running.end() == 0, running.errors
    last = "\n".join(running.lines).rpartition("export 'guest':")[2]
    assert "hits:          1 (native, 50.0 %)" in last
    assert "read:          8 KiB" in last
    assert "NBD server" in last


def test_run_without_exports_has_nothing_to_tell(tmp_path: Path) -> None:
    disk(tmp_path, 1 << 20)
    (tmp_path / "t").write_bytes(bytes(1 << 20))
    graph = graph_file(tmp_path, job='sync = "full"', export=False)
    with command(tmp_path, "run", str(graph), "--stats") as running:
        assert running.end() == 0
    assert running.lines[-1] == "no exports"
