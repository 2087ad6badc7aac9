# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The conformance kit over every built-in driver, at several sizes, over children of several alignments."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.loop import graph_of, in_loop

from blockgraph import registry
from blockgraph.backend import Backend
from blockgraph.formats.patch import Patch, empty_patch
from blockgraph.formats.qcow2 import create_image
from blockgraph.native import Bitmap
from blockgraph.testing import check_driver

SIZES = {"seams": 256 << 10, "odd": 70_001, "sector": 512, "byte": 1}
ALIGNMENTS = {"bytes": 1, "sectors": 512, "pages": 4096}

#: Drivers that other files test, and why.
ELSEWHERE = {
    "host_device": "needs a block device: tests/protocols",
    "snapshot-access": "is read-only, and shows what its backup-top shows: tests/filters",
}


def memory(name: str, size: int) -> dict[str, Any]:
    return {"node-name": name, "driver": "memory", "size": size}


PROTOCOLS = {
    "memory": {"driver": "memory"},
    "null-co": {"driver": "null-co", "read-zeroes": True},
    "pattern": {"driver": "pattern"},
    "sparse-random": {"driver": "sparse-random"},
}
READ_ONLY = {"null-co", "pattern", "sparse-random"}

#: Node "it" over "file", and over "other" of the same size where it has a second child.
OVER = {
    "raw": {"driver": "raw", "file": "file"},
    "backup-top": {"driver": "backup-top", "file": "file", "target": "other"},
    "inject-error": {"driver": "inject-error", "image": "file"},
    "inject-error limits": {
        "driver": "inject-error",
        "image": "file",
        "align": 4096,
        "max-transfer": 8192,
        "opt-write-zero": 16384,
        "max-write-zero": 32768,
        "opt-discard": 8192,
        "max-discard": 65536,
    },
    "log-writes": {"driver": "log-writes", "file": "file", "log": {"driver": "memory", "size": 0}},
    "delay": {"driver": "delay", "file": "file"},
    "verify": {"driver": "verify", "raw": "file", "test": "other"},
}


Factory = Callable[[], AbstractAsyncContextManager[Backend]]


def over(members: dict[str, Any], size: int, align: int) -> Factory:
    """A node over memory whose requests come aligned."""

    @asynccontextmanager
    async def make() -> AsyncIterator[Backend]:
        nodes = [
            memory("below", size),
            {"node-name": "file", "driver": "inject-error", "image": "below", "align": align},
            {"node-name": "it", **members},
        ]
        if "other" in members.values():
            nodes.insert(0, memory("other", size))
        async with graph_of(*nodes) as graph:
            yield await graph.backend("it", writable=True, resize=members["driver"] != "backup-top")

    return make


def qcow2(size: int, align: int, cluster_size: int, backing: bool) -> Factory:
    """A qcow2 image in memory, over a backing node that has data and ends earlier."""

    @asynccontextmanager
    async def make() -> AsyncIterator[Backend]:
        nodes = [memory("below", 0), {"node-name": "file", "driver": "inject-error", "image": "below", "align": align}]
        if backing:
            nodes.append({"node-name": "base", "driver": "pattern", "size": size // 2 + 1})
        async with graph_of(*nodes) as graph:
            file = await graph.backend("file", writable=True, resize=True)
            await create_image(file, size, cluster_size=cluster_size)
            await graph.close_backend(file)
            await graph.add_node(
                {"node-name": "it", "driver": "qcow2", "file": "file", "backing": "base" if backing else None}
            )
            yield await graph.backend("it", writable=True, resize=True)

    return make


def patch(size: int, align: int) -> Factory:
    """A patch in memory that has the whole disk, in one extent."""

    @asynccontextmanager
    async def make() -> AsyncIterator[Backend]:
        nodes = [memory("below", 0), {"node-name": "file", "driver": "inject-error", "image": "below", "align": align}]
        async with graph_of(*nodes) as graph:
            file = await graph.backend("file", writable=True, resize=True)
            await file.truncate(4096)
            await file.pwrite(0, empty_patch(size, 65536))
            await graph.close_backend(file)
            node = await graph.add_node({"node-name": "it", "driver": "patch", "file": "file"})
            it = await graph.backend("it", writable=True)
            bits = Bitmap(size, 65536)
            bits.fill()
            assert isinstance(node.driver, Patch)
            await node.driver.lay_out(bits)
            yield it

    return make


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("align", ALIGNMENTS.values(), ids=ALIGNMENTS.keys())
@in_loop
async def test_patch_conforms(align: int, size: int) -> None:
    await check_driver(patch(size, align), size=size)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("protocol", PROTOCOLS)
@in_loop
async def test_protocol_conforms(protocol: str, size: int) -> None:
    writable = protocol not in READ_ONLY

    @asynccontextmanager
    async def make() -> AsyncIterator[Backend]:
        async with graph_of({"node-name": "it", "size": size, **PROTOCOLS[protocol]}) as graph:
            yield await graph.backend("it", writable=writable, resize=writable)

    await check_driver(make, size=size, writable=writable)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
@in_loop
async def test_file_conforms(tmp_path: Path, direct: bool, size: int) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"")

    @asynccontextmanager
    async def make() -> AsyncIterator[Backend]:
        with path.open("r+b") as file:
            file.truncate(size)
        node = {"node-name": "it", "driver": "file", "filename": str(path), "cache": {"direct": direct}}
        async with graph_of(node) as graph:
            yield await graph.backend("it", writable=True, resize=True)

    await check_driver(make, size=size, persistent=True)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("align", ALIGNMENTS.values(), ids=ALIGNMENTS.keys())
@pytest.mark.parametrize("driver", OVER)
@in_loop
async def test_filter_or_raw_conforms(driver: str, align: int, size: int) -> None:
    await check_driver(over(OVER[driver], size, align), size=size)


@pytest.mark.parametrize("size", [256 << 10, 70_144], ids=["seams", "odd"])
@pytest.mark.parametrize("align", [1, 4096], ids=["bytes", "pages"])
@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20], ids=str)
@in_loop
async def test_qcow2_conforms(cluster_size: int, backing: bool, align: int, size: int) -> None:
    await check_driver(qcow2(size, align, cluster_size, backing), size=size)


@pytest.mark.parametrize("window", [(0, None), (777, None), (777, 65_536), (4096, 65_536)], ids=str)
@in_loop
async def test_raw_window_conforms(window: tuple[int, int | None]) -> None:
    start, length = window
    members: dict[str, Any] = {"driver": "raw", "file": "file", "offset": start}
    if length is not None:
        members["size"] = length
    await check_driver(over(members, 70_001, 512), size=70_001 - start if length is None else length)


def test_every_built_in_driver_is_covered() -> None:
    covered = {"file", "qcow2", "patch", *PROTOCOLS, *ELSEWHERE, *(members["driver"] for members in OVER.values())}
    assert covered == {registry.get_driver(name).name for name in registry._BUILTIN}
