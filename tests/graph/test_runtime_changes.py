# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Changes of a running graph, each one transaction."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from helpers.backup import CLUSTER, content, fill, memory, pattern, settle, top_over
from helpers.loop import graph_of, in_loop
from helpers.runtime import Stubborn, state

import blockgraph
from blockgraph import trace
from blockgraph.create import create_file
from blockgraph.errors import (
    BlockGraphError,
    GraphError,
    IOFailure,
    NodeInUse,
    OptionError,
    PermissionConflict,
    ReadOnly,
)
from blockgraph.perm import ALL, Perm

SIZE = 4 * CLUSTER


def slow(name: str, file: str | dict[str, Any]) -> dict[str, Any]:
    """A filter that changes nothing."""
    return {"driver": "delay", "node-name": name, "file": file}


def names(graph: blockgraph.api.AsyncGraph) -> set[str]:
    """Of the nodes."""
    return {node.name for node in graph.nodes()}


@in_loop
async def test_add_with_inline_child_makes_both_and_removing_takes_both() -> None:
    async with graph_of(memory("disk", SIZE)) as graph:
        node = await graph.add_node(slow("top", {"driver": "memory", "size": SIZE}))
        assert node.children["file"].node.name.startswith("#block")
        assert len(graph.nodes()) == 3
        await graph.remove_node("top")
        assert names(graph) == {"disk"}


@in_loop
async def test_remove_keeps_a_child_that_has_its_own_name() -> None:
    async with graph_of(memory("disk", SIZE), slow("top", "disk")) as graph:
        await graph.remove_node("top")
        assert names(graph) == {"disk"}


@in_loop
async def test_remove_in_use_names_who_uses_it() -> None:
    async with graph_of(memory("disk", SIZE), slow("top", "disk")) as graph:
        backend = await graph.backend("top", owner="export 'guest'")
        for node, user in (("disk", "top.file"), ("top", "export 'guest'")):
            before = state(graph)
            with pytest.raises(NodeInUse, match=user):
                await graph.remove_node(node)
            assert state(graph) == before
        await graph.close_backend(backend)
        await graph.remove_node("top")


@pytest.mark.parametrize("change", ["remove_node", "remove_filter"])
def test_change_of_an_unknown_node_is_refused(change: str) -> None:
    @in_loop
    async def run() -> None:
        async with graph_of(memory("disk", SIZE)) as graph:
            with pytest.raises(GraphError, match="nowhere"):
                await getattr(graph, change)("nowhere")
            with pytest.raises(GraphError, match="nowhere"):
                await graph.replace_node("nowhere", "disk")
            with pytest.raises(GraphError, match="nowhere"):
                await graph.backend("nowhere")
            with pytest.raises(GraphError, match="nowhere"):
                await graph.reopen("nowhere", {})

    run()


@in_loop
async def test_insert_moves_every_parent_and_remove_moves_them_back() -> None:
    async with graph_of(memory("disk", SIZE), slow("other", "disk")) as graph:
        backend = await graph.backend("disk", writable=True)
        await backend.pwrite(0, b"before")
        await graph.insert_filter(slow("top", "disk"), above="disk")
        assert backend.node.name == "top"
        assert graph.node("other").children["file"].node.name == "top"
        with trace.record() as events:
            assert await backend.pread(0, 6) == b"before"
        assert [e.node for e in events] == ["top", "disk"]
        await graph.remove_filter("top")
        assert backend.node.name == "disk"
        assert graph.node("other").children["file"].node.name == "disk"
        assert names(graph) == {"disk", "other"}
        state(graph)


@in_loop
async def test_insert_of_a_filter_that_is_there_already() -> None:
    async with graph_of(memory("disk", SIZE), slow("top", "disk")) as graph:
        backend = await graph.backend("disk")
        await graph.insert_filter("top", above="disk")
        assert backend.node.name == "top"


