# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Extent map against a Python dict of units, and its promises one by one. Under threads: test_extent_map_threads.py."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import resource
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.native_request import native_request
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from blockgraph._native import ffi, lib
from blockgraph.native import Bitmap, ExtentMap, MapExtent, Zeroing, allocate_aligned
from blockgraph.native.extent_map import MAX_UNIT, MIN_MEMORY

MIB = 1 << 20
TIB = 1 << 40
REGION = 16 * MIB
BLOCK = 4096
PART = MIB // 4


def put(extents: ExtentMap, *items: MapExtent) -> int:
    return extents.insert(extents.generation(), items)


class Entry(NamedTuple):
    """What a unit must map to; `shift` is storage offset minus offset."""

    slot: int | None
    shift: int
    writable: bool


class MapMachine(RuleBasedStateMachine):
    """One thread, every operation: what is found is what the dict says, and with enough memory all of it is."""

    UNIT = 1 * MIB
    UNITS = 75

    @initialize(memory=st.sampled_from([MIN_MEMORY, 64 * MIB]), tail=st.integers(1, 1 * MIB))
    def create(self, memory: int, tail: int) -> None:
        self.size = (self.UNITS - 1) * self.UNIT + tail
        self.real = ExtentMap(self.size, memory)
        self.slots = [self.real.add_slot(fd) for fd in (0, 1)]
        self.model: dict[int, Entry] = {}
        self.old_generation, self.touched_since = self.real.generation(), dict[int, str]()

    def draw(self, data: st.DataObject) -> tuple[range, int, int]:
        start = data.draw(st.integers(0, self.UNITS - 1))
        units = range(start, data.draw(st.integers(start + 1, self.UNITS)))
        offset = start * self.UNIT
        return units, offset, min(units.stop * self.UNIT, self.size) - offset

    def draw_extent(self, data: st.DataObject, offset: int, length: int) -> MapExtent:
        slot = data.draw(st.sampled_from([None, *self.slots]))
        if slot is None:
            return MapExtent(offset, length)
        return MapExtent(offset, length, slot, offset + data.draw(st.sampled_from([0, 512])), data.draw(st.booleans()))

    def taken(self, units: range, extent: MapExtent, *, writable: bool = True) -> None:
        shift = 0 if extent.slot is None else extent.storage_offset - extent.offset
        self.model.update(dict.fromkeys(units, Entry(extent.slot, shift, extent.writable and writable)))

    @rule(data=st.data())
    def insert(self, data: st.DataObject) -> None:
        units, offset, length = self.draw(data)
        extent = self.draw_extent(data, offset, length)
        assert put(self.real, extent) == 1
        self.taken(units, extent)

    @rule(data=st.data(), parts=st.integers(2, 6))
    def insert_pieces_that_continue_each_other(self, data: st.DataObject, parts: int) -> None:
        units, offset, length = self.draw(data)
        whole = self.draw_extent(data, offset, length)
        cuts = sorted({0, length, *(length * i // parts for i in range(parts))})
        pieces = [
            whole._replace(offset=offset + a, length=b - a, storage_offset=whole.storage_offset + a)
            for a, b in pairwise(cuts)
        ]
        assert put(self.real, *data.draw(st.permutations(pieces))) == len(pieces)
        self.taken(units, whole)

    @rule(data=st.data(), writable=st.booleans(), zeroes=st.booleans(), storages=st.integers(1, 2))
    def insert_scattered(self, data: st.DataObject, writable: bool, zeroes: bool, storages: int) -> None:
        """No two units are neighbours in the storage, so that a region may become a table."""
        units, *_ = self.draw(data)
        extents = []
        for unit in units:
            offset = unit * self.UNIT
            length = min(self.UNIT, self.size - offset)
            slot = None if zeroes and unit % 3 == 0 else self.slots[unit % storages]
            extents.append(MapExtent(offset, length, slot, (self.UNITS - unit) * self.UNIT, writable))
            self.taken(range(unit, unit + 1), extents[-1]._replace(writable=writable and slot is not None))
        assert put(self.real, *extents) == len(extents)

    @rule(data=st.data())
    def insert_with_an_old_generation(self, data: st.DataObject) -> None:
        units, offset, length = self.draw(data)
        extent = self.draw_extent(data, offset, length)
        regions = range(offset // REGION, (offset + length - 1) // REGION + 1)
        done = {self.touched_since.get(region) for region in regions}
        taken = self.real.insert(self.old_generation, [extent])
        assert taken == ("invalidate" not in done)
        if taken:
            self.taken(units, extent, writable="protect" not in done)

    @rule()
    def remember_generation(self) -> None:
        self.old_generation, self.touched_since = self.real.generation(), {}

    @rule(data=st.data(), change=st.sampled_from(["invalidate", "protect"]))
    def take_away(self, data: st.DataObject, change: str) -> None:
        units, offset, length = self.draw(data)
        start = self.real.start_invalidate if change == "invalidate" else self.real.start_protect
        assert self.real.is_settled(start(offset, length))
        for region in range(offset // REGION, (offset + length - 1) // REGION + 1):
            if self.touched_since.get(region) != "invalidate":
                self.touched_since[region] = change
        for unit in self.model.keys() & set(units):
            if change == "invalidate":
                del self.model[unit]
            else:
                self.model[unit] = self.model[unit]._replace(writable=False)

    @rule(data=st.data(), write=st.booleans())
    def look_up_a_range(self, data: st.DataObject, write: bool) -> None:
        units, offset, length = self.draw(data)
        pieces, held = ffi.new("bg_map_piece[]", self.UNITS), ffi.new("bg_map_request *")
        code = lib.bg_map_begin(self.real.native, offset, length, write, pieces, self.UNITS, held)
        entries = [self.model.get(unit) for unit in units]
        assert code == (0 if all(e and (e.writable or not write) for e in entries) else 1)
        if code == 0:
            at = offset
            for piece in pieces[0 : held.count]:
                entry = self.model[at // self.UNIT]
                assert piece.slot == (-1 if entry.slot is None else entry.slot)
                assert piece.slot < 0 or piece.storage_offset == at + entry.shift
                at += piece.length
            assert at == offset + length
            lib.bg_map_end(self.real.native, held, 0)

    @invariant()
    def finds_what_the_model_says(self) -> None:
        for unit in range(self.UNITS):
            for offset in (unit * self.UNIT, min((unit + 1) * self.UNIT, self.size) - 1):
                found, entry = self.real.find(offset), self.model.get(unit)
                if found is None or entry is None:
                    assert found is None
                    assert entry is None
                    continue
                shift = 0 if found.slot is None else found.storage_offset - found.offset
                assert Entry(found.slot, shift, found.writable) == entry
                assert found.offset <= offset < found.offset + found.length

    @invariant()
    def keeps_to_its_memory(self) -> None:
        stats = self.real.stats()
        assert stats.bytes <= stats.limit


TestMap = MapMachine.TestCase
TestMap.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@pytest.fixture
def extents() -> ExtentMap:
    return ExtentMap(1 * MIB)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "storage", os.O_RDWR | os.O_CREAT)
    os.truncate(fd, 1 * MIB)
    yield fd
    os.close(fd)


def whole(extents: ExtentMap, slot: int | None, *, writable: bool = True) -> MapExtent:
    return MapExtent(0, extents.size, slot, 0, writable)


def test_invalidate_with_a_request_under_way_waits_for_it(extents: ExtentMap) -> None:
    async def main() -> None:
        put(extents, whole(extents, extents.add_slot(0)))
        with native_request(extents, 0, 100):
            task = asyncio.create_task(extents.invalidate(0, BLOCK))
            later = asyncio.create_task(extents.protect(BLOCK, BLOCK))
            for _ in range(5):
                await asyncio.sleep(0)
            assert extents.find(0) is None
            assert not task.done()
            assert not later.done()
        await asyncio.gather(task, later)

    asyncio.run(main())


def test_invalidate_does_not_wait_for_requests_begun_after_it(extents: ExtentMap) -> None:
    async def main() -> None:
        put(extents, whole(extents, extents.add_slot(0)))
        with native_request(extents, 0, 100):
            first = extents.start_invalidate(0, 200)
            later = native_request(extents, 500, 100)
            later.__enter__()
        assert extents.is_settled(first)
        second = extents.start_invalidate(500, 100)
        assert not extents.is_settled(second)
        later.__exit__(None, None, None)
        await extents.settle(second)

    asyncio.run(main())


def test_invalidate_cancelled_leaves_the_range_removed_and_the_loop_clean(extents: ExtentMap) -> None:
    async def main() -> None:
        put(extents, whole(extents, extents.add_slot(0)))
        with native_request(extents, 0, 100):
            task = asyncio.create_task(extents.invalidate(0, 100))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert extents.find(0) is None
            assert not asyncio.get_running_loop().remove_reader(lib.bg_map_eventfd(extents.native))

    asyncio.run(main())


def test_settle_in_another_loop_meanwhile_is_refused(extents: ExtentMap) -> None:
    async def main() -> None:
        put(extents, whole(extents, extents.add_slot(0)))
        with native_request(extents, 0, 100):
            task = asyncio.create_task(extents.invalidate(0, 100))
            await asyncio.sleep(0)
            ticket = extents.start_invalidate(0, 100)
            refused = asyncio.to_thread(asyncio.run, extents.settle(ticket))
            with pytest.raises(RuntimeError, match="another loop"):
                await refused
        await task

    asyncio.run(main())


def test_settle_blocking_waits_for_a_request_of_another_thread(extents: ExtentMap) -> None:
    put(extents, whole(extents, extents.add_slot(0)))
    done = threading.Event()

    def invalidate() -> None:
        extents.settle_blocking(extents.start_invalidate(0, 100))
        done.set()

    with native_request(extents, 0, 100):
        thread = threading.Thread(target=invalidate)
        thread.start()
        while extents.find(0) is not None:
            os.sched_yield()
        assert not done.is_set()
    thread.join()
    assert done.is_set()


def test_read_of_data_zeroes_and_past_the_file_end_fills_the_buffer(extents: ExtentMap, file: int) -> None:
    os.pwrite(file, b"a" * MIB, 0)
    slot = extents.add_slot(file)
    put(
        extents,
        MapExtent(0, 100, slot, 5000),
        MapExtent(100, 50),
        MapExtent(150, 150, slot, MIB - 50),
        MapExtent(400, 1, slot, 0),
    )
    buf = bytearray(b"x" * 300)
    assert extents.pread_into(0, buf)
    assert buf == b"a" * 100 + bytes(50) + b"a" * 50 + bytes(100)
    # The hole at 300 makes it a miss, and nothing is touched.
    longer = bytearray(b"x" * 401)
    assert not extents.pread_into(0, longer)
    assert longer == b"x" * 401


@pytest.mark.parametrize("kind", ["zeroes", "protected", "unmapped"])
def test_write_touching_what_is_not_writable_does_nothing(extents: ExtentMap, file: int, kind: str) -> None:
    slot, bitmap = extents.add_slot(file), Bitmap(MIB, BLOCK)
    extents.start_set_bitmaps([bitmap])
    put(extents, whole(extents, slot))
    if kind == "zeroes":
        put(extents, MapExtent(8192, 1))
    else:
        (extents.start_protect if kind == "protected" else extents.start_invalidate)(8192, 1)
    assert not extents.pwrite(4096, b"x" * 8192)
    assert os.pread(file, MIB, 0) == bytes(MIB)
    assert bitmap.count() == 0
    assert not extents.take_written(slot)


def test_write_marks_bitmaps_and_its_slots(extents: ExtentMap, file: int) -> None:
    one, other = extents.add_slot(file), extents.add_slot(file)
    bitmaps = [Bitmap(MIB, BLOCK), Bitmap(2 * MIB, 65536)]
    put(extents, MapExtent(0, 8192, one, 0, True), MapExtent(8192, 8192, other, 0, True))
    extents.start_set_bitmaps(bitmaps)
    assert extents.pwrite(100, b"x")
    assert extents.take_written(one)
    assert not extents.take_written(one)
    assert not extents.take_written(other)
    assert [list(bitmap.dirty_extents()) for bitmap in bitmaps] == [[(0, 4096)], [(0, 65536)]]
    extents.start_set_bitmaps([])
    assert extents.pwrite(5000, b"x")
    assert bitmaps[0].count() == 4096


def test_bitmap_replaced_during_a_write_lives_until_the_write_is_over(extents: ExtentMap) -> None:
    put(extents, whole(extents, extents.add_slot(0)))
    extents.start_set_bitmaps([Bitmap(MIB, BLOCK)])
    with native_request(extents, 0, 100, write=True):
        extents.start_set_bitmaps([])
        gc.collect()


def test_bitmap_smaller_than_the_disk_is_refused(extents: ExtentMap) -> None:
    with pytest.raises(ValueError, match="smaller than the disk"):
        extents.start_set_bitmaps([Bitmap(MIB - 1, BLOCK)])
    extents.start_set_bitmaps([Bitmap(MIB, BLOCK)])
    with pytest.raises(ValueError, match="bitmap"):
        extents.start_resize(MIB + 1)
    assert extents.size == MIB


def test_write_to_a_bad_descriptor_fails_and_still_marks_the_bitmap(extents: ExtentMap, file: int) -> None:
    spare = os.dup(file)
    os.close(spare)
    bitmap = Bitmap(MIB, BLOCK)
    put(extents, whole(extents, extents.add_slot(spare)))
    extents.start_set_bitmaps([bitmap])
    with pytest.raises(OSError, match="Bad file descriptor"):
        extents.pwrite(0, b"x")
    with pytest.raises(OSError, match="Bad file descriptor"):
        extents.pread_into(0, bytearray(1))
    assert bitmap.get(0)


def test_write_to_a_full_device_fails_with_enospc(extents: ExtentMap) -> None:
    fd = os.open("/dev/full", os.O_RDWR)
    put(extents, whole(extents, extents.add_slot(fd)))
    with pytest.raises(OSError, match="No space") as caught:
        extents.pwrite(0, b"x" * 4096)
    assert caught.value.errno == errno.ENOSPC
    os.close(fd)


def test_write_past_the_file_size_limit_fails_with_efbig(extents: ExtentMap, file: int) -> None:
    put(extents, whole(extents, extents.add_slot(file)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            # The first part goes in: the kernel's short write is followed by the one that fails.
            extents.pwrite(4096, b"x" * 8192)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert os.pread(file, 8192, 4096) == b"x" * 4096 + bytes(4096)


def test_request_not_aligned_for_its_slot_misses(extents: ExtentMap, file: int) -> None:
    put(extents, whole(extents, extents.add_slot(file, 512, 512)))
    memory = allocate_aligned(4096)
    assert extents.pread_into(512, memory[:1024])
    assert not extents.pread_into(100, memory[:512])
    assert not extents.pread_into(512, memory[:100])
    # Aligned in the disk, but not where it lives.
    put(extents, MapExtent(4096, 4096, extents.add_slot(file, 512), 100))
    assert not extents.pread_into(4096, memory[:512])
    # Zeroes live nowhere.
    put(extents, MapExtent(8192, 4096))
    assert extents.pread_into(8193, memory[1:2])


def test_request_in_more_pieces_than_the_stack_holds_is_one_hit(extents: ExtentMap, file: int) -> None:
    slot = extents.add_slot(file)
    data = os.urandom(MIB)
    os.pwrite(file, data, 0)
    # 2 KiB pieces, backwards.
    put(extents, *(MapExtent(at, 2048, slot, MIB - 2048 - at, True) for at in range(0, MIB, 2048)))
    buf = bytearray(MIB)
    assert extents.pread_into(0, buf)
    assert buf == b"".join(data[at : at + 2048] for at in range(MIB - 2048, -1, -2048))
    assert extents.pwrite(0, data)
    assert extents.pread_into(0, buf)
    assert buf == data
    assert extents.stats().hits == 3


def test_slot_removed_is_a_miss_and_its_number_waits_for_the_extents_to_go(extents: ExtentMap, file: int) -> None:
    slot = extents.add_slot(file)
    generation = extents.generation()
    put(extents, whole(extents, slot))
    asyncio.run(extents.remove_slot(slot))
    assert not extents.pread_into(0, bytearray(10))
    assert extents.find(0) is None
    assert extents.insert(generation, [whole(extents, slot)]) == 0
    with pytest.raises(ValueError, match="no slot"):
        extents.start_remove_slot(slot)
    assert extents.add_slot(file) != slot
    extents.start_invalidate(0, MIB)
    assert extents.add_slot(file) == slot


def test_slots_used_up_raise_until_one_is_removed_and_settled(extents: ExtentMap, file: int) -> None:
    slots = [extents.add_slot(file) for _ in range(lib.BG_MAP_SLOTS)]
    with pytest.raises(OSError, match="No space"):
        extents.add_slot(file)
    put(extents, whole(extents, slots[7]))
    with native_request(extents, 0, 1):
        extents.start_remove_slot(slots[7])
        with pytest.raises(OSError, match="No space"):
            extents.add_slot(file)
    assert extents.add_slot(file) == slots[7]
    assert extents.find(0) is None


def test_whole_raw_file_of_a_tebibyte_is_one_extent() -> None:
    extents = ExtentMap(TIB)
    slot = extents.add_slot(0)
    empty = extents.stats().bytes
    put(extents, whole(extents, slot))
    stats = extents.stats()
    assert (stats.extents, stats.regions) == (1, 0)
    assert stats.bytes - empty < 4096
    with native_request(extents, 5, TIB - 10) as pieces:
        assert pieces == [(slot, 5, TIB - 10)]


def test_protection_lifted_cluster_by_cluster_ends_as_wide_extents_again() -> None:
    extents = ExtentMap(TIB)
    slot = extents.add_slot(0)
    put(extents, whole(extents, slot, writable=False))
    for at in range(0, 4 * REGION, 65536):
        put(extents, MapExtent(at, 65536, slot, at, True))
    stats = extents.stats()
    assert (stats.extents, stats.regions) == (2, 0)
    asyncio.run(extents.protect(0, TIB))
    assert extents.stats().extents == 1


def test_fragmented_disk_larger_than_memory_keeps_what_was_used_last() -> None:
    extents = ExtentMap(TIB, 1 * MIB)
    slot = extents.add_slot(0)
    cluster = 65536
    per_region = REGION // cluster
    for region in range(2000):
        start = region * per_region
        clusters = range(start, start + per_region)
        put(extents, *(MapExtent(c * cluster, cluster, slot, (TIB // cluster - 1 - c) * cluster) for c in clusters))
        assert extents.find(0) is not None, "used between any two inserts, so never dropped"
    stats = extents.stats()
    assert extents.find(2000 * REGION - 1) is not None
    assert stats.bytes <= stats.limit == 1 * MIB
    # With so little memory a region of this disk is 128 MiB.
    assert stats.evictions + stats.regions == 2000 * REGION // (128 * MIB)
    assert stats.extents > 10_000


@pytest.mark.parametrize("storages, size", [(1, 4), (2, 8)])
def test_fragmented_map_takes_four_bytes_for_a_cluster_of_one_storage_else_eight(storages: int, size: int) -> None:
    clusters = 64 * 256
    extents = ExtentMap(clusters * 65536, 64 * MIB)
    slots = [extents.add_slot(0) for _ in range(storages)]
    empty = extents.stats().bytes
    cluster_slots = [slots[c % storages] for c in range(clusters)]
    put(extents, *(MapExtent(c * 65536, 65536, s, (clusters - c) * 65536, True) for c, s in enumerate(cluster_slots)))
    stats = extents.stats()
    assert (stats.extents, stats.regions) == (clusters, 64)
    assert stats.bytes - empty < clusters * size * 1.1 + 20_000  # and what a change is prepared in
    slot = cluster_slots[1]
    put(extents, MapExtent(65536 + 512, 512, slot, 512))  # no table can say that
    assert extents.find(65536) == MapExtent(65536, 512, slot, (clusters - 1) * 65536, True)
    assert extents.find(65536 + 512) == MapExtent(65536 + 512, 512, slot, 512)
    assert extents.find(65536 + 1024) == MapExtent(65536 + 1024, 64512, slot, (clusters - 1) * 65536 + 1024, True)
    assert extents.stats().extents == clusters + 2


@pytest.mark.parametrize("changed", [0, 100, 255])
@pytest.mark.parametrize("kind", ["another storage", "not aligned", "too far"])
def test_table_of_one_storage_takes_a_cluster_that_its_words_can_not_say(kind: str, changed: int) -> None:
    clusters = REGION // 65536
    extents = ExtentMap(2 * REGION)
    slot, other = extents.add_slot(0), extents.add_slot(0)
    items = [
        MapExtent(c * 65536, 65536, slot, (clusters - c) * 65536, c % 3 > 0, copy=c % 3 == 1) for c in range(clusters)
    ]
    put(extents, *items)
    short = extents.stats().bytes
    before = items[changed]
    items[changed] = {
        "another storage": before._replace(slot=other),
        "not aligned": before._replace(storage_offset=before.storage_offset + 512),
        "too far": before._replace(storage_offset=(2**28 - 1) * 65536),
    }[kind]
    put(extents, items[changed])
    assert [extents.find(e.offset) for e in items] == items
    assert extents.stats().bytes - short >= clusters * 4
    extents.start_invalidate(before.offset, 65536)
    assert extents.find(before.offset) is None
    put(extents, before)
    items[changed] = before
    assert [extents.find(e.offset) for e in items] == items


def test_last_place_that_four_bytes_can_say() -> None:
    clusters = REGION // 65536
    kinds: list[dict[str, bool]] = [
        {"writable": True},
        {"writable": True, "copy": True},
        {"allocate": True, "copy": True},
        {},
    ]

    def taken(place: int) -> int:
        extents = ExtentMap(REGION)
        slot = extents.add_slot(0)
        items = [MapExtent(c * 65536, 65536, slot, (place - c) * 65536, **kinds[c % 4]) for c in range(clusters - 1)]
        put(extents, *items)
        assert [extents.find(e.offset) for e in items] == items
        assert extents.find(REGION - 65536) is None
        return extents.stats().bytes

    assert taken(2**28 - 2) == taken(clusters)
    assert taken(2**28 - 1) == taken(clusters) + clusters * 4


def test_clusters_that_may_be_written_in_different_ways_are_one_table() -> None:
    clusters = REGION // 65536
    kinds: list[dict[str, bool]] = [
        {"writable": True},
        {"writable": True, "copy": True},
        {"allocate": True},
        {"allocate": True, "copy": True},
        {},
    ]
    extents = ExtentMap(2 * REGION)
    slot = extents.add_slot(0)
    items = [MapExtent(c * 65536, 65536, slot, (clusters - c) * 65536, **kinds[c % 5]) for c in range(clusters)]
    items[7::11] = [MapExtent(e.offset, e.length, allocate=True) for e in items[7::11]]
    items[9::11] = [MapExtent(e.offset, e.length) for e in items[9::11]]
    holes = items[5::11]
    del items[5::11]
    empty = extents.stats().bytes
    put(extents, *items)
    assert extents.stats().bytes - empty < clusters * (8 + 64)  # the second is what a change is prepared in
    assert [extents.find(e.offset) for e in items] == items
    assert [extents.find(e.offset) for e in holes] == [None] * len(holes)
    extents.copied(0, REGION)
    extents.start_protect(REGION // 2, REGION // 2)
    for e in items:
        found = extents.find(e.offset)
        writable = e.offset < REGION // 2
        assert found == e._replace(copy=False, writable=e.writable and writable, allocate=e.allocate and writable)


@pytest.mark.parametrize("end", [2**59, 2**59 + 65536, 2**63 - 65536])
def test_clusters_live_wherever_a_storage_can_have_them(end: int) -> None:
    extents = ExtentMap(REGION)
    slot = extents.add_slot(0)
    items = [MapExtent(at, 65536, slot, end - 65536 - at, True) for at in range(0, REGION - 65536, 65536)]
    put(extents, *items)
    assert [extents.find(e.offset) for e in items] == items


def test_disk_of_the_largest_size_maps_wide_extents_to_its_end() -> None:
    size = 2**63 - 1
    extents = ExtentMap(size)
    put(extents, whole(extents, extents.add_slot(0)))
    assert extents.find(size - 1) is not None
    # Past 4 PiB fragments are not kept, nor is anything left that would be wrong.
    extents.start_invalidate(size - 100, 10)
    assert extents.find(size - 95) is None
    assert extents.find(0) is not None


def test_resize_forgets_and_refuses_what_was_asked_before(extents: ExtentMap) -> None:
    slot = extents.add_slot(0)
    generation = extents.generation()
    put(extents, whole(extents, slot))
    asyncio.run(extents.resize(2 * MIB))
    assert extents.size == 2 * MIB
    assert extents.find(0) is None
    assert extents.insert(generation, [MapExtent(0, 1)]) == 0
    assert put(extents, whole(extents, slot)) == 1


@pytest.mark.parametrize(
    "extent",
    [
        MapExtent(0, 0),
        MapExtent(-1, 2),
        MapExtent(0, MIB + 1),
        MapExtent(2**64, 1),
        MapExtent(0, 1, 0, -1),
        MapExtent(0, 2, 0, 2**63 - 1),
        MapExtent(0, 1, lib.BG_MAP_SLOTS),
        MapExtent(0, 1, -1),
    ],
    ids=str,
)
def test_insert_of_an_impossible_extent_raises_and_takes_none(extents: ExtentMap, extent: MapExtent) -> None:
    extents.add_slot(0)
    with pytest.raises(ValueError, match="not inside the disk"):
        put(extents, MapExtent(0, 10), extent)
    assert extents.find(0) is None


@given(offset=st.integers(-(2**70), 2**70), length=st.integers(0, 2 * BLOCK))
@settings(max_examples=50)
def test_request_outside_the_disk_raises(offset: int, length: int) -> None:
    extents = ExtentMap(BLOCK)
    put(extents, MapExtent(0, BLOCK))
    inside = offset >= 0 and offset + length <= BLOCK
    for call in (lambda: extents.pread_into(offset, bytearray(length)), lambda: extents.pwrite(offset, bytes(length))):
        if inside:
            call()
        else:
            with pytest.raises(ValueError, match="not inside the disk"):
                call()
    if not inside:
        assert extents.find(offset) is None or 0 <= offset < BLOCK
        with pytest.raises(ValueError, match="not inside the disk"):
            extents.start_invalidate(offset, length)


def test_arguments_out_of_range_raise(extents: ExtentMap) -> None:
    for size, memory in ((-1, MIN_MEMORY), (2**63, MIN_MEMORY), (1, MIN_MEMORY - 1)):
        with pytest.raises(ValueError, match="extent map"):
            ExtentMap(size, memory)
    for arguments in ((-1,), (0, 0), (0, 3), (0, 1, 1 << 20), (2**40,)):
        with pytest.raises(ValueError, match="powers of two"):
            extents.add_slot(*arguments)
    for slot in (-1, 5000, 2**40):
        with pytest.raises(ValueError, match="no slot"):
            extents.take_written(slot)
    with pytest.raises(ValueError, match="can not have"):
        extents.start_resize(-1)


def test_buffer_that_is_read_only_is_refused(extents: ExtentMap) -> None:
    put(extents, MapExtent(0, MIB))
    for buf in (b"1234", memoryview(b"1234")):
        with pytest.raises((BufferError, TypeError)):
            extents.pread_into(0, buf)


def test_stats_count_what_happened(extents: ExtentMap, file: int) -> None:
    slot, old = extents.add_slot(file), extents.generation()
    extents.start_invalidate(0, 1)
    extents.insert(old, [MapExtent(0, 1)])
    put(extents, MapExtent(0, 100, slot, 0, True))
    extents.start_protect(50, 1)
    extents.pread_into(0, bytearray(10))
    extents.pwrite(0, b"123")
    extents.pwrite(50, b"1")
    stats = extents.stats()
    assert stats[:8] == (2, 1, 10, 3, 1, 1, 1, 1)
    assert (stats.extents, stats.regions, stats.evictions) == (3, 1, 0)


# Zeroes, discards, flushes.


@pytest.mark.parametrize("how", [Zeroing.PUNCH, Zeroing.PUNCH | Zeroing.ZERO_RANGE, Zeroing.ZERO_RANGE])
def test_zero_makes_holes_only_where_the_slot_allows_it(extents: ExtentMap, file: int, how: Zeroing) -> None:
    slot = extents.add_slot(file)
    put(extents, MapExtent(0, MIB, slot, 0, writable=True))
    os.pwrite(file, b"x" * MIB, 0)
    bitmap = Bitmap(extents.size, 65536)
    extents.settle_blocking(extents.start_set_bitmaps([bitmap]))
    assert lib.bg_map_zero(extents.native, PART, PART, how) == lib.BG_MAP_MISS
    assert list(bitmap.dirty_extents()) == []
    extents.set_zeroing(slot, how)
    expected = bytes(PART)
    if lib.bg_map_zero(extents.native, PART, PART, how) == lib.BG_MAP_MISS:
        assert how == Zeroing.ZERO_RANGE  # not on this file system
        expected = b"x" * PART
    assert os.pread(file, MIB, 0) == b"x" * PART + expected + b"x" * 2 * PART
    assert list(bitmap.dirty_extents()) == [(PART, PART)]
    assert extents.take_written(slot)
    assert extents.stats().bytes_written == 0
    extents.start_protect(0, PART)
    assert lib.bg_map_zero(extents.native, 0, 2 * PART, Zeroing.PUNCH) == lib.BG_MAP_MISS


UNIT = 64 << 10
LAST = MIB - 100  # where a short unit ends


@pytest.mark.parametrize(
    "offset, length, written",
    [
        (5, 100, True),
        (0, UNIT - 1, True),
        (1, UNIT - 1, True),
        (1, 2 * UNIT - 2, True),  # two, of both the most
        (0, UNIT, False),
        (UNIT - 1, UNIT + 1, False),
        (LAST - 10, 10, True),
        (15 * UNIT + 1, LAST - 15 * UNIT - 1, True),
        (15 * UNIT, LAST - 15 * UNIT - 1, True),
        (15 * UNIT, LAST - 15 * UNIT, False),  # the short one is a whole one
        (14 * UNIT + 1, LAST - 14 * UNIT - 1, False),
    ],
)
def test_zeroes_are_written_for_requests_that_cover_no_whole_unit(
    file: int, offset: int, length: int, written: bool
) -> None:
    extents = ExtentMap(LAST)
    slot = extents.add_slot(file)
    put(
        extents,
        MapExtent(0, LAST - MIB // 2, slot, MIB // 2, True),
        MapExtent(LAST - MIB // 2, MIB // 2, slot, 0, True),
    )
    os.pwrite(file, b"x" * MIB, 0)
    bitmap = Bitmap(LAST, 4096)
    extents.settle_blocking(extents.start_set_bitmaps([bitmap]))
    anyhow = Zeroing.PUNCH | Zeroing.ZERO_RANGE | Zeroing.WRITE
    assert not extents.zero(offset, length, anyhow)
    extents.set_zeroing(slot, Zeroing.WRITE, UNIT)
    assert not extents.zero(offset, length, Zeroing.PUNCH | Zeroing.ZERO_RANGE)
    assert list(bitmap.dirty_extents()) == []
    asked = lib.bg_map_zero_now(extents.native, offset, length, anyhow, 0)
    assert asked == (-errno.EAGAIN if written else lib.BG_MAP_MISS)
    assert extents.zero(offset, length, anyhow) == written
    found = bytearray(LAST)
    extents.pread_into(0, found)
    zero = length if written else 0
    assert found == b"x" * offset + bytes(zero) + b"x" * (LAST - offset - zero)
    assert extents.take_written(slot) == written
    end = min(LAST, offset + length + -(offset + length) % 4096)
    assert list(bitmap.dirty_extents()) == ([(offset - offset % 4096, end - offset + offset % 4096)] if written else [])
    extents.start_protect(offset, 1)
    assert not extents.zero(offset, length, anyhow)


@pytest.mark.parametrize("offset, length", [(5, 100), (1, 2 * UNIT - 2), (MIB - UNIT // 2, 100)])
def test_discards_of_no_whole_unit_are_ignored_if_so_wanted(
    extents: ExtentMap, file: int, offset: int, length: int
) -> None:
    assert not extents.zero(offset, length, Zeroing.PUNCH)
    extents.ignore_discards(UNIT)
    assert extents.zero(offset, length, Zeroing.PUNCH)
    assert not extents.zero(offset, length, Zeroing.PUNCH | Zeroing.WRITE)
    assert not extents.zero(0, UNIT, Zeroing.PUNCH)
    with pytest.raises(ValueError, match="not inside"):
        extents.zero(extents.size, 1, Zeroing.PUNCH)
    extents.ignore_discards(MAX_UNIT)
    assert extents.zero(1, extents.size - 1, Zeroing.PUNCH)
    extents.ignore_discards(0)
    assert not extents.zero(offset, length, Zeroing.PUNCH)
    for unit in (-1, 3):
        with pytest.raises(ValueError, match="is no unit"):
            extents.ignore_discards(unit)


def test_zeroes_are_written_where_the_file_system_can_not_make_them() -> None:
    """tmpfs has holes, but no FALLOC_FL_ZERO_RANGE."""
    memory = os.memfd_create("storage")
    try:
        extents = ExtentMap(MIB)
        slot = extents.add_slot(memory)
        put(extents, MapExtent(0, MIB, slot, 0, True))
        os.pwrite(memory, b"x" * MIB, 0)
        extents.set_zeroing(slot, Zeroing.ZERO_RANGE)
        assert not extents.zero(0, 4096, Zeroing.PUNCH)
        for _ in range(2):  # the second time nobody is asked
            assert not extents.zero(0, 4096, Zeroing.ZERO_RANGE)
        assert not extents.take_written(slot)
        extents.set_zeroing(slot, Zeroing.PUNCH | Zeroing.ZERO_RANGE | Zeroing.WRITE, MAX_UNIT)
        assert extents.zero(4096, 8192, Zeroing.PUNCH | Zeroing.WRITE)
        assert os.lseek(memory, 4096, os.SEEK_DATA) == 12288
        assert extents.zero(12288, 200_000, Zeroing.ZERO_RANGE | Zeroing.WRITE)
        assert os.lseek(memory, 4096, os.SEEK_DATA) == 12288
        assert os.pread(memory, MIB, 0) == b"x" * 4096 + bytes(208_192) + b"x" * (MIB - 212_288)
        assert extents.take_written(slot)
    finally:
        os.close(memory)


def test_zeroes_are_not_written_without_unit_or_where_room_has_to_be_found(extents: ExtentMap, file: int) -> None:
    slot = extents.add_slot(file)
    for unit in (0, -1, 3):
        with pytest.raises(ValueError, match=f"{unit} is no unit"):
            extents.set_zeroing(slot, Zeroing.WRITE, unit)
    direct = extents.add_slot(file, alignment=512, memory_alignment=65536)
    with pytest.raises(ValueError, match="is no unit for it"):
        extents.set_zeroing(direct, Zeroing.WRITE, UNIT)
    extents.set_zeroing(slot, Zeroing.WRITE, UNIT)
    put(extents, MapExtent(0, PART, slot, 0, True), MapExtent(PART, PART, allocate=True), MapExtent(2 * PART, PART))
    assert extents.zero(PART - 10, 10, Zeroing.WRITE)
    for offset in (PART - 1, PART, 2 * PART - 1, 2 * PART):
        assert not extents.zero(offset, 10, Zeroing.WRITE)


def test_flush_is_native_only_while_native_writes_are_all_there_is(extents: ExtentMap, file: int) -> None:
    slot = extents.add_slot(file)
    put(extents, MapExtent(0, MIB, slot, 0, writable=True))
    assert not extents.flush()
    dirt = extents.dirt()
    extents.flushed(dirt)
    assert lib.bg_map_try_flush(extents.native, 0) == 2
    extents.pwrite(0, b"x")
    assert lib.bg_map_try_flush(extents.native, 0) == 1
    assert extents.flush()
    assert lib.bg_map_try_flush(extents.native, 0) == 2
    assert not extents.take_written(slot)
    extents.dirty()
    assert not extents.flush()
    extents.flushed(dirt)  # of a flush that began too early
    assert not extents.flush()


def test_flush_after_the_mark_was_taken_is_not_native_until_python_has_flushed(extents: ExtentMap, file: int) -> None:
    """Who takes the mark has not made anything durable yet."""
    slot = extents.add_slot(file)
    put(extents, MapExtent(0, MIB, slot, 0, writable=True))
    extents.flushed(extents.dirt())
    extents.pwrite(0, b"x")
    assert extents.take_written(slot)
    assert lib.bg_map_try_flush(extents.native, 0) == 0
    assert not extents.flush()
    extents.flushed(extents.dirt())
    assert extents.flush()


def test_flush_that_fails_leaves_its_error_and_the_mark(extents: ExtentMap) -> None:
    reading, writing = os.pipe()
    slot = extents.add_slot(writing)
    put(extents, MapExtent(0, MIB, slot, 0, writable=True))
    with native_request(extents, 0, 1, write=True):
        pass
    extents.flushed(extents.dirt())
    assert not extents.flush()
    assert lib.bg_map_try_flush(extents.native, 0) == 0
    assert extents.take_written(slot)
    assert extents.take_written(slot)  # who sees no mark might think that all is durable
    assert extents.take_flush_error(slot) == errno.EINVAL
    assert extents.take_flush_error(slot) == 0
    assert not extents.take_written(slot)
    extents.settle_blocking(extents.start_remove_slot(slot))
    os.close(reading)
    os.close(writing)


def test_place_given_by_an_allocator_is_for_python_to_make_durable(extents: ExtentMap, file: int) -> None:
    slot = extents.add_slot(file)
    put(extents, MapExtent(0, MIB, allocate=True))
    extents.flushed(extents.dirt())
    assert extents.flush()
    assert lib.bg_map_placed(extents.native, 0, 65536, slot, 0) == 0
    assert not extents.flush()
