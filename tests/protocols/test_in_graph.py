# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""file and raw inside a running graph: locks and descriptors follow the graph's transactions."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from helpers.loop import driver_of, graph_of, in_loop

from blockgraph.errors import BlockGraphError, GraphError
from blockgraph.formats.raw import Raw
from blockgraph.perm import ALL, Perm
from blockgraph.protocols.file import File


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(65536))
    return path


def is_writable(driver: File) -> bool:
    fd = driver.fd()
    assert fd is not None
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


@in_loop
async def test_file_auto_read_only_follows_backends(image: Path) -> None:
    async with graph_of(
        {"node-name": "below", "driver": "file", "filename": str(image), "auto-read-only": True},
        {"node-name": "disk", "driver": "raw", "file": "below"},
    ) as graph:
        driver = driver_of(graph, "below", File)
        assert not is_writable(driver)
        backend = await graph.backend("disk", writable=True)
        assert is_writable(driver)
        await backend.pwrite(0, b"written")
        await graph.close_backend(backend)
        assert not is_writable(driver)
    assert image.read_bytes()[:7] == b"written"


@in_loop
async def test_file_reopened_read_only_and_back(image: Path) -> None:
    described = {"node-name": "disk", "driver": "file", "filename": str(image)}
    async with graph_of(described) as graph:
        driver = driver_of(graph, "disk", File)
        await graph.reopen("disk", {**described, "read-only": True})
        assert not is_writable(driver)
        with pytest.raises(GraphError, match="read-only"):
            await graph.backend("disk", writable=True)
        await graph.reopen("disk", {**described, "cache": {"direct": True}})
        assert is_writable(driver)
        backend = await graph.backend("disk", writable=True)
        with pytest.raises(GraphError, match="read-only"):
            await graph.reopen("disk", {**described, "read-only": True})
        await backend.pwrite(1, b"direct")
        assert await backend.pread(0, 65536) == image.read_bytes()
        await graph.close_backend(backend)


@in_loop
async def test_file_used_by_two_graphs_is_refused_and_told(image: Path) -> None:
    described = {"node-name": "disk", "driver": "file", "filename": str(image)}
    async with graph_of(described) as graph:
        backend = await graph.backend("disk", writable=True, share=ALL & ~Perm.WRITE)
        async with graph_of(described) as other:
            with pytest.raises(GraphError, match="is locked") as caught:
                await other.backend("disk", writable=True)
            assert str(image) in str(caught.value)
            await graph.close_backend(backend)
            await other.close_backend(await other.backend("disk", writable=True))


@in_loop
async def test_raw_window_moves_by_reopen(image: Path) -> None:
    described = {"node-name": "disk", "driver": "raw", "file": "below"}
    async with graph_of({"node-name": "below", "driver": "file", "filename": str(image)}, described) as graph:
        backend = await graph.backend("disk")
        await graph.reopen("disk", {**described, "offset": 1000, "size": 5000})
        assert driver_of(graph, "disk", Raw).size() == 5000
        assert await backend.pread(0, 5000) == image.read_bytes()[1000:6000]
        with pytest.raises(BlockGraphError, match="window ends at 65537"):
            await graph.reopen("disk", {**described, "offset": 65536, "size": 1})
        assert await backend.pread(0, 5000) == image.read_bytes()[1000:6000]
        await graph.close_backend(backend)


@in_loop
async def test_pattern_refuses_a_writing_backend() -> None:
    async with graph_of({"node-name": "known", "driver": "pattern", "size": 65536}) as graph:
        with pytest.raises(GraphError, match="read-only"):
            await graph.backend("known", writable=True)
        backend = await graph.backend("known")
        assert await backend.pread(4096, 8) == (4096).to_bytes(8, "big")
        await graph.close_backend(backend)