@in_loop
async def test_insert_leaves_roots_that_stay() -> None:
    async with graph_of(memory("disk", SIZE)) as graph:
        stays = await graph.backend("disk", stays=True)
        await graph.insert_filter(slow("top", "disk"), above="disk")
        assert stays.node.name == "disk"


@in_loop
async def test_insert_of_what_filters_something_else_is_refused() -> None:
    async with graph_of(memory("disk", SIZE), memory("else", SIZE)) as graph:
        before = state(graph)
        with pytest.raises(GraphError, match="filters 'else'"):
            await graph.insert_filter(slow("top", "else"), above="disk")
        with pytest.raises(GraphError, match="not a filter"):
            await graph.insert_filter("else", above="disk")
        assert state(graph) == before


@in_loop
async def test_replace_moves_parents_and_their_requests() -> None:
    async with graph_of(memory("a", SIZE), memory("b", SIZE)) as graph:
        backend = await graph.backend("a", writable=True)
        await backend.pwrite(0, b"in a")
        await graph.replace_node("a", "b")
        await backend.pwrite(0, b"in b")
        assert (await content(graph, "a"))[:4] == b"in a"
        assert (await content(graph, "b"))[:4] == b"in b"


@in_loop
async def test_replace_of_an_inline_child_takes_it_away() -> None:
    async with graph_of(slow("top", {"driver": "memory", "size": SIZE}), memory("b", SIZE)) as graph:
        await graph.replace_node(graph.node("top").children["file"].node.name, "b")
        assert names(graph) == {"top", "b"}


@in_loop
async def test_replace_by_an_ancestor_keeps_the_chain_between() -> None:
    async with graph_of(memory("disk", SIZE), slow("a", "disk"), slow("b", "a")) as graph:
        backend = await graph.backend("disk")
        await graph.replace_node("disk", "b")
        assert backend.node.name == "b"
        assert graph.node("a").children["file"].node.name == "disk"


@in_loop
async def test_same_name_removed_and_added_in_one_transaction_is_the_new_node() -> None:
    async with graph_of(memory("disk", SIZE), slow("top", "disk")) as graph:
        backend = await graph.backend("top", writable=True)
        await backend.pwrite(0, b"old")
        old = graph.node("disk")
        async with graph.transaction() as change:
            change.remove("disk")
            change.add(memory("disk", SIZE))
        assert graph.node("disk") is not old
        assert graph.node("top").children["file"].node is graph.node("disk")
        state(graph)
        assert await backend.pread(0, 3) == bytes(3)
        await backend.pwrite(0, b"new")


@in_loop
async def test_transaction_of_several_edits_is_one_change() -> None:
    async with graph_of(memory("disk", SIZE)) as graph:
        backend = await graph.backend("disk", writable=True)
        with trace.record() as events:
            async with graph.transaction() as change:
                change.add(slow("a", "disk"))
                change.insert("a", above="disk")
                change.add(slow("b", "a"))
                change.insert("b", above="a")
                change.add(memory("scratch", SIZE))
                change.remove("scratch")
        assert not [e for e in events if e.op != "flush"]
        assert backend.node.name == "b"
        assert names(graph) == {"disk", "a", "b"}


@in_loop
async def test_transaction_in_which_the_caller_fails_changes_nothing() -> None:
    async with graph_of(memory("disk", SIZE)) as graph:
        before = state(graph)

        async def change_and_fail() -> None:
            async with graph.transaction() as change:
                change.add(slow("a", "disk"))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await change_and_fail()
        assert state(graph) == before
        await graph.add_node(slow("a", "disk"))


@in_loop
async def test_transactions_at_once_are_done_one_after_the_other() -> None:
    async with graph_of(memory("disk", SIZE)) as graph:
        backends = await asyncio.gather(*(graph.backend("disk") for _ in range(10)))
        assert len({backend.name for backend in backends}) == 10
        await asyncio.gather(*(graph.insert_filter(slow(f"f{n}", "disk"), above="disk") for n in range(5)))
        assert {backend.node.name for backend in backends} == {"f0"}
        state(graph)


