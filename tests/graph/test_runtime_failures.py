# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Changes that fail, at every stage and in every way, and changes that are cancelled: all is as it was."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.backup import CLUSTER, memory, settle, top_over
from helpers.loop import graph_of, in_loop
from helpers.runtime import Stubborn, state

from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.create import create_file
from blockgraph.errors import BlockGraphError, GraphError, IOFailure
from blockgraph.filters.inject_error import InjectError
from blockgraph.perm import ALL, Perm

SIZE = 4 * CLUSTER
READ_WRITE = Perm.CONSISTENT_READ | Perm.WRITE


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    Stubborn.fail_at = ""
    Stubborn.log = []
    yield
    Stubborn.fail_at = ""


def stubborn(name: str, file: str | dict[str, Any]) -> dict[str, Any]:
    """A filter that refuses where Stubborn.fail_at says."""
    return {"driver": "stubborn", "node-name": name, "file": file}


def image(path: Path, name: str = "disk", **more: Any) -> dict[str, Any]:
    """A file."""
    return {"driver": "file", "node-name": name, "filename": str(path), **more}


async def add(graph: AsyncGraph) -> None:
    """A node over the disk."""
    await graph.add_node(stubborn("new", "disk"))


async def insert(graph: AsyncGraph) -> None:
    """A filter above the disk."""
    await graph.insert_filter(stubborn("new", "disk"), above="disk")


async def replace(graph: AsyncGraph) -> None:
    """A chain in place of the disk."""
    async with graph.transaction() as change:
        change.add(stubborn("new", {"driver": "raw", "node-name": "inner", "file": "second"}))
        change.replace("disk", "new")


async def several(graph: AsyncGraph) -> None:
    """Several edits, the last of which fails."""
    async with graph.transaction() as change:
        change.add({"driver": "delay", "node-name": "slow", "file": "disk"})
        change.insert("slow", above="disk")
        change.set_child("old", "file", "second")
        change.add(stubborn("new", "slow"))
        change.insert("new", above="slow")


CHANGES = [add, insert, replace, several]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("stage", ["open", "attached", "prepare_perm"])
def test_stage_failing_leaves_everything_as_it_was(
    change: Callable[[AsyncGraph], Awaitable[None]], stage: str, tmpfs: Path
) -> None:
    for name in ("disk", "second"):
        (tmpfs / name).write_bytes(bytes(SIZE))

    @in_loop
    async def run() -> None:
        async with graph_of(
            image(tmpfs / "disk", **{"auto-read-only": True}),
            image(tmpfs / "second", "second", **{"auto-read-only": True}),
            {"driver": "raw", "node-name": "old", "file": "disk"},
        ) as graph:
            backend = await graph.backend("disk", writable=True)
            through = await graph.backend("old")
            await backend.pwrite(0, b"before")
            before = state(graph)
            Stubborn.fail_at = stage
            with pytest.raises(GraphError, match=f"refused at {stage}"):
                await change(graph)
            assert state(graph) == before
            assert Stubborn.log.count("open") == Stubborn.log.count("close") == 1
            await backend.pwrite(0, b"after!")
            assert await through.pread(0, 6) == b"after!"
            Stubborn.fail_at = ""
            await change(graph)  # nothing is left in the way
            state(graph)

    run()


@in_loop
async def test_permission_refused_by_another_node_gives_back_what_was_prepared() -> None:
    async with graph_of(stubborn("a", memory("am", SIZE)), stubborn("b", memory("bm", SIZE))) as graph:
        Stubborn.log = []
        before = state(graph)
        kept = Stubborn.prepare_perm

        async def second_refuses(self: Stubborn, need: Any, share: Any) -> None:
            if len([entry for entry in Stubborn.log if entry == "prepare_perm"]) == 1:
                Stubborn.fail_at = "prepare_perm"
            await kept(self, need, share)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stubborn, "prepare_perm", second_refuses)

            async def both() -> None:
                async with graph.transaction() as change:
                    for name in ("a", "b"):
                        change.attach(Backend(f"r{name}", need=READ_WRITE), name)

            with pytest.raises(GraphError, match="refused at prepare_perm"):
                await both()
        assert Stubborn.log.count("abort_perm") == 2
        assert "commit_perm" not in Stubborn.log
        assert state(graph) == before
        Stubborn.fail_at = ""


@in_loop
async def test_attached_again_after_a_failure_takes_the_old_facts() -> None:
    window = {"driver": "raw", "node-name": "window", "size": SIZE, "file": memory("m2", SIZE)}
    async with graph_of(memory("disk", SIZE), {"driver": "delay", "node-name": "top", "file": "disk"}, window) as graph:
        backend = await graph.backend("top", writable=True)
        assert graph.node("top").driver.growable

        async def swap() -> None:
            async with graph.transaction() as change:
                change.set_child("top", "file", "window")
                change.add(stubborn("last", "top"))

        Stubborn.fail_at = "attached"
        with pytest.raises(GraphError):
            await swap()
        assert graph.node("top").driver.growable
        await backend.pwrite(1, b"x")
        Stubborn.fail_at = ""
        await swap()
        assert not graph.node("top").driver.growable
        await backend.pwrite(1, b"x")
        assert await backend.pread(0, 3) == b"\0x\0"


@in_loop
async def test_flush_failing_refuses_a_change_that_would_leave_data_behind() -> None:
    async with graph_of(stubborn("disk", memory("m", SIZE)), memory("other", SIZE)) as graph:
        backend = await graph.backend("disk", writable=True)
        await backend.pwrite(0, b"x")
        before = state(graph)
        Stubborn.fail_at = "flush"
        with pytest.raises(IOFailure, match="refused at flush"):
            await graph.replace_node("disk", "other")
        assert state(graph) == before
        Stubborn.fail_at = ""
        assert await backend.pread(0, 1) == b"x"


