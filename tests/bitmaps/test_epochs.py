# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Bitmaps with epochs: what changed since any checkpoint, against a list of writes; kept through sessions and kills."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.loop import in_loop
from helpers.sidecar import GRANULE, MIB, SIZE, acted, after, disk, new_disk, session, sidecar
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from blockgraph.bitmaps import DirtyBitmap
from blockgraph.bitmaps.actions import AdvanceEpoch, BitmapName
from blockgraph.bitmaps.epochs import MAX_EPOCH, Epochs
from blockgraph.errors import GraphError
from blockgraph.graph.action import Abort
from blockgraph.native import Bitmap

SMALL = 512
GRANULES = 50


def granules(bits: Bitmap) -> list[int]:
    unit = bits.granularity
    return [n for at, length in bits.dirty_extents() for n in range(at // unit, -(-(at + length) // unit))]


class Checkpoints(RuleBasedStateMachine):
    """Writes are kept as (checkpoint, granule)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = GRANULES
        self.bitmap = DirtyBitmap("b0", GRANULES * SMALL - 3, SMALL)
        self.bitmap.epochs = Epochs(self.bitmap.size, SMALL, 16)
        self.now = 1
        self.written: list[tuple[int, int]] = []

    @rule(first=st.integers(0, GRANULES - 1), length=st.integers(1, 20))
    def write(self, first: int, length: int) -> None:
        end = min(self.count, first + length)
        if first < end:
            self.bitmap.record(first * SMALL, (end - first) * SMALL)
            self.written += [(self.now, number) for number in range(first, end)]

    @rule(undone=st.booleans())
    def advance(self, undone: bool) -> None:
        undo = self.bitmap.advance()
        if undone:
            undo()
        else:
            self.now += 1

    @rule()
    def clear(self) -> None:
        self.bitmap.clear()

    @rule(succeeded=st.booleans())
    def job(self, succeeded: bool) -> None:
        self.bitmap.take("job", "on-success").end(succeeded=succeeded)

    @rule(count=st.integers(1, GRANULES))
    def resize(self, count: int) -> None:
        before, size = self.bitmap.size, count * SMALL
        self.bitmap.truncate(size)
        self.count = count
        self.written += [(self.now, number) for number in range(before // SMALL, count) if before < size]
        self.written = [(moment, number) for moment, number in self.written if number < count]

    @rule()
    def look(self) -> None:
        for checkpoint in range(1, self.now + 1):
            expected = {number for moment, number in self.written if moment >= checkpoint}
            assert set(granules(self.bitmap.since(checkpoint))) == expected


TestCheckpoints = Checkpoints.TestCase
TestCheckpoints.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_many_runs_are_stamped_as_few_are(step: int) -> None:
    """More than a thousand in a chunk."""
    size = 40000 * SMALL - 100
    epochs, bits = Epochs(size, SMALL, 32768), Bitmap(size, SMALL)
    for number in range(0, 40000, step):
        bits.set(number * SMALL, 1)
    other = Bitmap(size, SMALL)
    other.set(0, size // 2)
    epochs.advance(other)
    epochs.advance(bits)
    assert granules(epochs.since(2)) == list(range(0, 40000, step))
    assert granules(epochs.since(1)) == sorted({*range(20000), *range(0, 40000, step)})


def test_numbers_end() -> None:
    epochs = Epochs(SMALL, SMALL, 8, MAX_EPOCH)
    with pytest.raises(GraphError, match="is the last"):
        epochs.advance(Bitmap(SMALL, SMALL))


@in_loop
async def test_checkpoints_are_kept_through_sessions_and_kills(tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    async with disk(path) as graph:
        await graph.add_bitmap("disk", "e", persistent=True, sidecar=True, epochs=True)
        root = await graph.backend("disk", writable=True)
        root.use_map()
        await root.pwrite(0, b"x")
        assert await graph.advance_epoch("disk", "e") == 2
        await root.pwrite(5 * MIB, b"x")
    async with session(path) as (graph, kill):
        bitmap = graph.bitmap("disk", "e")
        assert granules(bitmap.since(1)) == [0, 80]
        assert granules(bitmap.since(2)) == [80]
        root = await graph.backend("disk", writable=True)
        root.use_map()
        assert await graph.advance_epoch("disk", "e") == 3
        async with after(path, kill()) as other:
            left = other.bitmap("disk", "e")
            assert [granules(left.since(n)) for n in (1, 2, 3)] == [[0, 80], [80], [80]], "a superset at first"
        await sidecar(graph).turn()
        async with after(path, kill()) as other:
            left = other.bitmap("disk", "e")
            assert [granules(left.since(n)) for n in (1, 2, 3)] == [[0, 80], [80], []]
        await root.pwrite(9 * MIB, b"x")
        async with after(path, kill()) as other:
            left = other.bitmap("disk", "e")
            assert granules(left.since(3)) == list(range(9 * 16, 10 * 16))
            assert granules(left.since(2)) == [80, *range(9 * 16, 10 * 16)]
        with pytest.raises(GraphError, match="asked to abort"):
            await acted(graph, AdvanceEpoch(BitmapName("disk", "e")), Abort())
        async with after(path, kill()) as other:
            assert {144} <= set(granules(other.bitmap("disk", "e").since(3)))
        assert [granules(graph.bitmap("disk", "e").since(n)) for n in (1, 2, 3)] == [[0, 80, 144], [80, 144], [144]]
        with pytest.raises(GraphError, match="has checkpoints 1 to 3, not 4"):
            graph.bitmap("disk", "e").since(4)
    async with disk(path) as graph:
        assert [granules(graph.bitmap("disk", "e").since(n)) for n in (1, 2, 3)] == [[0, 80, 144], [80, 144], [144]]
        root = await graph.backend("disk", resize=True)
        await root.truncate(6 * MIB)
        await root.truncate(SIZE)
    async with disk(path) as graph:  # what was cut off reads as zeroes now
        grown = list(range(6 * 16, SIZE // GRANULE))
        assert [granules(graph.bitmap("disk", "e").since(n)) for n in (1, 3)] == [[0, 80, *grown], grown]


@in_loop
async def test_damaged_epochs_are_not_used(tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    async with disk(path) as graph:
        await graph.add_bitmap("disk", "e", persistent=True, sidecar=True, epochs=True)
        root = await graph.backend("disk", writable=True)
        await root.pwrite(GRANULE, b"x")
        await graph.advance_epoch("disk", "e")
        store = graph.node("disk").bitmap_store
    chunk = store._now.entries["e"].stamps[0]  # type: ignore[union-attr]
    with (tmp_path / "disk.bitmaps").open("r+b") as file:
        file.seek(chunk.offset)
        file.write(b"\xff")
    async with disk(path) as graph:
        assert "epochs" in graph.bitmap("disk", "e").reason


@in_loop
async def test_bitmap_without_epochs_refuses(tmp_path: Path) -> None:
    async with disk(new_disk(tmp_path)) as graph:
        await graph.add_bitmap("disk", "b0")
        with pytest.raises(GraphError, match="has no epochs"):
            await graph.advance_epoch("disk", "b0")
        with pytest.raises(GraphError, match="has no epochs"):
            graph.bitmap("disk", "b0").since(1)