@in_loop
async def test_backend_name_taken_is_refused() -> None:
    async with graph_of(memory("disk", SIZE)) as graph:
        await graph.backend("disk", name="guest")
        with pytest.raises(GraphError, match="guest"):
            await graph.backend("disk", name="guest")


@in_loop
async def test_backend_closed_refuses_requests_and_a_second_close() -> None:
    async with graph_of(memory("disk", SIZE)) as graph:
        backend = await graph.backend("disk", writable=True)
        await graph.close_backend(backend)
        with pytest.raises(IOFailure, match="closed"):
            await backend.pread(0, 1)
        with pytest.raises(GraphError):
            await graph.close_backend(backend)


@in_loop
async def test_backend_whose_flush_fails_is_closed_all_the_same() -> None:
    rule = {"event": "flush_to_disk", "iotype": "flush", "errno": "EIO", "once": True}
    disk = {"driver": "inject-error", "node-name": "disk", "image": "bytes", "inject-error": [rule]}
    async with graph_of(memory("bytes", SIZE), disk) as graph:
        backend = await graph.backend("disk", writable=True)
        await backend.pwrite(0, b"x")
        with pytest.raises(IOFailure, match="flush"):
            await graph.close_backend(backend)
        assert graph.backends() == []


@in_loop
async def test_backend_not_sharing_write_refuses_writers_and_the_reverse() -> None:
    async with graph_of(memory("disk", SIZE)) as graph:
        first = await graph.backend("disk", share=ALL & ~Perm.WRITE, owner="careful")
        with pytest.raises(PermissionConflict, match="careful"):
            await graph.backend("disk", writable=True, owner="writer")
        await graph.close_backend(first)
        await graph.backend("disk", writable=True, owner="writer")
        with pytest.raises(PermissionConflict, match="writer"):
            await graph.backend("disk", share=ALL & ~Perm.WRITE, owner="careful")


# Reopen.


@in_loop
async def test_reopen_changes_options_and_back() -> None:
    async with graph_of(memory("disk", SIZE)) as graph:
        backend = await graph.backend("disk", writable=True)
        await backend.pwrite(0, b"x" * CLUSTER)
        await graph.reopen("disk", {"size": SIZE, "discard": "ignore"})
        await backend.discard(0, CLUSTER)
        assert await backend.pread(0, 1) == b"x"
        await graph.reopen("disk", {"size": SIZE})
        await backend.discard(0, CLUSTER)
        assert await backend.pread(0, 1) == b"\0"


@in_loop
async def test_reopen_read_only_with_a_writer_is_refused() -> None:
    async with graph_of(memory("disk", SIZE)) as graph:
        backend = await graph.backend("disk", writable=True)
        before = state(graph)
        with pytest.raises(GraphError, match="read-only"):
            await graph.reopen("disk", {"size": SIZE, "read-only": True})
        assert state(graph) == before
        await backend.pwrite(0, b"x")
        await graph.close_backend(backend)
        await graph.reopen("disk", {"size": SIZE, "read-only": True})
        with pytest.raises(BlockGraphError, match="read-only"):
            await graph.backend("disk", writable=True)


@in_loop
async def test_reopen_of_what_can_not_change_names_the_option() -> None:
    async with graph_of(memory("disk", SIZE)) as graph:
        with pytest.raises(OptionError, match="size"):
            await graph.reopen("disk", {"size": 2 * SIZE})


@in_loop
async def test_reopen_moves_a_child() -> None:
    async with graph_of(memory("a", SIZE), memory("b", SIZE), slow("top", "a")) as graph:
        await fill(graph, "b", b"in b")
        backend = await graph.backend("top")
        await graph.reopen("top", {"file": "b"})
        assert await backend.pread(0, 4) == b"in b"
        state(graph)


# Snapshot.


def overlay(path: Path, **more: Any) -> dict[str, Any]:
    """A qcow2 image over a file, not yet over a backing node."""
    file = {"driver": "file", "filename": str(path)}
    return {"driver": "qcow2", "node-name": "over", "backing": None, "file": file, **more}


