# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Dirty bitmap against a Python set of granules."""

from __future__ import annotations

import os
import random
import threading
from array import array
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blockgraph._native import ffi, lib
from blockgraph.native import Bitmap
from blockgraph.native.bitmap import RUNS_MIN

TIB = 1 << 40


def names_by(name_of: Callable[[int], Any]) -> list[str]:
    names: list[str] = []
    while (name := name_of(len(names))) != ffi.NULL:
        names.append(ffi.string(name).decode())
    return names


DECODERS, MERGERS = names_by(lib.bg_bitmap_decoder), names_by(lib.bg_bitmap_merger)
"""The ways to find runs, and to merge, that this processor has."""


class Model:
    """The oracle: a set of granule numbers."""

    def __init__(self, size: int, granularity: int) -> None:
        self.size, self.granularity, self.dirty = size, granularity, set[int]()

    def touched(self, offset: int, length: int) -> range:
        return range(offset // self.granularity, -(-(offset + length) // self.granularity) if length else 0)

    def at(self, offset: int) -> bool:
        return offset // self.granularity in self.dirty

    def run(self, offset: int, end: int, max_length: int, *, dirty: bool) -> tuple[int, int] | None:
        edges = sorted({offset, end, *range(-(-offset // self.granularity) * self.granularity, end, self.granularity)})
        wanted = [(a, b) for a, b in pairwise(edges) if self.at(a) == dirty]
        if not wanted:
            return None
        start, stop = wanted[0]
        for a, b in wanted[1:]:
            if a == stop:
                stop = b
        return start, min(stop - start, max_length)

    def count(self) -> int:
        return sum(min(self.granularity, self.size - bit * self.granularity) for bit in self.dirty)


class BitmapMachine(RuleBasedStateMachine):
    @initialize(
        shift=st.sampled_from([9, 10, 12, 16, 31]),
        bits=st.one_of(st.integers(0, 200), st.integers(4000, 4200)),
        tail=st.integers(0, 2**31 - 1),
    )
    def create(self, shift: int, bits: int, tail: int) -> None:
        granularity = 1 << shift
        size = bits * granularity + tail % granularity
        self.real, self.model = Bitmap(size, granularity), Model(size, granularity)

    def draw_range(self, data: st.DataObject, *, aligned: bool = False) -> tuple[int, int]:
        model = self.model
        last = -(-model.size // model.granularity)
        a, b = sorted(data.draw(st.tuples(st.integers(0, last), st.integers(0, last))))
        start, end = min(a * model.granularity, model.size), min(b * model.granularity, model.size)
        if aligned and start == end:
            return 0, 0
        if not aligned and end:
            start = max(0, start - data.draw(st.integers(0, model.granularity)))
            end = max(start, end - data.draw(st.integers(0, model.granularity)))
        return start, end

    def draw_limit(self, data: st.DataObject) -> int:
        return data.draw(st.integers(1, 5 * self.model.granularity))

    @rule(data=st.data())
    def set(self, data: st.DataObject) -> None:
        start, end = self.draw_range(data)
        self.real.set(start, end - start)
        self.model.dirty.update(self.model.touched(start, end - start))

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        start, end = self.draw_range(data, aligned=True)
        self.real.reset(start, end - start)
        self.model.dirty.difference_update(self.model.touched(start, end - start))

    @rule()
    def fill(self) -> None:
        self.real.fill()
        self.model.dirty.update(self.model.touched(0, self.model.size))

    @rule()
    def clear(self) -> None:
        self.real.clear()
        self.model.dirty.clear()

    @rule(data=st.data())
    def find(self, data: st.DataObject) -> None:
        start, end = self.draw_range(data)
        limit = self.draw_limit(data)
        assert self.real.next_dirty(start, end, limit) == self.model.run(start, end, limit, dirty=True)
        assert self.real.next_clean(start, end, limit) == self.model.run(start, end, limit, dirty=False)
        whole = self.model.size + 1
        assert self.real.next_dirty(start) == self.model.run(start, self.model.size, whole, dirty=True)
        assert self.real.next_clean(start) == self.model.run(start, self.model.size, whole, dirty=False)

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        start, end = self.draw_range(data, aligned=True)
        limit = self.draw_limit(data)
        whole = max(limit // self.model.granularity, 1) * self.model.granularity
        taken = self.model.run(start, end, whole, dirty=True)
        assert self.real.take(start, end, limit) == taken
        if taken:
            self.model.dirty.difference_update(self.model.touched(*taken))

    @rule(data=st.data())
    def extents(self, data: st.DataObject) -> None:
        start, end = self.draw_range(data)
        expected, at = [], start
        while run := self.model.run(at, end, end, dirty=True):
            expected.append(run)
            at = sum(run)
        assert list(self.real.dirty_extents(start, end)) == expected

    @rule(data=st.data())
    def through_bytes(self, data: st.DataObject) -> None:
        start, end = self.draw_range(data, aligned=True)
        eight = 8 * self.model.granularity
        start = start // eight * eight
        end = min(-(-end // eight) * eight, self.model.size)
        bits = self.model.touched(start, end - start)
        expected = bytearray(-(-len(bits) // 8))
        for bit in self.model.dirty.intersection(bits):
            expected[(bit - bits.start) // 8] |= 1 << (bit - bits.start) % 8
        assert self.real.serialise(start, end - start) == expected
        replacement = data.draw(st.binary(min_size=len(expected), max_size=len(expected)))
        self.real.deserialise(start, replacement)
        self.model.dirty.difference_update(bits)
        self.model.dirty.update(bit for i, bit in enumerate(bits) if replacement[i // 8] >> i % 8 & 1)

    @rule(data=st.data(), shift=st.sampled_from([9, 10, 13, 16, 31]))
    def merge(self, data: st.DataObject, shift: int) -> None:
        if self.model.size >> shift > 5000:
            return
        other = Bitmap(self.model.size, 1 << shift)
        for _ in range(3):
            start, end = self.draw_range(data)
            other.set(start, end - start)
        for start, length in other.dirty_extents():
            self.model.dirty.update(self.model.touched(start, length))
        self.real.merge(other)

    @rule(data=st.data())
    def subtract(self, data: st.DataObject) -> None:
        other = Bitmap(self.model.size, self.model.granularity)
        for _ in range(3):
            start, end = self.draw_range(data)
            other.set(start, end - start)
        for start, length in other.dirty_extents():
            self.model.dirty.difference_update(self.model.touched(start, length))
        self.real.subtract(other)

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        size = data.draw(st.integers(0, 2 * self.model.size + self.model.granularity))
        if size // self.model.granularity > 9000:
            return
        self.real.truncate(size)
        self.model.size = size
        self.model.dirty.intersection_update(self.model.touched(0, size))

    @rule()
    def copy(self) -> None:
        before, self.real = self.real, self.real.copy()
        before.fill()

    @precondition(lambda self: self.model.size)
    @rule(data=st.data())
    def get(self, data: st.DataObject) -> None:
        offset = data.draw(st.integers(0, self.model.size - 1))
        assert self.real.get(offset) == self.model.at(offset)

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "real"):
            assert self.real.size == self.model.size
            assert self.real.count() == self.model.count()
            found = {bit for run in self.real.dirty_extents() for bit in self.model.touched(*run)}
            assert found == self.model.dirty


TestBitmapMachine = BitmapMachine.TestCase
TestBitmapMachine.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)


@given(
    bits=st.lists(st.integers(0, 300_000), max_size=300, unique=True),
    runs=st.lists(st.tuples(st.integers(0, 300_000), st.integers(1, 20_000)), max_size=4),
    offset=st.integers(0, 300_000 * 512),
)
@settings(max_examples=60, deadline=None)
def test_dirty_extents_over_many_words_equal_next_dirty_in_turn(
    bits: list[int], runs: list[tuple[int, int]], offset: int
) -> None:
    bitmap = Bitmap(320_001 * 512 - 100, 512)
    for bit in bits:
        bitmap.set(bit * 512, 1)
    for bit, count in runs:
        bitmap.set(bit * 512, count * 512)
    expected, at = [], offset
    while run := bitmap.next_dirty(at):
        expected.append(run)
        at = sum(run)
    assert list(bitmap.dirty_extents(offset)) == expected


def runs_by(decoder: str, bitmap: Bitmap, offset: int, end: int) -> list[tuple[int, int]]:
    """(start, end) of each run, by the decoder of that name."""
    out, at = ffi.new("bg_bitmap_extent[]", RUNS_MIN), ffi.new("int64_t *", offset)
    runs: list[tuple[int, int]] = []
    while True:
        before = at[0]
        count = lib.bg_bitmap_extents_by(DECODERS.index(decoder), bitmap._bitmap, before, end, out, RUNS_MIN, at)
        assert count >= 0
        runs += [(out[i].start, out[i].end) for i in range(count)]
        if at[0] == end:
            return runs
        assert before < at[0] < end


def model_runs(marks: bytes, granularity: int, offset: int, end: int) -> list[tuple[int, int]]:
    """The same, from one byte per granule."""
    runs, at = [], marks.find(1, offset // granularity)
    while at != -1 and offset < end and at * granularity < end:
        stop = marks.find(0, at)
        stop = len(marks) if stop == -1 else stop
        runs.append((max(at * granularity, offset), min(stop * granularity, end)))
        at = marks.find(1, stop)
    return runs


PARTS = st.tuples(
    # Around words, blocks of words, and areas that have a summary of their own.
    st.sampled_from([1, 7, 63, 64, 65, 512, 4096, 32_768, 40_000, 262_144]),
    st.sampled_from([b"\0", b"\1", b"\0\1"]),
    # How many of a million granules are turned.
    st.sampled_from([0, 30, 10_000, 300_000, 700_000]),
)


def pattern(parts: list[tuple[int, bytes, int]], seed: int) -> bytes:
    """A byte per granule."""
    rng, marks = random.Random(seed), bytearray()
    for length, cycle, turned in parts:
        part = bytearray((cycle * length)[:length])
        for _ in range(length * turned // 1_000_000):
            part[rng.randrange(length)] ^= 1
        marks += part
    return bytes(marks)


def marked(marks: bytes, size: int, granularity: int) -> Bitmap:
    bitmap = Bitmap(size, granularity)
    packed = int(marks[::-1].translate(bytes.maketrans(b"\0\1", b"01")), 2).to_bytes(-(-len(marks) // 8), "little")
    bitmap.deserialise(0, packed)
    return bitmap


@pytest.mark.parametrize("decoder", DECODERS)
@given(
    parts=st.lists(PARTS, min_size=1, max_size=8),
    seed=st.integers(0, 2**32),
    cut=st.integers(0, 511),
    shift=st.sampled_from([9, 16]),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_runs_by_each_decoder_equal_those_of_model(
    decoder: str, parts: list[tuple[int, bytes, int]], seed: int, cut: int, shift: int, data: st.DataObject
) -> None:
    granularity, marks = 1 << shift, pattern(parts, seed)
    size = len(marks) * granularity - cut
    bitmap = marked(marks, size, granularity)
    offset = data.draw(st.integers(0, size) | st.just(0))
    end = data.draw(st.integers(offset, size) | st.just(size))
    assert runs_by(decoder, bitmap, offset, end) == model_runs(marks, granularity, offset, end)


@pytest.mark.parametrize("decoder", DECODERS)
def test_runs_by_each_decoder_of_largest_disk_keep_exact_end(decoder: str) -> None:
    bitmap = Bitmap(2**63 - 1, 1 << 31)
    bitmap.set(2**62, 1)
    bitmap.set(2**63 - 2, 1)
    assert runs_by(decoder, bitmap, 0, bitmap.size) == [(2**62, 2**62 + 2**31), (2**63 - 2**31, 2**63 - 1)]


def test_portable_decoder_is_always_there() -> None:
    assert DECODERS[-1] == "portable"
    assert lib.bg_bitmap_extents_by(len(DECODERS), ffi.NULL, 0, 0, ffi.NULL, RUNS_MIN, ffi.NULL) < 0


def test_read_dirty_in_turn_gives_all_runs() -> None:
    bitmap = Bitmap(TIB, 65536)
    for i in range(3 * RUNS_MIN):
        bitmap.set(i * 2**22 + 2**20, 2**17)
    out, at, found = array("q", bytes(16 * RUNS_MIN)), 0, list[int]()
    while at != TIB:
        runs, at = bitmap.read_dirty(out, at)
        found += out[: 2 * runs]
    assert found == [i * 2**22 + 2**20 + edge for i in range(3 * RUNS_MIN) for edge in (0, 2**17)]


def merge_by(merger: str, into: Bitmap, other: Bitmap) -> None:
    assert lib.bg_bitmap_merge_by(MERGERS.index(merger), into._bitmap, other._bitmap) == 0


def check_merged(into: Bitmap, expected: Bitmap) -> None:
    """Bits, count and summaries are right."""
    assert into.serialise(0, into.size) == expected.serialise(0, into.size)
    assert into.count() == expected.count()
    assert list(into.dirty_extents()) == list(expected.dirty_extents())


@pytest.mark.parametrize("merger", MERGERS)
@given(
    finer=st.integers(-9, 9) | st.sampled_from([-13, 13]),
    parts=st.lists(PARTS, min_size=1, max_size=8),
    seed=st.integers(0, 2**32),
    cut=st.integers(0, 511),
    before=st.lists(st.tuples(st.integers(0, 2**40), st.integers(1, 2**20)), max_size=3),
)
@settings(max_examples=80, deadline=None)
def test_merge_by_each_merger_sets_what_the_runs_of_the_other_touch(
    merger: str, finer: int, parts: list[tuple[int, bytes, int]], seed: int, cut: int, before: list[tuple[int, int]]
) -> None:
    granularity = 512 << max(0, finer)
    marks = pattern(parts, seed)[: 2**22 >> max(0, finer)]
    size = len(marks) * granularity - cut
    other = marked(marks, size, granularity)
    into = Bitmap(size, granularity >> finer if finer > 0 else granularity << -finer)
    for offset, length in before:
        offset %= size
        into.set(offset, min(length, size - offset))
    expected = into.copy()
    for run in other.dirty_extents():
        expected.set(*run)
    merge_by(merger, into, other)
    check_merged(into, expected)


@pytest.mark.parametrize("finer", [-7, -2, -1, 0, 1, 3, 6], ids=lambda finer: f"by-2^{finer}")
@pytest.mark.parametrize("merger", MERGERS)
def test_merge_of_densely_and_thinly_dirty_areas_is_complete(merger: str, finer: int) -> None:
    """Some of the areas whose memory comes in huge pages, and some that do not."""
    window = 2**24
    granularity = 2**16
    size = (3 * window + 5000) * granularity - 1
    grain = granularity << max(0, finer)
    other = Bitmap(size, grain)
    for start, length in ((0, window), (2 * window - 100, window // 2)):
        for at in range(start, start + length, 1 << 13):
            other.set(at * granularity, 100 * granularity)
    for at in range(window, 3 * window, 10**6):
        other.set(at * granularity, 1)
    other.set(size - 1, 1)
    into = Bitmap(size, grain >> finer if finer > 0 else grain << -finer)
    into.set(2 * window * granularity, 1)
    expected = into.copy()
    for run in other.dirty_extents():
        expected.set(*run)
    merge_by(merger, into, other)
    check_merged(into, expected)
    assert into.copy().serialise(0, size) == expected.serialise(0, size)


def test_portable_merger_is_always_there() -> None:
    assert MERGERS[-1] == "portable"
    bitmap = Bitmap(1, 512)
    assert lib.bg_bitmap_merge_by(len(MERGERS), bitmap._bitmap, bitmap._bitmap) < 0


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_few_bits_of_64_tib_take_little_memory_however_they_come() -> None:
    """128 MiB of bits: set, copied, merged, loaded, cleared and set again."""
    thousand = Bitmap(64 * TIB, 65536)
    before = resident()
    for number in range(1000):
        thousand.set(number * (64 * TIB // 1000), 1)
    copy = thousand.copy()
    merged, loaded, again = (Bitmap(64 * TIB, 65536) for _ in range(3))
    merged.merge(thousand)
    for offset in range(0, 64 * TIB, TIB):
        loaded.deserialise(offset, thousand.serialise(offset, TIB))
    again.fill()
    again.clear()
    again.merge(thousand)
    assert thousand.count() == copy.count() == merged.count() == loaded.count() == again.count()
    assert resident() - before < 64 << 20


def test_bytes_over_several_areas_are_taken_over() -> None:
    """Full, empty and mixed areas replace full, empty and mixed ones."""
    size, window = (4 * 2**24 + 777) * 512, 2**21
    rng = random.Random(5)
    bitmap = Bitmap(size, 512)
    for _ in range(3):
        kinds = [rng.choice([bytes, lambda n: b"\xff" * n, rng.randbytes]) for _ in range(4)]
        data = b"".join([kind(window) for kind in kinds]) + rng.randbytes(97) + b"\1"
        bitmap.deserialise(0, data)
        assert bitmap.serialise(0, size) == data
        assert bitmap.count() == int.from_bytes(data, "little").bit_count() * 512
        assert bitmap.next_dirty() is not None
    bitmap.deserialise(0, bytes(len(data)))
    assert bitmap.count() == 0
    assert bitmap.next_dirty() is None


@pytest.mark.parametrize(
    "out, problem",
    [
        (array("q", bytes(16 * RUNS_MIN - 8)), "8192 int64 or more, not 65528 bytes"),
        (bytearray(16 * RUNS_MIN), "not 65536 bytes of 'B'"),
        (array("d", bytes(16 * RUNS_MIN)), "not 65536 bytes of 'd'"),
    ],
    ids=["short", "bytes", "double"],
)
def test_read_dirty_into_what_does_not_fit_is_refused(out: bytearray, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Bitmap(TIB, 65536).read_dirty(out)


def test_read_dirty_out_of_range_is_refused() -> None:
    out = array("q", bytes(16 * RUNS_MIN))
    for offset, end in [(0, 1001), (-1, 1000), (2**70, None), (500, 400)]:
        with pytest.raises(ValueError, match="not inside the disk"):
            Bitmap(1000, 512).read_dirty(out, offset, end)


@pytest.mark.parametrize("step", [2, 3, 64, 65, 4096], ids=["two", "three", "word", "word-and-one", "group"])
def test_dirty_extents_beyond_one_batch_are_complete(step: int) -> None:
    bitmap = Bitmap(step * 10_000 * 512, 512)
    for i in range(10_000):
        bitmap.set(i * step * 512, 512)
    assert list(bitmap.dirty_extents()) == [(i * step * 512, 512) for i in range(10_000)]


def test_bitmap_of_64_tib_finds_single_granule_at_both_ends() -> None:
    bitmap = Bitmap(64 * TIB, 65536)
    assert bitmap.next_dirty() is None
    assert bitmap.next_clean() == (0, 64 * TIB)
    bitmap.set(64 * TIB - 1, 1)
    bitmap.set(0, 1)
    assert list(bitmap.dirty_extents()) == [(0, 65536), (64 * TIB - 65536, 65536)]
    assert bitmap.count() == 2 * 65536


def test_bitmap_of_largest_disk_keeps_exact_end() -> None:
    size = 2**63 - 1
    bitmap = Bitmap(size, 1 << 31)
    bitmap.set(size - 1, 1)
    assert bitmap.next_dirty() == (size + 1 - (1 << 31), (1 << 31) - 1)
    assert list(bitmap.dirty_extents()) == [bitmap.next_dirty()]
    assert bitmap.next_clean() == (0, size + 1 - (1 << 31))
    assert bitmap.count() == (1 << 31) - 1


def test_filled_bitmap_counts_tail_granule_cut() -> None:
    bitmap = Bitmap(1_000_001, 65536)
    bitmap.fill()
    assert bitmap.count() == 1_000_001
    assert bitmap.next_clean() is None


@pytest.mark.parametrize(
    "size, granularity, words",
    [
        pytest.param(-1, 512, "size", id="negative-size"),
        pytest.param(2**63, 65536, "size", id="size-beyond-64-bits"),
        pytest.param(100, 256, "granularity", id="granularity-too-small"),
        pytest.param(100, 3000, "granularity", id="granularity-not-power-of-two"),
        pytest.param(100, 1 << 32, "granularity", id="granularity-too-large"),
        pytest.param(2**62, 512, "2\\*\\*38 bits", id="too-many-bits"),
    ],
)
def test_bitmap_of_impossible_shape_is_refused(size: int, granularity: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Bitmap(size, granularity)


@pytest.mark.parametrize(
    "call, arguments, words",
    [
        pytest.param("set", (0, 10_001), "not inside the disk of 10000", id="set-past-end"),
        pytest.param("set", (-1, 1), "not inside", id="set-before-start"),
        pytest.param("set", (2**64, 1), "not inside", id="set-beyond-64-bits"),
        pytest.param("reset", (1, 4095), "not aligned to the granularity of 4096", id="reset-unaligned-start"),
        pytest.param("reset", (0, 4097), "not aligned", id="reset-unaligned-end"),
        pytest.param("reset", (0, 20_000), "not inside", id="reset-past-end"),
        pytest.param("get", (10_000,), "not inside", id="get-at-end"),
        pytest.param("next_dirty", (5, 4), "range from 5 to 4", id="find-backwards"),
        pytest.param("next_dirty", (0, 10_001), "not inside", id="find-past-end"),
        pytest.param("next_clean", (0, None, 0), "max_length", id="find-nothing"),
        pytest.param("take", (1,), "not aligned", id="take-unaligned-start"),
        pytest.param("take", (0, 4097), "not aligned", id="take-unaligned-end"),
        pytest.param("serialise", (4096, 4096), "8 granules", id="serialise-unaligned"),
        pytest.param("serialise", (0, 10_001), "not inside", id="serialise-past-end"),
        pytest.param("deserialise", (0, b"ab"), "2 bytes of bits", id="deserialise-too-many"),
        pytest.param("deserialise", (1, b"a"), "not aligned", id="deserialise-unaligned"),
        pytest.param("deserialise", (40_000, b"a"), "not inside", id="deserialise-past-end"),
        pytest.param("truncate", (-1,), "size", id="truncate-negative"),
        pytest.param("merge", (Bitmap(9_999, 4096),), "9999 bytes", id="merge-other-size"),
        pytest.param("subtract", (Bitmap(9_999, 4096),), "9999 bytes", id="subtract-other-size"),
        pytest.param("subtract", (Bitmap(10_000, 8192),), "4096 and 8192", id="subtract-other-granularity"),
    ],
)
def test_bitmap_with_argument_out_of_range_raises_and_is_unchanged(
    call: str, arguments: tuple[object], words: str
) -> None:
    bitmap = Bitmap(10_000, 4096)
    bitmap.set(4096, 1)
    with pytest.raises(ValueError, match=words):
        getattr(bitmap, call)(*arguments)
    assert list(bitmap.dirty_extents()) == [(4096, 4096)]


def test_dirty_extents_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="range from 0 to 2000"):
        list(Bitmap(1000, 512).dirty_extents(0, 2000))


def test_take_from_several_threads_hands_each_granule_to_one() -> None:
    bitmap = Bitmap(64 << 20, 512)
    bitmap.fill()
    taken: list[list[tuple[int, int]]] = [[] for _ in range(4)]

    def work(mine: list[tuple[int, int]], seed: int) -> None:
        sizes = random.Random(seed)
        while run := bitmap.take(max_length=sizes.randrange(512, 65536)):
            mine.append(run)

    threads = [threading.Thread(target=work, args=(mine, i)) for i, mine in enumerate(taken)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs = sorted(run for mine in taken for run in mine)
    assert runs[0][0] == 0
    assert all(sum(a) == b[0] for a, b in pairwise(runs))
    assert sum(runs[-1]) == 64 << 20
    assert bitmap.count() == 0


def test_set_from_several_threads_loses_no_bit() -> None:
    bitmap = Bitmap(16_384 * 512, 512)

    def work(first: int) -> None:
        for bit in range(first, 16_384, 4):
            bitmap.set(bit * 512, 1)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(bitmap.dirty_extents()) == [(0, 16_384 * 512)]
