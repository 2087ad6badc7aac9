# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A sidecar beside an image that keeps its bitmaps itself: here, in a file that says as little as qcow2's extension."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
from helpers.loop import in_loop

import blockgraph
from blockgraph.api import AsyncGraph
from blockgraph.bitmaps import DirtyBitmap
from blockgraph.bitmaps.crash_safe import CrashSafeStore
from blockgraph.formats.raw import Raw
from blockgraph.node import Node
from blockgraph.registry import register

MIB = 1 << 20
SIZE = 32 * MIB
GRANULE = 64 << 10


class Inner:
    """Granules by bitmap; with IN_USE they come back inconsistent."""

    def __init__(self, node: Node, path: Path) -> None:
        self._node = node
        self._path = path
        self._begun = False
        self.calls: list[str] = []

    def check(self, bitmap: DirtyBitmap) -> None:
        self.calls.append("check")

    async def load(self) -> list[DirtyBitmap]:
        stored = json.loads(self._path.read_text()) if self._path.exists() else {"in_use": False, "bitmaps": {}}
        found = []
        for name, granules in stored["bitmaps"].items():
            lost = stored["in_use"]
            bitmap = DirtyBitmap(name, SIZE, GRANULE, node="disk", persistent=True, inconsistent=lost, reason="IN_USE")
            for granule in [] if lost else granules:
                bitmap.record(granule * GRANULE, 1)
            found.append(bitmap)
        return found

    def _write(self, in_use: bool) -> None:
        bitmaps = {name: dirty_of(bitmap) for name, bitmap in self._node.bitmaps.items() if not bitmap.inconsistent}
        self._path.write_text(json.dumps({"in_use": in_use, "bitmaps": bitmaps}))

    async def begin(self) -> None:
        if not self._begun:
            self.calls.append("begin")
            self._write(True)
            self._begun = True

    async def save(self) -> None:
        if self._begun:
            self.calls.append("save")
            self._write(False)
            self._begun = False


class Keeper(Raw):
    """raw, with a store."""

    name = "keeper"
    inner: ClassVar[Path]

    async def open(self) -> None:
        await super().open()
        self.node.bitmap_store = Inner(self.node, self.inner)


def dirty_of(bitmap: DirtyBitmap) -> list[int]:
    return [
        n for at, length in bitmap.contents().dirty_extents() for n in range(at // GRANULE, (at + length) // GRANULE)
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    register(Keeper)
    Keeper.inner = tmp_path / "inner"
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


async def opened(path: Path, **options: Any) -> AsyncGraph:
    node = {"node-name": "disk", "driver": "keeper", "file": {"driver": "file", "filename": str(path)}, **options}
    return await blockgraph.aopen({"nodes": [node]})


async def prepared(path: Path) -> None:
    async with await opened(path) as graph:
        await graph.add_bitmap("disk", "b0", persistent=True)
        await graph.attach_sidecar("disk")
        root = await graph.backend("disk", writable=True)
        await root.pwrite(9 * MIB, b"x")


def copy(path: Path, to: Path) -> None:
    """Image and sidecar as they are, by their contents: what a kill leaves."""
    for name in ("inner", "disk.bitmaps"):
        shutil.copy(path.with_name(name), to / name)


def put_back(path: Path, left: Path) -> None:
    for name in ("inner", "disk.bitmaps"):
        (left / name).replace(path.with_name(name))


@in_loop
async def test_bitmaps_are_the_images_after_a_clean_close(path: Path) -> None:
    await prepared(path)
    (path.parent / "inner").write_text(json.dumps({"in_use": False, "bitmaps": {"b0": [3], "b1": []}}))
    async with await opened(path) as graph:
        assert isinstance(graph.node("disk").bitmap_store, CrashSafeStore)
        assert dirty_of(graph.bitmap("disk", "b0")) == [3]
        assert list(graph.node("disk").bitmaps) == ["b0", "b1"]


@in_loop
async def test_sidecar_recovers_what_the_image_has_lost(path: Path, tmp_path: Path) -> None:
    left = tmp_path / "left"
    left.mkdir()
    await prepared(path)
    async with await opened(path) as graph:
        root = await graph.backend("disk", writable=True)
        await root.pwrite(20 * MIB, b"x")
        store = graph.node("disk").bitmap_store
        assert isinstance(store, CrashSafeStore)
        assert isinstance(store._inner, Inner)
        assert store._inner.calls == ["begin"]
        copy(path, left)
    put_back(path, left)
    for _ in range(2):  # reading changes nothing
        async with await opened(path, **{"read-only": True}) as graph:
            assert dirty_of(graph.bitmap("disk", "b0")) == [9 * 16, *range(20 * 16, 21 * 16)]
    async with await opened(path) as graph:
        assert not graph.bitmap("disk", "b0").inconsistent
    assert json.loads((tmp_path / "inner").read_text())["bitmaps"]["b0"] == [9 * 16, *range(20 * 16, 21 * 16)]
    assert not json.loads((tmp_path / "inner").read_text())["in_use"]


@in_loop
async def test_idle_disk_is_recovered_exactly(path: Path, tmp_path: Path) -> None:
    left = tmp_path / "left"
    left.mkdir()
    await prepared(path)
    async with await opened(path) as graph:
        root = await graph.backend("disk", writable=True)
        await root.pwrite(20 * MIB, b"x")
        store = graph.node("disk").bitmap_store
        assert isinstance(store, CrashSafeStore)
        for _ in range(4):
            await store.turn()
        copy(path, left)
    put_back(path, left)
    async with await opened(path, **{"read-only": True}) as graph:
        assert dirty_of(graph.bitmap("disk", "b0")) == [9 * 16, 20 * 16]


@in_loop
async def test_sidecar_that_does_not_fit_recovers_nothing(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    await prepared(path)
    (tmp_path / "inner").write_text(json.dumps({"in_use": True, "bitmaps": {"b0": [3]}}))
    with path.open("r+b") as file:
        file.write(b"somebody else")
    async with await opened(path) as graph:
        assert graph.bitmap("disk", "b0").inconsistent
        root = await graph.backend("disk", writable=True)
        await root.pwrite(0, b"x")


@in_loop
async def test_attached_to_a_disk_in_use_it_is_safe_at_once(path: Path, tmp_path: Path) -> None:
    left = tmp_path / "left"
    left.mkdir()
    async with await opened(path) as graph:
        await graph.add_bitmap("disk", "b0", persistent=True)
        root = await graph.backend("disk", writable=True)
        root.use_map()
        await root.pwrite(0, b"x")
        with pytest.raises(blockgraph.errors.GraphError, match="only with crash-safe"):
            await graph.attach_sidecar("disk", crash_safe=False)
        await graph.attach_sidecar("disk")
        copy(path, left)
        await root.pwrite(8 * MIB, b"x")
        await graph.clear_bitmap("disk", "b0")
    await prepared_again(path, left)


async def prepared_again(path: Path, left: Path) -> None:
    put_back(path, left)
    async with await opened(path, **{"read-only": True}) as graph:
        assert dirty_of(graph.bitmap("disk", "b0")) == [0]