def test_snapshot_sends_writes_to_the_overlay_and_keeps_the_base(tmpfs: Path) -> None:
    @in_loop
    async def run() -> None:
        await create_file(str(tmpfs / "o"), SIZE, "qcow2", replace=False)
        async with graph_of(memory("base", SIZE)) as graph:
            backend = await graph.backend("base", writable=True)
            old = pattern(SIZE)
            await backend.pwrite(0, old)
            with trace.record() as events:
                await graph.snapshot("base", overlay(tmpfs / "o"))
            assert ("flush", "base") in [(e.op, e.node) for e in events]
            assert backend.node.name == "over"
            await backend.pwrite(10, b"new")
            assert await backend.pread(0, SIZE) == old[:10] + b"new" + old[13:]
            assert await content(graph, "base") == old
            state(graph)

    run()


def test_snapshot_refusals_change_nothing(tmpfs: Path) -> None:
    @in_loop
    async def run() -> None:
        await create_file(str(tmpfs / "o"), SIZE, "qcow2", replace=False)
        async with graph_of(memory("base", SIZE), memory("else", SIZE), slow("top", "base")) as graph:
            await graph.add_node(overlay(tmpfs / "o", backing="else"))
            before = state(graph)
            for node, over, why in (
                ("base", "over", "backing"),
                ("base", "else", "backing"),
                ("top", "over", "backing"),
            ):
                with pytest.raises(GraphError, match=why):
                    await graph.snapshot(node, over)
                assert state(graph) == before

    run()


# Close.


def test_close_writes_back_and_releases_images(tmpfs: Path) -> None:
    image = tmpfs / "disk.qcow2"

    @in_loop
    async def run() -> None:
        await create_file(str(image), SIZE, "qcow2", replace=False)
        for turn in range(2):
            async with graph_of(overlay(image)) as graph:
                backend = await graph.backend("over", writable=True)
                if turn:
                    assert await backend.pread(0, 5) == b"hello"
                await backend.pwrite(0, b"hello")  # neither flushed nor closed

    run()


def test_close_failing_at_one_node_writes_back_and_closes_the_others(
    monkeypatch: pytest.MonkeyPatch, tmpfs: Path
) -> None:
    image = tmpfs / "disk.qcow2"

    @in_loop
    async def run() -> None:
        await create_file(str(image), SIZE, "qcow2", replace=False)
        stubborn = [{"driver": "stubborn", "node-name": f"s{i}", "file": memory(f"m{i}", SIZE)} for i in range(2)]
        graph = await blockgraph.aopen({"nodes": [stubborn[0], overlay(image), stubborn[1]]})
        for name in ("s0", "over", "s1"):
            await (await graph.backend(name, writable=True)).pwrite(0, b"hello")
        monkeypatch.setattr(Stubborn, "fail_at", "flush")
        with pytest.raises(IOFailure, match=r"'s0'.*refused at flush"):
            await graph.close()
        assert Stubborn.log[-2:] == ["close", "close"]
        async with graph_of(overlay(image)) as again:  # its lock is free
            assert (await content(again, "over"))[:5] == b"hello"

    run()


@in_loop
async def test_close_waits_for_requests_and_refuses_later_ones() -> None:
    disk = {"driver": "inject-error", "node-name": "disk", "image": memory("bytes", SIZE)}
    graph = await blockgraph.aopen({"nodes": [disk]})
    backend = await graph.backend("disk", writable=True)
    driver = graph.node("disk").driver
    assert isinstance(driver, blockgraph.filters.inject_error.InjectError)
    driver.break_at("pwritev", "held")
    write = asyncio.ensure_future(backend.pwrite(0, b"x"))
    await driver.wait_break("held")
    closing = asyncio.ensure_future(graph.close())
    await settle()
    late = asyncio.ensure_future(backend.pread(0, 1))
    await settle()
    assert not closing.done()
    assert not late.done()
    driver.resume("held")
    await write
    await closing
    with pytest.raises(IOFailure, match="closed"):
        await late
    with pytest.raises(IOFailure, match="closed"):
        await backend.pread(0, 1)
    await graph.close()


