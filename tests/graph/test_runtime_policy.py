# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Backing files that images name themselves: what the open policy follows, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from helpers.backup import content
from helpers.loop import graph_of, in_loop

import blockgraph
from blockgraph.create import create_file
from blockgraph.driver import ImpliedChild
from blockgraph.errors import GraphError
from blockgraph.graph.policy import MAX_CHAIN, OpenPolicy

SIZE = 1 << 20


async def overlay(path: Path, backing: str | None, form: str | None = "raw") -> None:
    """A qcow2 image that names a backing file."""
    named = {} if backing is None else {"backing_file": backing, "backing_fmt": form}
    await create_file(str(path), SIZE, "qcow2", replace=True, **named)


def disk(path: Path, **more: Any) -> dict[str, Any]:
    """The image as a node."""
    return {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": str(path)}, **more}


async def open_disk(path: Path, policy: OpenPolicy | None = None, **more: Any) -> bytes:
    """What the image shows."""
    async with await blockgraph.aopen({"nodes": [disk(path, **more)]}, policy=policy) as graph:
        return await content(graph, "disk")


def test_backing_file_is_followed_read_only(tmpfs: Path) -> None:
    base = b"base" * (SIZE // 4)
    (tmpfs / "base.raw").write_bytes(base)

    @in_loop
    async def run() -> None:
        await overlay(tmpfs / "middle", "base.raw")
        await overlay(tmpfs / "top", "middle", "qcow2")
        async with graph_of(disk(tmpfs / "top")) as graph:
            assert await content(graph, "disk") == base
            below = graph.node("disk").children["backing"].node
            assert below.driver.name == "qcow2"
            assert below.read_only
            assert below.children["file"].node.read_only
            guest = await graph.backend("disk", writable=True)
            await guest.pwrite(0, b"new")
            await graph.close_backend(guest)
            await graph.remove_node("disk")
            assert graph.nodes() == []  # the whole chain goes with it

    run()
    assert (tmpfs / "base.raw").read_bytes() == base


def test_backing_null_leaves_it_out(tmpfs: Path) -> None:
    @in_loop
    async def run() -> None:
        await overlay(tmpfs / "top", "nowhere")
        assert await open_disk(tmpfs / "top", backing=None) == bytes(SIZE)

    run()


@pytest.mark.parametrize(
    "name, form, why",
    [
        ("base.raw", None, "no format"),
        ("base.raw", "vhdx9", "unknown format"),
        ("base.raw", "file", "protocol"),
        ("base.raw", "backup-top", "filter"),
        ("nbd://example.org/disk", "raw", "plain path"),
        ('json:{"driver":"file","filename":"/etc/passwd"}', "raw", "plain path"),
        ("nowhere.raw", "raw", "No such file"),
        (".", "raw", "directory"),
        ("top", "qcow2", "part of its own chain"),
    ],
    ids=["no-format", "unknown", "protocol", "filter", "url", "json", "missing", "directory", "itself"],
)
def test_backing_file_refused_tells_what_to_write(tmpfs: Path, name: str, form: str | None, why: str) -> None:
    (tmpfs / "base.raw").write_bytes(bytes(SIZE))

    @in_loop
    async def run() -> None:
        await overlay(tmpfs / "top", name, form)
        with pytest.raises(blockgraph.errors.BlockGraphError, match=why):
            await open_disk(tmpfs / "top", **{"read-only": True})
        assert await open_disk(tmpfs / "top", backing=None) == bytes(SIZE)  # nothing is left open

    run()


def test_backing_cycle_of_two_is_refused(tmpfs: Path) -> None:
    @in_loop
    async def run() -> None:
        await overlay(tmpfs / "a", "b", "qcow2")
        await overlay(tmpfs / "b", "a", "qcow2")
        with pytest.raises(GraphError, match="own chain"):
            await open_disk(tmpfs / "a", **{"read-only": True})

    run()


def test_backing_cycle_through_a_link_is_refused(tmpfs: Path) -> None:
    @in_loop
    async def run() -> None:
        await overlay(tmpfs / "a", "link", "qcow2")
        os.symlink("a", tmpfs / "link")
        with pytest.raises(GraphError, match="own chain"):
            await open_disk(tmpfs / "a", **{"read-only": True})

    run()


def test_chain_too_long_is_refused(monkeypatch: pytest.MonkeyPatch, tmpfs: Path) -> None:
    monkeypatch.setattr("blockgraph.graph.policy.MAX_CHAIN", 5)

    @in_loop
    async def run() -> None:
        await overlay(tmpfs / "0", None)
        for number in range(1, 7):
            await overlay(tmpfs / str(number), str(number - 1), "qcow2")
        assert await open_disk(tmpfs / "4", **{"read-only": True}) == bytes(SIZE)
        with pytest.raises(GraphError, match="chain of more than 5"):
            await open_disk(tmpfs / "6", **{"read-only": True})

    run()
    assert MAX_CHAIN == 256


def test_directories_allowed_are_the_only_ones(tmpfs: Path) -> None:
    inside, outside = tmpfs / "in", tmpfs / "out"
    inside.mkdir()
    outside.mkdir()
    for directory in (inside, outside):
        (directory / "base.raw").write_bytes(bytes(SIZE))
    os.symlink(outside / "base.raw", inside / "link.raw")
    (tmpfs / "inner").mkdir()
    (tmpfs / "inner" / "base.raw").write_bytes(bytes(SIZE))
    policy = OpenPolicy(directories=[str(inside)])

    @in_loop
    async def run() -> None:
        await overlay(inside / "good", "base.raw")
        assert await open_disk(inside / "good", policy) == bytes(SIZE)
        for number, name in enumerate(("../out/base.raw", str(outside / "base.raw"), "link.raw", "../inner/base.raw")):
            await overlay(inside / f"bad{number}", name)
            with pytest.raises(GraphError, match="outside the allowed directories"):
                await open_disk(inside / f"bad{number}", policy)
        with pytest.raises(GraphError, match="not opened here"):
            await open_disk(inside / "good", OpenPolicy(follow=False))

    run()


@pytest.mark.parametrize("name", ["", "a\0b"], ids=["empty", "nul"])
def test_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(GraphError, match="not a file name"):
        OpenPolicy().describe("n", "/images/top", "backing", ImpliedChild(name, "raw"), frozenset())


def test_relative_name_without_an_image_path_is_refused() -> None:
    with pytest.raises(GraphError, match="no path"):
        OpenPolicy().describe("n", None, "backing", ImpliedChild("base", "raw"), frozenset())