@in_loop
async def test_flush_failing_does_not_keep_a_node_from_being_removed() -> None:
    async with graph_of(memory("m", SIZE), stubborn("disk", "m")) as graph:
        backend = await graph.backend("disk", writable=True)
        await backend.pwrite(0, b"x")
        Stubborn.fail_at = "flush"
        with pytest.raises(IOFailure):
            await graph.close_backend(backend)
        await graph.remove_node("disk")
        assert [node.name for node in graph.nodes()] == ["m"]


def test_image_locked_elsewhere_refuses_and_frees_what_was_opened(tmpfs: Path) -> None:
    for name in ("first", "second"):
        (tmpfs / name).write_bytes(bytes(SIZE))

    @in_loop
    async def run() -> None:
        async with graph_of(image(tmpfs / "second")) as owner, graph_of(memory("m", SIZE)) as graph:
            held = await owner.backend("disk", writable=True, share=ALL & ~Perm.WRITE)
            before = state(graph)

            async def both() -> None:
                async with graph.transaction() as change:
                    change.add(image(tmpfs / "first", "one"))
                    change.add(image(tmpfs / "second", "two"))
                    for name in ("one", "two"):
                        change.attach(Backend(name, need=READ_WRITE, share=ALL & ~Perm.WRITE), name)

            with pytest.raises(GraphError, match="locked"):
                await both()
            assert state(graph) == before
            async with graph_of(image(tmpfs / "first", "free")) as other:  # its lock was given back
                backend = await other.backend("free", writable=True, share=ALL & ~Perm.WRITE)
                await other.close_backend(backend)
            await owner.close_backend(held)

    run()


def test_description_that_fails_leaves_no_image_open(tmpfs: Path) -> None:
    (tmpfs / "disk").write_bytes(bytes(SIZE))

    @in_loop
    async def run() -> None:
        with pytest.raises(BlockGraphError):
            async with graph_of(image(tmpfs / "disk"), image(tmpfs / "nowhere", "other")):
                pass
        async with graph_of(image(tmpfs / "disk")) as graph:
            await graph.backend("disk", writable=True)

    run()


# Cancelled.


@in_loop
async def test_cancelled_while_requests_are_waited_for_changes_nothing() -> None:
    disk = {"driver": "inject-error", "node-name": "disk", "image": memory("bytes", SIZE)}
    async with graph_of(disk) as graph:
        backend = await graph.backend("disk", writable=True)
        driver = graph.node("disk").driver
        assert isinstance(driver, InjectError)
        driver.break_at("pwritev", "held")
        write = asyncio.ensure_future(backend.pwrite(0, b"x"))
        await driver.wait_break("held")
        before = state(graph)
        change = asyncio.ensure_future(insert(graph))
        await settle()
        later = asyncio.ensure_future(backend.pread(0, 1))
        await settle()
        assert not later.done()  # held by the drain
        change.cancel()
        await asyncio.wait({change})
        assert change.cancelled()
        assert state(graph) == before
        assert Stubborn.log.count("close") == 1
        assert await later in (b"x", b"\0")
        driver.resume("held")
        await write


@pytest.mark.parametrize("stage", ["open", "attached", "prepare_perm"])
def test_cancelled_while_it_can_not_be_stopped_is_whole(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @in_loop
    async def run() -> None:
        async with graph_of(memory("disk", SIZE)) as graph:
            backend = await graph.backend("disk", writable=True)
            before = state(graph)
            reached, go_on = asyncio.Event(), asyncio.Event()
            kept = getattr(Stubborn, stage)

            async def slow(self: Stubborn, *args: Any) -> None:
                reached.set()
                await go_on.wait()
                await kept(self, *args)

            monkeypatch.setattr(Stubborn, stage, slow)
            change = asyncio.ensure_future(insert(graph))
            await reached.wait()
            change.cancel()
            await settle()
            change.cancel()
            await settle()
            assert not change.done()
            go_on.set()
            await asyncio.wait({change})
            assert change.cancelled()
            if graph.model.has("new"):
                state(graph)
                assert backend.node.name == "new"
            else:
                assert state(graph) == before
                assert Stubborn.log.count("open") == Stubborn.log.count("close")
            await backend.pwrite(0, b"x")

    run()


@in_loop
async def test_backend_cancelled_too_late_is_not_left_behind() -> None:
    async with graph_of(stubborn("disk", memory("m", SIZE))) as graph:
        before = state(graph)
        reached, go_on = asyncio.Event(), asyncio.Event()

        async def slow(self: Stubborn, need: Any, share: Any) -> None:
            reached.set()
            await go_on.wait()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stubborn, "prepare_perm", slow)
            opening = asyncio.ensure_future(graph.backend("disk", writable=True))
            await reached.wait()
            opening.cancel()
            await settle()
            go_on.set()
            await asyncio.wait({opening})
        assert opening.cancelled()
        assert state(graph) == before


def test_target_of_the_wrong_size_closes_its_image_again(tmpfs: Path) -> None:
    @in_loop
    async def run() -> None:
        await create_file(str(tmpfs / "t"), SIZE // 2, "qcow2", replace=False)
        target = {"driver": "qcow2", "node-name": "target", "file": {"driver": "file", "filename": str(tmpfs / "t")}}
        async with graph_of(memory("disk", SIZE)) as graph:
            backend = await graph.backend("disk", writable=True)
            before = state(graph)
            with pytest.raises(GraphError, match=f"{SIZE}.*{SIZE // 2}|{SIZE // 2}.*{SIZE}"):
                await graph.insert_filter(top_over(target=target), above="disk")
            assert state(graph) == before
            await backend.pwrite(0, b"x")
            await graph.add_node(target)

    run()