@in_loop
async def test_close_cancelled_while_it_waits_closes_nothing() -> None:
    disk = {"driver": "inject-error", "node-name": "disk", "image": memory("bytes", SIZE)}
    async with graph_of(disk) as graph:
        backend = await graph.backend("disk", writable=True)
        driver = graph.node("disk").driver
        assert isinstance(driver, blockgraph.filters.inject_error.InjectError)
        driver.break_at("pwritev", "held")
        write = asyncio.ensure_future(backend.pwrite(0, b"x"))
        await driver.wait_break("held")
        closing = asyncio.ensure_future(graph.close())
        await settle()
        closing.cancel()
        await asyncio.wait({closing})
        driver.resume("held")
        await write
        assert await backend.pread(0, 1) == b"x"


def test_removed_format_is_closed_while_it_may_still_write_its_file(tmpfs: Path) -> None:
    """The file has a name of its own and stays; the image's last tables are written through it before it goes idle."""
    image = tmpfs / "disk.qcow2"

    @in_loop
    async def run() -> None:
        await create_file(str(image), SIZE, "qcow2", replace=False)
        file = {"driver": "file", "node-name": "file", "filename": str(image), "auto-read-only": True}
        async with graph_of(file, {**overlay(image), "file": "file"}) as graph:
            backend = await graph.backend("over", writable=True)
            for turn in range(20):
                await backend.pwrite(turn % 4 * CLUSTER, b"x" * CLUSTER)
                await backend.discard(turn % 4 * CLUSTER, CLUSTER)
            await backend.pwrite(0, b"last")
            await graph.close_backend(backend)
            await graph.remove_node("over")
            await graph.add_node({**overlay(image), "file": "file"})
            assert (await content(graph, "over"))[:4] == b"last"

    run()


def test_image_lock_is_given_up_with_the_last_writer(tmpfs: Path) -> None:
    image = tmpfs / "disk.raw"
    image.write_bytes(bytes(SIZE))
    file = {"driver": "file", "node-name": "disk", "filename": str(image), "auto-read-only": True}

    @in_loop
    async def run() -> None:
        async with graph_of(file) as one, graph_of(file) as two:
            first = await one.backend("disk", writable=True, share=ALL & ~Perm.WRITE)
            before = state(two)
            with pytest.raises(GraphError, match="locked"):
                await two.backend("disk", writable=True)
            assert state(two) == before
            await one.close_backend(first)
            second = await two.backend("disk", writable=True)
            await second.pwrite(0, b"x")

    run()


@in_loop
async def test_write_through_a_read_only_root_is_refused() -> None:
    async with graph_of(memory("disk", SIZE)) as graph:
        backend = await graph.backend("disk")
        with pytest.raises(ReadOnly):
            await backend.pwrite(0, b"x")


@in_loop
async def test_bitmap_follows_the_disk_when_it_grows() -> None:
    async with graph_of(memory("disk", SIZE)) as graph:
        bitmap = await graph.add_bitmap("disk", "b0")
        backend = await graph.backend("disk", writable=True, resize=True)
        await backend.truncate(2 * SIZE)
        assert list(bitmap.recorder.dirty_extents()) == [(SIZE, SIZE)]
        bitmap.clear()
        await backend.pwrite(2 * SIZE - 1, b"x")
        assert bitmap.recorder.count() == CLUSTER
        await backend.truncate(CLUSTER)
        assert bitmap.recorder.size == CLUSTER


@in_loop
async def test_backup_top_in_a_description_is_there_from_the_start() -> None:
    async with graph_of(memory("disk", SIZE), memory("target", SIZE), top_over()) as graph:
        backend = await graph.backend("top", writable=True)
        await backend.pwrite(0, b"x")
        state(graph)
