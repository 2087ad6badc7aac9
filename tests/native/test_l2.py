# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""qcow2 tables against a decoder written entry by entry from the specification."""

from __future__ import annotations

import struct
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockgraph.native import (
    ExtentMap,
    L2Kind,
    L2Places,
    L2Run,
    MapExtent,
    decode_few_l2,
    decode_l2,
    free_run_refcount16,
    link_l2,
    next_nonzero_u64,
)

COPIED, COMPRESSED = 1 << 63, 1 << 62


def one(entry: int, bits: int, version: int, data_file: bool) -> tuple[L2Kind, int, bool, int]:
    """Kind, host offset, copied, compressed length."""
    invalid = (L2Kind.INVALID, struct.unpack("q", struct.pack("Q", entry))[0], False, 0)
    if entry & COMPRESSED:
        x = 62 - (bits - 8)
        offset, sectors = entry % (1 << x), entry % COMPRESSED >> x
        if offset >> 56:
            return invalid
        return L2Kind.COMPRESSED, offset, bool(entry & COPIED), (offset // 512 + sectors + 1) * 512 - offset
    host, zero = entry & 0x00FF_FFFF_FFFF_FE00, entry & 1
    allocated = host != 0 or bool(entry & COPIED)
    if entry & 0x3F00_0000_0000_01FE or host % (1 << bits) or (zero and version == 2):
        return invalid
    if allocated and host == 0 and not data_file:
        return invalid
    if zero:
        kind = L2Kind.ZERO_ALLOCATED if allocated else L2Kind.ZERO
    else:
        kind = L2Kind.DATA if allocated else L2Kind.UNALLOCATED
    return kind, host, bool(entry & COPIED), 0


def model(entries: list[int], start: int, bits: int, version: int, data_file: bool) -> list[L2Run]:
    runs: list[L2Run] = []
    for index, entry in list(enumerate(entries))[start:]:
        kind, host, copied, compressed = one(entry, bits, version, data_file)
        last = runs[-1] if runs else None
        joins = (
            last is not None
            and (last.kind, last.copied) == (kind, copied)
            and (
                kind in (L2Kind.UNALLOCATED, L2Kind.ZERO)
                or (kind in (L2Kind.DATA, L2Kind.ZERO_ALLOCATED) and host == last.host_offset + (last.clusters << bits))
            )
        )
        if joins and last is not None:
            runs[-1] = last._replace(clusters=last.clusters + 1)
        else:
            runs.append(L2Run(index, 1, kind, host, copied, compressed))
    return runs


def entries_for(bits: int) -> st.SearchStrategy[list[int]]:
    flags = st.sampled_from([0, 1, COPIED, COPIED, COPIED | 1])
    plausible = st.builds(lambda cluster, flag: cluster << bits | flag, st.integers(0, 6), flags)
    compressed = st.builds(lambda low: COMPRESSED | low, st.integers(0, COMPRESSED - 1))
    return st.lists(st.one_of(plausible, plausible, st.just(0), compressed, st.integers(0, 2**64 - 1)), max_size=80)


@given(data=st.data(), bits=st.sampled_from([9, 12, 16, 21]), version=st.sampled_from([2, 3]), data_file=st.booleans())
def test_decode_l2_of_any_entries_equals_model(data: st.DataObject, bits: int, version: int, data_file: bool) -> None:
    entries = data.draw(entries_for(bits))
    start = data.draw(st.integers(0, len(entries)))
    table = struct.pack(f">{len(entries)}Q", *entries)
    assert decode_l2(table, bits, version, start=start, data_file=data_file) == model(
        entries, start, bits, version, data_file
    )


def test_decode_l2_of_contiguous_table_is_one_run() -> None:
    table = struct.pack(">8192Q", *(COPIED | (i + 5) << 16 for i in range(8192)))
    assert decode_l2(table, 16, 3) == [L2Run(0, 8192, L2Kind.DATA, 5 << 16, True, 0)]


def test_decode_l2_with_more_runs_than_a_batch_is_complete() -> None:
    entries = [COPIED | (2 * i + 1) << 16 for i in range(8192)]
    runs = decode_l2(struct.pack(">8192Q", *entries), 16, 3)
    assert [(run.first, run.clusters, run.host_offset) for run in runs] == [
        (i, 1, (2 * i + 1) << 16) for i in range(8192)
    ]


def test_decode_l2_of_run_with_copied_change_ends_the_run() -> None:
    table = struct.pack(">4Q", COPIED | 1 << 16, COPIED | 2 << 16, 3 << 16, COPIED | 4 << 16)
    assert [(run.first, run.clusters, run.copied) for run in decode_l2(table, 16, 3)] == [
        (0, 2, True),
        (2, 1, False),
        (3, 1, True),
    ]


@pytest.mark.parametrize(
    "table, bits, version, start",
    [(b"1234567", 16, 3, 0), (bytes(8), 8, 3, 0), (bytes(8), 22, 3, 0), (bytes(8), 16, 4, 0), (bytes(8), 16, 3, 2)],
    ids=["odd-length", "small-clusters", "large-clusters", "version", "start"],
)
def test_decode_l2_out_of_range_is_refused(table: bytes, bits: int, version: int, start: int) -> None:
    with pytest.raises(ValueError, match=r"table|cluster_bits"):
        decode_l2(table, bits, version, start=start)


@given(entries=st.lists(st.sampled_from([0, 0, 0, 1, 2**63]), max_size=60), data=st.data())
def test_next_nonzero_u64_equals_search(entries: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(entries)))
    expected = next((i for i in range(start, len(entries)) if entries[i]), None)
    assert next_nonzero_u64(struct.pack(f">{len(entries)}Q", *entries), start) == expected


