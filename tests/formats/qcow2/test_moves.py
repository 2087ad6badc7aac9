# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Tables that move, with flushes that fail meanwhile: the header on disk never leads to a place that others use."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.qcow2 import QEMU, check, create
from hypothesis import given
from hypothesis import strategies as st

import blockgraph
from blockgraph.api import SyncBackend, SyncGraph
from blockgraph.errors import BlockGraphError
from blockgraph.formats.qcow2.moves import Moves, Place


@given(st.lists(st.sampled_from(["move", "save", "settle", "restore, written", "restore, not written"]), max_size=30))
def test_place_that_the_header_leads_to_is_never_free(steps: list[str]) -> None:
    moves, current, on_disk = Moves(), 0, 0
    free: set[int] = set()
    saved, wanted = None, 0
    for step in steps:
        if step == "move":
            free.update(place.host for place in moves.move(Place(current, 1)))
            current += 1
        elif step == "save":
            if saved is None:
                saved, wanted = moves.save(), current
        elif saved is not None:
            if step != "restore, not written" and saved.moved:
                on_disk = wanted
            if step == "settle":
                on_disk = wanted
                free.update(place.host for place in moves.settle(saved))
            else:
                moves.restore(saved)
            saved = None
        assert not free & {on_disk, current}
        assert saved is None or wanted not in free
    if saved is not None:
        moves.restore(saved)
    saved = moves.save()
    free.update(place.host for place in moves.settle(saved))
    assert free == set(range(current))


Step = Callable[[SyncGraph, SyncBackend], None]


def resized(size: int) -> Step:
    return lambda graph, disk: graph.call(disk._backend.truncate(size))


def written(at: int, length: int) -> Step:
    return lambda graph, disk: disk.pwrite(at, b"A" * length)


def flushed(graph: SyncGraph, disk: SyncBackend) -> None:
    disk.flush()


#: Steps in which a table moves twice: the event of the first one's header, the disk's size.
MOVES: dict[str, tuple[str, int, list[Step]]] = {
    "l1": ("l1_grow_activate_table", 1 << 20, [resized(16 << 20), resized(32 << 20), written(1 << 19, 16 << 10)]),
    "refcounts": (
        "refblock_alloc_switch_table",
        32 << 20,
        [written(0, 9 << 20), flushed, written(9 << 20, 10 << 20), written(20 << 20, 64 << 10)],
    ),
}


@pytest.mark.parametrize("once", [True, False], ids=["one-flush-fails", "all-flushes-fail"])
@pytest.mark.parametrize("table", list(MOVES))
@QEMU
def test_header_written_and_its_flush_failed(tmp_path: Path, table: str, once: bool) -> None:
    """Then the table moves again, and a guest writes: leaks at most, after a crash and after an orderly end."""
    event, size, steps = MOVES[table]
    image = tmp_path / "disk"
    asyncio.run(create(image, size, cluster_size=512))
    rules = {
        "set-state": [{"event": event, "state": 1, "new_state": 2}],
        "inject-error": [{"event": "flush_to_disk", "state": 2, "iotype": "flush", "errno": "EIO", "once": once}],
    }
    file = {"driver": "inject-error", "image": {"driver": "file", "filename": str(image)}, **rules}
    caches = {"l2-cache-size": 4 << 20, "refcount-cache-size": 4 << 20}
    failed = 0
    with (
        suppress(BlockGraphError),
        blockgraph.open({"nodes": [{"driver": "qcow2", "node-name": "disk", "file": file, **caches}]}) as graph,
    ):
        disk = graph.backend("disk", writable=True, resize=True)
        disk.pwrite(0, b"A" * (1 << 19))
        disk.flush()
        for step in steps:
            try:
                step(graph, disk)
            except BlockGraphError:
                failed += 1
        shutil.copy(image, tmp_path / "crashed")
    assert failed
    check(tmp_path / "crashed", leaks=True)
    check(image, leaks=True)
