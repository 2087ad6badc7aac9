# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Zeroes written natively into clusters of a qcow2 image: where Python would write them, and nowhere else.

guest ==extent map==> disk (qcow2) -> file
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.loop import graph_of
from helpers.nbd import run_async

import blockgraph
from blockgraph import trace
from blockgraph.api import SyncBackend, SyncGraph
from blockgraph.create import create_file
from blockgraph.driver import Filter
from blockgraph.errors import IOFailure
from blockgraph.exports.nbd import NbdExport, NbdServer
from blockgraph.flags import Flag
from blockgraph.native import Zeroing
from blockgraph.options import NodeOptions, NodeRef
from blockgraph.registry import driver_names, register
from blockgraph.testing.nbd_client import CmdFlag, NbdClient

CLUSTER = 64 << 10
SIZE = 12 * CLUSTER + 512
ANYHOW = Zeroing.PUNCH | Zeroing.ZERO_RANGE | Zeroing.WRITE


class SeeZeroesOptions(NodeOptions, kw_only=True, frozen=True):
    file: NodeRef


class SeeZeroes(Filter):
    """Overrides pwrite_zeroes."""

    name = "see-zeroes"
    Options = SeeZeroesOptions

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        await self.file.pwrite_zeroes(offset, length, flags)


@pytest.fixture(autouse=True)
def filters() -> None:
    """The filter above is known."""
    if SeeZeroes.name not in driver_names():
        register(SeeZeroes)