@given(counts=st.lists(st.sampled_from([0, 0, 1, 2, 0x0100, 0x8000, 0xFFFF]), max_size=60), data=st.data())
def test_free_run_refcount16_equals_search(counts: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(counts)))
    want = data.draw(st.integers(1, 6))
    expected = next((i for i in range(start, len(counts) - want + 1) if not any(counts[i : i + want])), None)
    tail = 0
    while tail < len(counts) - start and counts[-1 - tail] == 0:
        tail += 1
    found = (len(counts) - tail, tail) if expected is None else (expected, want)
    assert free_run_refcount16(struct.pack(f">{len(counts)}H", *counts), want, start) == found


@given(
    entries=entries_for(16),
    disk=st.integers(-3, 3),
    low=st.integers(0, 3 << 16),
    length=st.integers(1, 40 << 16),
    host_end=st.integers(1, 1 << 14),
    metadata=st.sets(st.integers(1, 1 << 12), max_size=20),
    writable=st.booleans(),
)
def test_places_are_the_data_clusters_inside_the_range_and_the_file(
    entries: list[int], disk: int, low: int, length: int, host_end: int, metadata: set[int], writable: bool
) -> None:
    size = 44 << 16
    extents = ExtentMap(size)
    slot = extents.add_slot(0)
    table = bytearray(struct.pack(f">{len(entries)}Q", *entries))
    places = L2Places(table, 1 << 16, 16, 3, host_end << 16, array("Q", sorted(metadata)), 0)
    high = min(low + length, size)
    within = MapExtent(low, high - low, slot, 0, writable)
    extents.insert_places(extents.generation(), places, (disk - 1) << 16, 1 << 30, within)
    for cluster in range(size >> 16):
        for at in {max(low, cluster << 16), min(high, (cluster + 1) << 16) - 1}:
            if at >> 16 != cluster:
                continue
            index, found = cluster - disk, extents.find(at)
            kind, host, copied, _ = (
                one(entries[index], 16, 3, False) if 0 <= index < len(entries) else (L2Kind.UNALLOCATED, 0, False, 0)
            )
            if kind != L2Kind.DATA or not low <= at < high or not 1 << 16 <= host < host_end << 16:
                assert found is None
                continue
            assert found is not None
            assert found.storage_offset + at - found.offset == host + (1 << 30) + at % (1 << 16)
            if not copied or not writable:
                assert not found.writable


def test_places_of_a_run_that_touches_metadata_are_not_writable() -> None:
    table = bytearray(struct.pack(">6Q", *(COPIED | (host << 16) for host in (5, 6, 8, 7, 20, 30))))
    extents = ExtentMap(6 << 16)
    slot = extents.add_slot(0)
    within = MapExtent(0, 6 << 16, slot, 0, True)
    places = L2Places(table, 0, 16, 3, 100 << 16, array("Q", [6, 20]), 0)
    assert extents.insert_places(extents.generation(), places, 0, 0, within) == 5
    assert [(found := extents.find(i << 16)) and found.writable for i in range(6)] == [0, 0, 1, 1, 0, 1]


@given(entries_for(16), st.integers(1, 40))
def test_table_is_decoded_if_it_has_few_runs(entries: list[int], most: int) -> None:
    table = struct.pack(f">{len(entries)}Q", *entries)
    runs = decode_l2(table, 16, 3)
    assert decode_few_l2(table, 16, 3, most=most) == (runs if len(runs) <= most else None)


def test_links_are_put_into_their_table_in_order() -> None:
    table = bytearray(8 * 64)
    link = struct.Struct("=qqqq").pack
    links = link(3 << 16, 5 << 16, 2, 0) + link((64 + 63) << 16, 9 << 16, 1, 0) + link(4 << 16, 6 << 16, 1, 1)
    assert link_l2(table, 16, links) == (3, 64)
    runs = decode_l2(table, 16, 3)
    assert [(run.first, run.clusters, run.kind, run.host_offset) for run in runs if run.kind != L2Kind.UNALLOCATED] == [
        (3, 1, L2Kind.DATA, 5 << 16),
        (4, 1, L2Kind.ZERO_ALLOCATED, 6 << 16),
        (63, 1, L2Kind.DATA, 9 << 16),
    ]


@pytest.mark.parametrize(
    "link",
    [(3 << 16, 7 << 16, 1, 0), (3 << 16, 7 << 16, 1, 1), (0, 7 << 16, 1, 1), (63 << 16, 7 << 16, 2, 0)],
    ids=["placed twice", "zero elsewhere", "zero of nothing", "past the table"],
)
def test_link_that_does_not_fit_is_refused(link: tuple[int, int, int, int]) -> None:
    table = bytearray(8 * 64)
    link_l2(table, 16, struct.pack("=qqqq", 3 << 16, 5 << 16, 1, 0))
    before = bytes(table)
    with pytest.raises(ValueError, match="a link does not fit"):
        link_l2(table, 16, struct.pack("=qqqq", *link))
    assert table == before
