# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""DirtyBitmap and its views against sets of granules."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from blockgraph.bitmaps import DirtyBitmap, View
from blockgraph.bitmaps.bitmap import Mode
from blockgraph.errors import GraphError, NodeInUse
from blockgraph.native import Bitmap

GRANULE = 4096
GRANULES = 20
SIZE = GRANULES * GRANULE - 100


def marked(bits: Bitmap) -> set[int]:
    """Numbers of the granules that are set."""
    return {
        number for at, length in bits.dirty_extents() for number in range(at // GRANULE, -(-(at + length) // GRANULE))
    }


def bits_of(granules: set[int]) -> Bitmap:
    bits = Bitmap(SIZE, GRANULE)
    for number in granules:
        bits.set(number * GRANULE, 1)
    return bits


@pytest.mark.parametrize(
    "mode, succeeded, expected",
    [
        ("on-success", True, {3}),
        ("on-success", False, {1, 2, 3}),
        ("never", True, {1, 2, 3}),
        ("never", False, {1, 2, 3}),
        ("always", True, {3}),
        ("always", False, {2, 3}),
    ],
)
def test_one_view_ends_as_its_mode_says(mode: Mode, succeeded: bool, expected: set[int]) -> None:
    bitmap = DirtyBitmap("b0", SIZE, GRANULE)
    bitmap.record(GRANULE, 2 * GRANULE)
    view = bitmap.take("job 'b'", mode)
    bitmap.record(3 * GRANULE, 1)
    assert marked(view.bits) == {1, 2}
    assert marked(bitmap.contents()) == {1, 2, 3}
    view.end(succeeded=succeeded, left=bits_of({2}))
    assert marked(bitmap.contents()) == expected
    assert bitmap.holders == []


def test_bitmap_that_is_read_names_its_holders() -> None:
    bitmap = DirtyBitmap("b0", SIZE, GRANULE, node="disk")
    bitmap.take("job 'a'", "on-success")
    bitmap.take("export 'e'")
    with pytest.raises(NodeInUse, match="bitmap 'b0' is in use by job 'a', export 'e'"):
        bitmap.check_free("remove")


def test_inconsistent_bitmap_gives_no_view() -> None:
    bitmap = DirtyBitmap("b0", SIZE, GRANULE, inconsistent=True)
    bitmap.record(0, 1)
    assert bitmap.count() == 0
    with pytest.raises(GraphError, match=r"inconsistent.*full backup"):
        bitmap.take("job 'a'")


def test_bits_of_a_view_stay_when_the_bitmap_is_resized_cleared_or_another_one_ends() -> None:
    bitmap = DirtyBitmap("b0", SIZE, GRANULE)
    bitmap.record(GRANULE, 2 * GRANULE)
    kept = bitmap.take("export 'e'")
    other = bitmap.take("job 'a'", "always")
    held = kept.bits, other.bits
    bitmap.truncate(GRANULE)
    bitmap.truncate(SIZE)
    other.end(succeeded=True)
    bitmap.clear()
    bitmap.record(4 * GRANULE, 1)
    kept.end(succeeded=True)
    assert [(bits.size, marked(bits)) for bits in held] == [(SIZE, {1, 2})] * 2
    assert marked(bitmap.contents()) == {4}


class Views(RuleBasedStateMachine):
    """What is written is kept as a list of (moment, granule); each view knows its moment."""

    def __init__(self) -> None:
        super().__init__()
        self.bitmap = DirtyBitmap("b0", SIZE, GRANULE)
        self.now = 0
        self.written: list[tuple[int, int]] = []
        self.cleared_until = 0
        self.open: list[tuple[View, int, set[int]]] = []
        self.ended: list[tuple[int, set[int]]] = []

    def held(self) -> set[int]:
        return {granule for _, granule in self.written}

    @rule(first=st.integers(0, GRANULES - 1), count=st.integers(1, 4))
    def write(self, first: int, count: int) -> None:
        self.now += 1
        end = min(SIZE, (first + count) * GRANULE)
        self.bitmap.record(first * GRANULE, end - first * GRANULE)
        self.written += [(self.now, number) for number in range(first, -(-end // GRANULE))]

    @rule(mode=st.sampled_from(["on-success", "never", "always"]))
    @precondition(lambda self: len(self.open) < 4)
    def take(self, mode: Mode) -> None:
        self.open.append((self.bitmap.take(f"reader {self.now}", mode), self.now, self.held()))

    @rule(which=st.integers(0, 3), succeeded=st.booleans(), left=st.sets(st.integers(0, GRANULES - 1)))
    @precondition(lambda self: self.open)
    def end(self, which: int, succeeded: bool, left: set[int]) -> None:
        view, moment, _ = self.open.pop(which % len(self.open))
        view.end(succeeded=succeeded, left=bits_of(left))
        if view.mode == "always" or (view.mode == "on-success" and succeeded):
            self.ended.append((moment, set() if succeeded else left))
        if self.ended and all(other.mode == "never" for other, _, _ in self.open):
            since = min(moment for moment, _ in self.ended)
            self.written = [(moment, number) for moment, number in self.written if moment > since]
            self.now += 1
            self.written += [(self.now, number) for _, numbers in self.ended for number in numbers]
            self.ended = []

    @rule()
    def clear(self) -> None:
        self.bitmap.clear()
        self.written = []

    @rule(granules=st.sets(st.integers(0, GRANULES - 1)), undone=st.booleans())
    def merge(self, granules: set[int], undone: bool) -> None:
        undo = self.bitmap.merge([bits_of(granules)])
        if undone:
            undo()
        else:
            self.now += 1
            self.written += [(self.now, number) for number in granules]

    def teardown(self) -> None:
        for view, _, _ in self.open:
            view.drop()
        assert self.bitmap.holders == []

    @rule()
    def look(self) -> None:
        assert marked(self.bitmap.contents()) == self.held()
        for view, _, granules in self.open:
            assert marked(view.bits) == granules


TestViews = Views.TestCase
TestViews.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