def image(path: Path, **more: Any) -> dict[str, Any]:
    """A description of a new qcow2 image."""
    return {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": str(path)}, **more}


@contextmanager
def disk_of(
    path: Path, *nodes: dict[str, Any], root: str = "disk", **options: Any
) -> Iterator[tuple[SyncGraph, SyncBackend]]:
    """A root over a new image, of which all is written and known. `nodes`: what is over it."""
    asyncio.run(create_file(str(path), SIZE, "qcow2", replace=True, **options))
    with blockgraph.open({"nodes": [image(path), *nodes]}) as graph:
        disk = graph.backend(root, writable=True)
        length = disk.size
        disk.pwrite(0, b"x" * length)
        for offset in range(0, length, CLUSTER):
            disk.pread(offset, 1)
            disk.pwrite(offset, b"x")
        yield graph, disk


def zero(disk: SyncBackend, offset: int, length: int, how: Zeroing = ANYHOW) -> bool:
    return disk._extents.zero(offset, length, how)


def test_part_of_a_cluster_is_written_with_zeroes_and_asks_no_node(tmp_path: Path) -> None:
    with disk_of(tmp_path / "disk") as (graph, disk):
        bitmap = graph.call(graph.graph.add_bitmap("disk", "b0", granularity=4096)).recorder
        disk.pwrite(0, b"x")
        bitmap.clear()
        with trace.record() as events:
            assert zero(disk, 3 * CLUSTER + 5, CLUSTER)
        assert events == []
        assert list(bitmap.dirty_extents()) == [(3 * CLUSTER, CLUSTER + 4096)]
        model = b"x" * (3 * CLUSTER + 5) + bytes(CLUSTER) + b"x" * (SIZE - 4 * CLUSTER - 5)
        assert disk.pread(0, SIZE) == model


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_image_is_the_one_that_python_alone_makes(tmp_path: Path, seed: int, version: int) -> None:
    """Content, and what is allocated."""
    options = {"compat": "0.10"} if version == 2 else {}
    with disk_of(tmp_path / "disk", **options) as (_, disk), disk_of(tmp_path / "other", **options) as (_, other):
        rng = random.Random(seed)
        native = 0
        for _ in range(150):
            offset = rng.choice([rng.randrange(SIZE), rng.randrange(13) * CLUSTER])
            length = min(rng.choice([1, 512, CLUSTER - 1, CLUSTER, CLUSTER + 512, 3 * CLUSTER]), SIZE - offset)
            if rng.random() < 0.3:
                for each in (disk, other):
                    each.pwrite(offset, b"y" * length)
                continue
            flags = rng.choice([Flag.NONE, Flag.MAY_UNMAP])
            if zero(disk, offset, length):
                native += 1
            else:
                disk.write_zeroes(offset, length, flags=flags)
            other.write_zeroes(offset, length, flags=flags)
        assert native > 10
        assert disk.pread(0, SIZE) == other.pread(0, SIZE)
        for offset in range(0, SIZE, CLUSTER):
            assert disk.block_status(offset, 1)[:4] == other.block_status(offset, 1)[:4]


@pytest.mark.parametrize("discard", ["unmap", "ignore"])
def test_whole_clusters_are_pythons(tmp_path: Path, discard: str) -> None:
    with disk_of(tmp_path / "disk") as (graph, disk):
        graph.call(graph.graph.reopen("disk", {"discard": discard}))
        disk.pwrite(0, b"x")
        for offset, length in ((CLUSTER, CLUSTER), (CLUSTER - 1, CLUSTER + 1), (12 * CLUSTER, 512), (0, SIZE)):
            assert not zero(disk, offset, length)
            assert zero(disk, offset, length, Zeroing.PUNCH) == (discard == "ignore" and length < SIZE)
        for how in (Zeroing.ZERO_RANGE, Zeroing.PUNCH | Zeroing.ZERO_RANGE):
            assert not zero(disk, 5, 10, how)
        assert zero(disk, 5, CLUSTER, Zeroing.PUNCH)
        assert disk.pread(0, SIZE) == b"x" * SIZE
        graph.call(graph.graph.reopen("disk", {"discard": "unmap"}))
        assert disk.pread(0, SIZE) == b"x" * SIZE
        disk.write_zeroes(CLUSTER, CLUSTER)
        disk.pread(CLUSTER, 1)
        assert not zero(disk, CLUSTER + 5, 10)  # zeroes already: Python does nothing
        disk.discard(2 * CLUSTER, CLUSTER)
        disk.pread(2 * CLUSTER, 1)
        assert not zero(disk, 2 * CLUSTER + 5, 10)


@pytest.mark.parametrize(
    "node, native",
    [
        ({"driver": "raw", "file": "disk"}, True),
        ({"driver": "raw", "file": "disk", "size": 8 * CLUSTER + 512}, True),
        ({"driver": "raw", "file": "disk", "offset": CLUSTER, "size": 8 * CLUSTER}, False),
        ({"driver": "see-zeroes", "file": "disk"}, False),
        ({"driver": "raw", "file": "disk", "detect-zeroes": "on"}, False),
    ],
    ids=["over-it", "start-of-it", "with-other-offsets", "somebody-sees-zeroes", "detected"],
)
def test_zeroes_go_to_python_where_a_node_above_wants_that(tmp_path: Path, node: dict[str, Any], native: bool) -> None:
    with disk_of(tmp_path / "disk", {**node, "node-name": "top"}, root="top") as (_, disk):
        assert zero(disk, CLUSTER + 5, 10) == native
        assert disk.pread(CLUSTER, 20) == b"x" * 5 + (bytes(10) if native else b"x" * 10) + b"x" * 5


def test_filter_below_the_image_that_sees_zeroes_gets_writes_as_from_python(tmp_path: Path) -> None:
    with disk_of(tmp_path / "disk") as (graph, disk):
        file = graph.graph.node("disk").children["file"].node.name
        seen = {"driver": "see-zeroes", "node-name": "seen", "file": file}
        graph.call(graph.graph.insert_filter(seen, above=file))
        disk.pread(0, SIZE)
        with trace.record() as events:
            disk.write_zeroes(CLUSTER + 5, 10)
        assert ("pwrite", "seen") in [(event.op, event.node) for event in events]
        disk.pwrite(0, b"x")
        assert zero(disk, CLUSTER + 20, 10)
        assert disk.pread(CLUSTER, 40) == b"x" * 5 + bytes(10) + b"x" * 5 + bytes(10) + b"x" * 10


@run_async
async def test_nbd_client_has_small_zeroes_written_and_is_refused_fast_ones(tmp_path: Path) -> None:
    await create_file(str(tmp_path / "disk"), SIZE, "qcow2", replace=True)
    async with graph_of(image(tmp_path / "disk")) as graph:
        backend = await graph.backend("disk", writable=True)
        server = NbdServer(threads=1)
        await server.listen_unix(str(tmp_path / "socket"))
        server.add_export(NbdExport("disk", backend, writable=True))
        async with await NbdClient.connect_unix(str(tmp_path / "socket"), "disk") as client:
            await client.pwrite(0, b"x" * SIZE)
            await client.pread(0, SIZE)
            await client.flush()
            await client.flush()
            model = bytearray(b"x" * SIZE)
            before = server.stats
            assert before is not None
            flags = [CmdFlag(0), CmdFlag.NO_HOLE, CmdFlag.FUA]
            for i, offset in enumerate(range(512, SIZE, CLUSTER + 1000)):
                length = min(CLUSTER, SIZE - 1 - offset)
                await client.write_zeroes(offset, length, flags=flags[i % 3])
                model[offset : offset + length] = bytes(length)
            after = server.stats
            assert after is not None
            assert after.faults == before.faults
            with pytest.raises(IOFailure) as refused:
                await client.write_zeroes(CLUSTER, 512, flags=CmdFlag.FAST_ZERO)
            assert refused.value.errno == errno.ENOTSUP
            assert server.stats is not None
            assert server.stats.faults == after.faults + 1
            assert await client.pread(0, SIZE) == model
            await client.write_zeroes(CLUSTER, CLUSTER, flags=CmdFlag.FAST_ZERO)
            model[CLUSTER : 2 * CLUSTER] = bytes(CLUSTER)
            assert await client.pread(0, SIZE) == model
        await server.close()


@pytest.mark.parametrize(
    "node, discards, zeroes",
    [({}, True, True), ({"discard": "ignore"}, False, True), ({"detect-zeroes": "on"}, False, False)],
    ids=["unmap", "ignored-below", "detected"],
)
def test_nothing_is_asked_where_nothing_can_be_learnt(
    tmp_path: Path, node: dict[str, str], discards: bool, zeroes: bool
) -> None:
    """Each time the first one asks where the bytes live: of a fill, if a later one might be native."""
    (tmp_path / "disk").write_bytes(b"x" * SIZE)
    file = {"driver": "file", "node-name": "file", "filename": str(tmp_path / "disk"), **node}
    with blockgraph.open({"nodes": [file, {"driver": "raw", "node-name": "disk", "file": "file"}]}) as graph:
        disk = graph.backend("disk", writable=True)
        root_map = disk._backend.use_map()
        disk.pread(0, 1)
        assert root_map.learns_zeroes(0, CLUSTER, discard=True) == discards
        assert root_map.learns_zeroes(0, CLUSTER) == zeroes


@pytest.mark.parametrize("options", [{}, {"discard": "ignore"}], ids=["unmapped", "ignored"])
@pytest.mark.parametrize("driver", ["raw", "qcow2"])
@run_async
async def test_disk_that_is_only_discarded_and_zeroed_is_learnt(
    tmp_path: Path, driver: str, options: dict[str, str]
) -> None:
    """No read and no write has asked where its bytes live."""
    path = tmp_path / "disk"
    await create_file(str(path), SIZE, driver, replace=True)
    node = {**image(path), "driver": driver, **options}
    async with graph_of(node) as graph:
        other = await graph.backend("disk", writable=True)
        await other.pwrite(0, b"x" * SIZE)
        backend = await graph.backend("disk", writable=True)
        server = NbdServer(threads=1)
        await server.listen_unix(str(tmp_path / "socket"))
        server.add_export(NbdExport("disk", backend, writable=True))
        async with await NbdClient.connect_unix(str(tmp_path / "socket"), "disk") as client:
            model = bytearray(b"x" * SIZE)
            for i in range(3):
                at = i * CLUSTER + 7
                await client.trim(at, 500)
                if driver == "raw" and not options:
                    model[at : at + 500] = bytes(500)
                at += 6 * CLUSTER
                await client.write_zeroes(at, 500)
                model[at : at + 500] = bytes(500)
                assert server.stats is not None
                assert server.stats.faults == 1
            assert await client.pread(0, SIZE) == model
        await server.close()


def test_image_in_an_image_keeps_its_own_offsets(tmp_path: Path) -> None:
    """Where a cluster of the outer one has the same offset in it as on the disk, the inner one must not take the zeroes
    of the disk's other clusters as its own."""
    outer, inner = tmp_path / "outer", tmp_path / "inner"
    asyncio.run(create_file(str(outer), SIZE, "qcow2", replace=True))
    written = [5, 6, 7, 8, 9, 11, 3]
    with blockgraph.open({"nodes": [image(outer)]}) as graph:
        disk = graph.backend("disk", writable=True)
        for number in written:
            disk.pwrite(number * CLUSTER, bytes([number]) * CLUSTER)
    room = 64 * CLUSTER
    os.truncate(outer, room)
    asyncio.run(create_file(str(inner), room, "qcow2", replace=True, backing_file=str(outer), backing_fmt="raw"))
    base = {"driver": "raw", "read-only": True, "file": {"driver": "file", "filename": str(outer), "read-only": True}}
    nodes = [
        {**image(inner), "node-name": "inner", "backing": base},
        {"driver": "qcow2", "node-name": "disk", "file": "inner"},
    ]
    content = bytearray(SIZE)
    for number in written:
        content[number * CLUSTER : (number + 1) * CLUSTER] = bytes([number]) * CLUSTER
    with blockgraph.open({"nodes": nodes}) as graph:
        disk = graph.backend("disk", writable=True)
        same = [n for n in written if disk.block_status(n * CLUSTER, CLUSTER).host_offset == n * CLUSTER]
        assert same
        assert len(same) < len(written)
        for number in same[:2]:  # first writes of the inner image, seen through the outer one
            disk.pread(number * CLUSTER + CLUSTER // 2, 1)
            disk.pwrite(number * CLUSTER, b"n" * 512)
            content[number * CLUSTER : number * CLUSTER + 512] = b"n" * 512
        for number in written:
            if number not in same:
                disk.pwrite(number * CLUSTER, b"m" * CLUSTER)
                disk.pread(number * CLUSTER, 1)
                disk.write_zeroes(number * CLUSTER, CLUSTER)
                content[number * CLUSTER : (number + 1) * CLUSTER] = bytes(CLUSTER)
        assert disk.pread(0, SIZE) == content
    with blockgraph.open({"nodes": nodes}) as graph:
        assert graph.backend("disk").pread(0, SIZE) == content
