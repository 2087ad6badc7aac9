# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Persistent bitmaps with QEMU as the other side: what one has stored the other loads, changes and stores again."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.loop import in_loop
from helpers.qcow2 import check, create, get_field, qemu_img
from helpers.qcow2_bitmaps import StorageDaemon, all_dirty, bitmap_info, dirty, graph_over, merged, qemu_dirty

pytestmark = [pytest.mark.usefixtures("qemu"), pytest.mark.timeout(300)]
MIB = 1 << 20
SIZE = 24 * MIB + 4096
AUTO, OFF, IN_USE = frozenset({"auto"}), frozenset[str](), frozenset({"auto", "in-use"})

#: Writes, flushes and dies.
KILLED = """
import os, signal, sys
import blockgraph

node = {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": sys.argv[1]}}
with blockgraph.open({"nodes": [node]}) as graph:
    disk = graph.backend("disk", writable=True)
    disk.pwrite(1 << 20, b"x" * (1 << 20))
    disk.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""

IMAGES = [
    pytest.param("cluster_size=512", id="512"),
    pytest.param("cluster_size=4096,lazy_refcounts=on", id="lazy"),
    pytest.param("cluster_size=65536,compression_type=zstd", id="zstd"),
    pytest.param("cluster_size=2M", id="2M"),
]


@pytest.fixture(autouse=True)
def _tools(require_tool: Any) -> None:
    for tool in ("qemu-nbd", "nbdinfo", "qemu-storage-daemon"):
        require_tool(tool)


def rounded(ranges: list[tuple[int, int]], granularity: int) -> list[tuple[int, int]]:
    """Ranges out to whole granules, up to the disk's end."""
    numbers = {n for at, length in ranges for n in range(at // granularity, -(-(at + length) // granularity))}
    return merged((n * granularity, min(granularity, SIZE - n * granularity)) for n in numbers)


@pytest.mark.parametrize("options", IMAGES)
@in_loop
async def test_bitmaps_go_to_and_fro(tmpfs: Path, options: str) -> None:
    """Each side writes in turn, in granules of several sizes; both see the same, all the way."""
    image, rng = tmpfs / "d.qcow2", random.Random(options)
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, SIZE)
    written: dict[str, list[tuple[int, int]]] = {}
    granules = {"fine": 512, "plain": 65536, "wide": 4 * MIB, "ours": 4096, "off": 65536}
    for turn in range(3):
        ranges = [(rng.randrange(SIZE // 512 - 1) * 512, 512 * rng.choice([1, 8, 200])) for _ in range(6)]
        ranges = [(at, min(length, SIZE - at)) for at, length in ranges]
        if turn == 1:
            async with graph_over(image) as (graph, root):
                await graph.add_bitmap("disk", "ours", granularity=granules["ours"], persistent=True)
                written["ours"] = []
                for at, length in ranges:
                    await root.pwrite(at, b"w" * length)
        else:
            with StorageDaemon(image) as daemon:
                if turn == 0:
                    for name in ("fine", "plain", "wide", "off"):
                        daemon.add_bitmap(name, granularity=granules[name], disabled=name == "off")
                        written[name] = []
                daemon.io(*(f"write -P {turn + 1} {at} {length}" for at, length in ranges))
        for name in written:
            if name != "off":
                written[name] += ranges
        check(image)
        expected = {name: rounded(written[name], granules[name]) for name in written}
        assert {name: qemu_dirty(image, name) for name in expected} == expected
        async with graph_over(image, **{"read-only": True}) as (graph, _):
            assert all_dirty(graph.node("disk")) == expected
        assert {name: (granularity, flags) for name, granularity, flags in bitmap_info(image)} == {
            name: (granules[name], OFF if name == "off" else AUTO) for name in written
        }


@in_loop
async def test_operations_of_qemu_img_bitmap_are_seen_and_work_on_ours(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    await create(image, SIZE)
    async with graph_over(image) as (graph, root):
        for name in ("a", "b", "c"):
            await graph.add_bitmap("disk", name, persistent=True)
        await root.pwrite(MIB, b"x")
        await graph.clear_bitmap("disk", "b")
        await root.pwrite(2 * MIB, b"x")
    qemu_img("bitmap", "--add", "-g", "4096", image, "d")
    qemu_img("bitmap", "--merge", "a", image, "d")
    qemu_img("bitmap", "--disable", image, "b")
    qemu_img("bitmap", "--clear", image, "c")
    qemu_img("bitmap", "--merge", "b", image, "c")
    check(image)
    one, two = (MIB, 65536), (2 * MIB, 65536)
    async with graph_over(image) as (graph, root):
        node = graph.node("disk")
        assert all_dirty(node) == {"a": [one, two], "b": [two], "c": [two], "d": [one, two]}
        assert [bitmap.enabled for bitmap in node.bitmaps.values()] == [True, False, True, True]
        await root.pwrite(0, b"x")
        assert all_dirty(node)["d"] == [(0, 4096), one, two]
    qemu_img("bitmap", "--enable", image, "b")
    for name in ("a", "c", "d"):
        qemu_img("bitmap", "--remove", image, name)
    check(image)
    async with graph_over(image) as (graph, _):
        assert all_dirty(graph.node("disk")) == {"b": [two]}
        assert graph.bitmap("disk", "b").enabled
        await graph.remove_bitmap("disk", "b")
    assert bitmap_info(image) == []
    check(image)


@pytest.mark.parametrize("options", IMAGES)
@in_loop
async def test_crash_of_qemu_leaves_an_inconsistent_bitmap_that_can_be_removed(tmpfs: Path, options: str) -> None:
    image = tmpfs / "d.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, SIZE)
    qemu_img("bitmap", "--add", image, "old")
    with StorageDaemon(image) as daemon:
        daemon.io("write -P 1 1M 1M", "flush")
        daemon.kill()
    if "lazy" in options:
        assert get_field(image, "incompatible_features") & 1
    async with graph_over(image) as (graph, root):
        assert graph.bitmap("disk", "old").inconsistent
        await root.pwrite(5 * MIB, b"x" * MIB)
        await graph.add_bitmap("disk", "new", persistent=True)
        await root.pwrite(8 * MIB, b"x")
    check(image, leaks=True)
    assert [(name, flags) for name, _, flags in bitmap_info(image)] == [("old", IN_USE), ("new", AUTO)]
    assert qemu_dirty(image, "new") == rounded([(8 * MIB, 1)], min(65536, max(4096, get_cluster(image))))
    async with graph_over(image) as (graph, root):
        await graph.remove_bitmap("disk", "old")
        assert await root.pread(MIB, MIB) == b"\1" * MIB
    assert [name for name, _, _ in bitmap_info(image)] == ["new"]
    check(image, leaks=True)


def get_cluster(image: Path) -> int:
    """Bytes of a cluster."""
    return 1 << get_field(image, "cluster_bits")


@pytest.mark.parametrize("options", IMAGES)
@in_loop
async def test_crash_of_ours_leaves_what_qemu_calls_in_use_and_removes(tmpfs: Path, options: str) -> None:
    image = tmpfs / "d.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, SIZE)
    qemu_img("bitmap", "--add", image, "b0")
    done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", KILLED, image], check=False)
    assert done.returncode == -signal.SIGKILL
    assert bitmap_info(image) == [("b0", bitmap_info(image)[0][1], IN_USE)]
    check(image, leaks=True)
    with StorageDaemon(image) as daemon:
        told = daemon.command("query-named-block-nodes")
        found = next(node for node in told if node["node-name"] == "disk")["dirty-bitmaps"]
        assert [(one["name"], one["inconsistent"]) for one in found] == [("b0", True)]
        assert daemon.command("block-dirty-bitmap-remove", node="disk", name="b0") == {}
    assert bitmap_info(image) == []
    check(image, leaks=True)


@in_loop
async def test_image_with_backing_file_keeps_bitmaps_of_its_own_layer(tmpfs: Path) -> None:
    base, image = tmpfs / "base.qcow2", tmpfs / "d.qcow2"
    for path, more in ((base, []), (image, ["-b", base.name, "-F", "qcow2"])):
        qemu_img("create", "-q", "-f", "qcow2", *more, path, SIZE)
        qemu_img("bitmap", "--add", path, "b0")
        async with graph_over(path) as (_, root):
            await root.pwrite(0 if path == base else MIB, b"x")
    assert qemu_dirty(base, "b0") == [(0, 65536)]
    assert qemu_dirty(image, "b0") == [(MIB, 65536)]
    before = base.read_bytes()
    async with graph_over(image) as (graph, root):
        assert dirty(graph.node("disk"), "b0") == [(MIB, 65536)]
        below = graph.node("disk").children["backing"].node
        assert dirty(below, "b0") == [(0, 65536)]
        await root.pwrite(2, b"y")
    assert base.read_bytes() == before
    assert qemu_dirty(image, "b0") == [(0, 65536), (MIB, 65536)]


@pytest.mark.parametrize("size", [MIB, 40 * MIB + 512])
@in_loop
async def test_disk_resized_by_either_side_keeps_its_bitmaps(tmpfs: Path, size: int) -> None:
    image = tmpfs / "d.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", image, SIZE)
    qemu_img("bitmap", "--add", "-g", "512", image, "b0")
    async with graph_over(image) as (_, root):
        await root.pwrite(MIB - 1000, b"x" * 3000)
        await root.truncate(size)
    check(image)
    grown = [(SIZE, size - SIZE)] if size > SIZE else []
    kept = merged((at, min(length, size - at)) for at, length in [(MIB - 1024, 3072), *grown])
    assert qemu_dirty(image, "b0") == kept
    qemu_img("resize", "-q", image, size + MIB)
    check(image)
    async with graph_over(image) as (graph, root):
        assert root.size() == size + MIB
        assert dirty(graph.node("disk"), "b0") == kept
